"""Kills every part at random moments and counts what was lost: `python -m bench.chaos --kills N`.

A round starts from its seed: one to three kills of parts drawn at random while cameras send, either at a random moment
or at a step on the way of a frame (`bench.chaos_steps`; the steps least often hit so far come first). Then everything
that was receipted by then must be in the log once, as DETECTIONS, and before every consumer (`bench.chaos_house`). Only
then is one line a kill appended to the ledger:

    {"run": ..., "log": "sqlite", "round": seed, "target": "edge-1", "kind": "edge", "how": "random" or a step,
     "frames": receipts since the last kill, "lost": 0, "doubled": 0, "strangers": 0, "not_detections": 0, "missed": 0,
     "out_of_order": 0}

A run that ends early is gone on with: the kills in the ledger count. What a round finds wrong stands on its last kill,
ends the run with exit code 1, and leaves its folder.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.chaos_house import START_S, Found, House, Part
from bench.chaos_steps import CLOUD_STEPS, COMMIT_STEP, EDGE_STEPS

KINDS = ("edge", "cloud", "camera", "consumer")
KILLS_A_ROUND = 3
SHAPE = ("edges", "cameras", "clouds", "brokers", "consumers", "pause_s")
COLUMN_NAMES = {"not_detections": "other end", "out_of_order": "disorder"}
WRONGS = ("lost", "doubled", "strangers", "not_detections", "missed", "out_of_order")


class Ledger:
    """The kills so far, one line of JSON each; a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            whole, _, torn = path.read_text().rpartition("\n")
            self.lines = [json.loads(line) for line in whole.splitlines()]
            if torn:
                path.write_text(whole + "\n" if whole else "")

    def append(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)

    @property
    def next_round(self) -> int:
        return max((line["round"] for line in self.lines), default=0) + 1

    def rarest(self, column: str, values: Sequence[str], rng: random.Random) -> str:
        """What was hit least often so far."""
        hits = Counter(line[column] for line in self.lines)
        return min(values, key=lambda value: (hits[value], rng.random()))


class Round:
    """Some kills and the check after them."""

    def __init__(self, house: House, ledger: Ledger, seed: int, run: str) -> None:
        self._log = "jetstream" if house.of_kind("broker") else "sqlite"
        self._steps = {"edge": EDGE_STEPS, "cloud": [step for step in CLOUD_STEPS if self._log_has(step)]}
        self._house = house
        self._ledger = ledger
        self._rng = random.Random(seed)  # noqa: S311
        self._seed = seed
        self._run = run
        self._kills: list[dict[str, Any]] = []

    async def play(self, kinds: Sequence[str]) -> Found:
        """Kills a part of each of these kinds, then checks and writes the ledger. Raises PartFailed."""
        house, seen = self._house, len(self._house.books.receipts)
        house.go()
        for kind in kinds:
            await asyncio.sleep(self._rng.uniform(0, 0.8))  # the random moment is the point
            part = self._rng.choice([part for part in house.of_kind(kind) if part.alive] or house.of_kind(kind))
            how = "random"
            if kind in self._steps and self._rng.random() < 0.6:
                how = self._ledger.rarest("how", self._steps[kind], self._rng)
            await self._kill(part, how)
            receipts = len(house.books.receipts)
            self._kills.append(self._line(part, how, receipts - seen))
            seen = receipts
        await house.all_up()
        found = await house.settle()
        self._kills[-1]["frames"] += len(house.books.receipts) - seen
        self._kills[-1] |= {wrong: len(getattr(found, wrong)) for wrong in WRONGS}
        self._ledger.append(self._kills)
        return found

    async def _kill(self, part: Part, how: str) -> None:
        if how == "random":
            await self._house.until(lambda: part.alive, START_S)
            part.kill()
        else:
            await self._house.until(lambda: True, START_S, also=[part.up])
            part.arm(how)
            if not await self._house.until(lambda: True, START_S, also=[part.dead]):
                raise RuntimeError(f"no frame came to the step {how!r} of {part.name} within {START_S:g} s")

    def _log_has(self, step: str) -> bool:
        return self._log == "sqlite" or step != COMMIT_STEP

    def _line(self, part: Part, how: str, frames: int) -> dict[str, Any]:
        facts = {
            "run": self._run,
            "log": self._log,
            "round": self._seed,
            "target": part.name,
            "kind": part.kind,
            "how": how,
        }
        return facts | {"frames": frames} | dict.fromkeys(WRONGS, 0)


