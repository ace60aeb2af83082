"""Power loss: what the spool gave a receipt for is on the disk at every moment, whatever of later writes got there.

A process spools, acknowledges and checkpoints while every write and sync of its files is written down (powercut.c). The
power is then cut at many places of that journal. What the disk holds there: each file as of its last sync, and of the
writes after that any part, in any order, torn at sectors; a file whose folder was not synced since it was made may be
missing. From each such disk the spool must open without help and hold every frame that had its receipt, whole. SIGKILL
alone proves nothing about fsync: the same cuts with fsync taken out must lose frames.
"""

# ruff: noqa: ASYNC221, ASYNC240 - these tests may block

import asyncio
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge.spool import Spool
from edge.spool_file import SpoolFile
from edge.spool_rows import Draft, Entry, Final, Outcome
from shared.errors import SightlineError
from tests.edge.test_spool import LIMITS, draft

SECTOR = 512
FRAMES = 240
CUTS = 120
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs a C compiler to write down what reaches the disk"
)


def frame(number: int) -> Draft:
    """Frame `number`: of all sizes up to some pages, by one of three cameras."""
    size = random.Random(number).choice((300, 3_000, 30_000, 60_000))
    return draft(number, size=size, camera=f"camera-{number % 3}", token=f"token-{number}")


def _without_fsync() -> None:
    """Take fsync out of every spool this process opens from now on."""
    prepare = SpoolFile._prepare

    def prepare_without(self: SpoolFile, path: Path) -> None:
        prepare(self, path)
        self._db.execute("PRAGMA synchronous = OFF")

    SpoolFile._prepare = prepare_without  # type: ignore[method-assign]


async def spool_for_a_while(folder: Path, sync: bool) -> None:
    """In the process that is watched: what was promised is told by writes to a file of the same folder."""
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if not sync:
        _without_fsync()
    spool = Spool(folder / "spool.sqlite", LIMITS)
    rng = random.Random(1)
    waiting: list[tuple[int, int]] = []

    async def put(number: int) -> None:
        placed, _ = await spool.put(frame(number))
        os.write(said, b"receipt %d\n" % number)
        waiting.append((number, placed.id))

    for first in range(0, FRAMES, 4):
        await asyncio.gather(*(put(number) for number in range(first, first + 4)))
        done = [waiting.pop(0) for _ in range(rng.randint(0, 4)) if len(waiting) > 12]
        for number, _ in done:
            os.write(said, b"acknowledged %d\n" % number)
        await spool.finish([Final(id_, Outcome.DETECTIONS, "") for _, id_ in done])


@dataclass(frozen=True, slots=True)
class Step:
    op: str
    path: Path
    offset: int
    data: bytes


@dataclass
class File:
    """What is surely on the disk, and what came since."""

    synced: bytes = b""
    since: list[Step] = field(default_factory=list)
    named: bool = False  # its folder was synced since it was made

    def now(self) -> bytes:
        return applied(self.synced, self.since)

    def after_power_loss(self, rng: random.Random) -> bytes:
        """One of the contents that the disk may have."""
        steps = [step for step in self.since if rng.random() < 0.6]
        if rng.random() < 0.5:
            rng.shuffle(steps)
        return applied(self.synced, [torn(step, rng) for step in steps])


def torn(step: Step, rng: random.Random) -> Step:
    """Perhaps only some of a write's sectors."""
    if step.op != "W" or rng.random() < 0.7 or len(step.data) <= SECTOR:
        return step
    first = rng.randrange(0, len(step.data), SECTOR)
    last = rng.randrange(first, len(step.data), SECTOR) + SECTOR
    return Step("W", step.path, step.offset + first, step.data[first:last])


def applied(content: bytes, steps: list[Step]) -> bytes:
    out = bytearray(content)
    for step in steps:
        if step.op == "T":
            del out[step.offset :]
            out.extend(bytes(step.offset - len(out)))
        else:
            out.extend(bytes(max(0, step.offset - len(out))))
            out[step.offset : step.offset + len(step.data)] = step.data
    return bytes(out)


def read_journal(path: Path) -> Iterator[Step]:
    data = path.read_bytes()
    at = 0
    while at < len(data):
        op, path_length, offset, length = struct.unpack_from("<cHQI", data, at)
        at += struct.calcsize("<cHQI")
        name, payload = data[at : at + path_length], data[at + path_length : at + path_length + length]
        at += path_length + length
        yield Step(op.decode(), Path(name.decode()), offset, payload)


def disks(folder: Path, journal: Path, rng: random.Random) -> Iterator[tuple[dict[str, bytes], set[int]]]:
    """What the disk may hold after cuts at random places, each with the receipts that must be honoured then."""
    steps = list(read_journal(journal))
    cuts = set(rng.sample(range(len(steps) // 50, len(steps)), CUTS))
    files: dict[Path, File] = {}
    promised: set[int] = set()
    for i, step in enumerate(steps):
        if step.path == folder / "said":
            word, number = step.data.split()
            (promised.add if word == b"receipt" else promised.discard)(int(number))
        elif step.path == folder:
            for each in files.values():
                each.named = True
        elif step.op == "U":
            files.pop(step.path, None)
        else:
            file = files.setdefault(step.path, File())
            if step.op == "S":
                file.synced, file.since = file.now(), []
            else:
                file.since.append(step)
        if i in cuts:
            yield (
                {p.name: f.after_power_loss(rng) for p, f in files.items() if f.named or rng.random() < 0.5},
                set(promised),
            )


async def fault_after(disk: dict[str, bytes], promised: set[int], folder: Path) -> str:
    """What is wrong with the spool that opens from a disk, "" if nothing is."""
    folder.mkdir()
    for name, content in disk.items():
        (folder / name).write_bytes(content)
    try:
        spool = Spool(folder / "spool.sqlite", LIMITS)
        try:
            entries = await spool.take(0, frames=FRAMES, max_bytes=1 << 40)
        finally:
            await spool.close()
    except (SightlineError, sqlite3.Error) as error:
        return f"it did not open: {error}"
    if any("damaged" in path.name for path in folder.iterdir()):
        return "it had to be salvaged"
    found = {int(entry.token.removeprefix("token-")): entry for entry in entries}
    half = [number for number, entry in found.items() if not whole(entry, frame(number))]
    missing = sorted(promised - found.keys())
    return f"{half} were not whole" if half else f"{missing} had a receipt and are gone" if missing else ""


def whole(entry: Entry, put: Draft) -> bool:
    return entry.bitstream == put.bitstream and (entry.name.camera_id, entry.captured_us) == (
        put.camera_id,
        put.captured_us,
    )


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("powercut") / "powercut.so"
    source = Path(__file__).with_name("powercut.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    return library


async def faults(watcher: Path, folder: Path, *, sync: bool, enough: int = CUTS) -> tuple[list[str], int]:
    """What went wrong over all cuts, until it was enough, and how many receipts there were to honour in all of them."""
    watched, journal = folder / "watched", folder / "journal"
    watched.mkdir()
    code = (
        "import asyncio, sys; from pathlib import Path; from tests.edge.test_power_loss import spool_for_a_while\n"
        f"asyncio.run(spool_for_a_while(Path({str(watched)!r}), {sync}))"
    )
    environment = os.environ | {
        "LD_PRELOAD": str(watcher),
        "POWERCUT_FOLDER": str(watched),
        "POWERCUT_JOURNAL": str(journal),
    }
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root)
    rng = random.Random(7)
    found, honoured = [], 0
    for i, (disk, promised) in enumerate(disks(watched, journal, rng)):
        honoured += len(promised)
        if fault := await fault_after(disk, promised, folder / str(i)):
            found.append(f"cut {i}: {fault}")
        shutil.rmtree(folder / str(i))
        if len(found) >= enough:
            break
    return found, honoured


async def test_every_receipt_is_honoured_after_power_loss_at_any_moment(watcher: Path, tmp_path: Path) -> None:
    found, honoured = await faults(watcher, tmp_path, sync=True)
    assert not found
    assert honoured > 10 * CUTS, "too few receipts for the test to mean anything"


async def test_with_fsync_taken_out_the_same_cuts_lose_frames(watcher: Path, tmp_path: Path) -> None:
    found, _ = await faults(watcher, tmp_path, sync=False, enough=10)
    assert len(found) == 10