async def run(
    ledger: Ledger, folder: Path, *, kills: int, minutes: float, shape: dict[str, Any], progress: Progress
) -> Found | None:
    """Rounds until the ledger has `kills` or the time is over. Returns what was wrong, None if nothing was."""
    house = House(folder, **shape)
    parts = (*KINDS, "broker") if house.of_kind("broker") else KINDS
    ends = time.monotonic() + 60 * minutes
    bar = progress.add_task("starting", total=kills, completed=len(ledger.lines))
    try:
        await house.open()
        while len(ledger.lines) < kills and time.monotonic() < ends:
            seed = ledger.next_round
            rng = random.Random(-seed)  # noqa: S311
            count = min(kills - len(ledger.lines), rng.randint(1, KILLS_A_ROUND))
            kinds = [ledger.rarest("kind", parts, rng), *rng.choices(parts, k=count - 1)]
            found = await Round(house, ledger, seed, folder.name).play(kinds)
            progress.update(bar, completed=len(ledger.lines), description=f"{len(house.books.receipts)} frames")
            if not found.nothing:
                return found
    finally:
        await house.close()
    return None


def table(ledger: Ledger, by: str) -> Table:
    """Kills, frames and what was wrong, by `kind` or by `how`."""
    grid = Table(title=f"kills by {'part' if by == 'kind' else 'moment'}")
    grid.add_column(by)
    columns = ("kills", "frames", *(COLUMN_NAMES.get(wrong, wrong) for wrong in WRONGS))
    for column in columns:
        grid.add_column(column, justify="right")
    groups = sorted({line[by] for line in ledger.lines})
    for group in [*groups, "all"]:
        lines = [line for line in ledger.lines if group in ("all", line[by])]
        sums = (sum(line[key] for line in lines) for key in ("frames", *WRONGS))
        grid.add_row(group, str(len(lines)), *map(str, sums), style="bold" if group == "all" else None)
    return grid


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills that the ledger shall have")
    parser.add_argument("--ledger", type=Path, default=Path("chaos.jsonl"), help="the kills so far; made if missing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after this long; call again to go on")
    parser.add_argument("--edges", type=int, default=2)
    parser.add_argument("--cameras", type=int, default=2, help="of each edge")
    parser.add_argument("--clouds", type=int, default=1, help="more than one need --brokers")
    parser.add_argument("--brokers", type=int, default=0, help="nodes of NATS JetStream for the log; 0: SQLite")
    parser.add_argument("--consumers", type=int, default=2)
    parser.add_argument("--pause-s", type=float, default=0.5, help="between two frames of a camera, seconds")
    arguments = parser.parse_args()
    ledger = Ledger(arguments.ledger)
    shape = {name: getattr(arguments, name) for name in SHAPE}
    found = None
    folder = Path(tempfile.mkdtemp(prefix="sightline-chaos-"))
    if len(ledger.lines) < arguments.kills:
        with Progress(console=Console(stderr=True)) as progress:
            found = asyncio.run(
                run(ledger, folder, kills=arguments.kills, minutes=arguments.minutes, shape=shape, progress=progress)
            )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for by in ("kind", "how"):
        console.print(table(ledger, by))
    if found is not None:
        print(f"wrong: {json.dumps({k: sorted(v) for k, v in asdict(found).items()})}; see {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
