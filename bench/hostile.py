"""Hostile inputs and floods against a running edge and cloud: `python -m bench.hostile --inputs 1000000`.

Both services run as their own processes with mTLS, a policy and the defaults of an exposed port. Inputs go into the
parsers (in this process) and over the wire; floods of strangers come between. All the while a good client in a process
of its own sends a picture every 200 ms and waits until the cloud has its result: it must be answered each time. Each
input must end in a typed error or in a harmless answer; anything else ends the run with exit code 1.

`--ledger FILE` adds this run's counts to those of earlier ones, so that a million can be reached in several sittings.
`--plot FILE` draws both services' memory over the last run.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import hostile_wire as wire
from bench.hostile_good import GoodClient
from bench.hostile_parsers import scene_jpeg, targets
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import Unavailable
from shared.rpc import certificates
from shared.rpc.certificates import Names, Pair

EDGE, CONSUMER, GOOD = (f"spiffe://example.org/{name}" for name in ("hostile", "consumer", "good"))
POLICY = f"""
[[grant]]
identity = "{EDGE}"
send = ["gate-*"]
[[grant]]
identity = "{CONSUMER}"
subscribe = ["gate-*", "good"]
[[grant]]
identity = "{GOOD}"
send = ["good"]
"""
READY_S = 300.0
SAMPLE_S = 0.5
WIRE_SHARE = 0.05
HANDSHAKE_S = 10.0


@dataclass
class Report:
    """What one run found. `memory`: [seconds, edge MiB, cloud MiB]."""

    inputs: Counter[str] = field(default_factory=Counter)
    floods: dict[str, Any] = field(default_factory=dict)
    good_ms: list[float] = field(default_factory=list)
    good_failures: list[str] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        good = sorted(self.good_ms) or [0.0]
        edge, cloud = ([row[i] for row in self.memory] or [0.0] for i in (1, 2))
        return {
            "inputs": self.inputs.total(),
            "outcomes": dict(sorted(self.inputs.items())),
            "floods": self.floods,
            "good_client": {
                "answered": len(self.good_ms),
                "failed": self.good_failures,
                "p50_ms": round(good[len(good) // 2], 1),
                "p99_ms": round(good[int(len(good) * 0.99)], 1),
                "longest_ms": round(good[-1], 1),
            },
            "memory_mib": {
                "edge": {"start": round(edge[0], 1), "most": round(max(edge), 1), "end": round(edge[-1], 1)},
                "parsers": {"most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10},
                "cloud": {"start": round(cloud[0], 1), "most": round(max(cloud), 1), "end": round(cloud[-1], 1)},
            },
            "faults": self.faults,
        }


class House:
    """An authority, a policy, and both services as processes under them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = certificates.authority("hostile bench", 1)
        (folder / "ca.pem").write_bytes(self.ca.certificate)
        (folder / "policy.toml").write_text(POLICY)
        self._pair("server", Names("server", uri=[EDGE], dns=["localhost"], ip=["127.0.0.1"]))
        self._pair("uplink", Names("uplink", uri=["spiffe://example.org/uplink"]))
        with (folder / "policy.toml").open("a") as policy:
            policy.write('[[grant]]\nidentity = "spiffe://example.org/uplink"\nsend = ["*"]\n')
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    def _pair(self, file: str, names: Names) -> Pair:
        pair = certificates.issue(self.ca, names, 1)
        certificates.write(pair, self.folder / f"{file}.pem", self.folder / f"{file}.key")
        return pair

    def credentials(self, identity: str | None) -> grpc.ChannelCredentials:
        own = certificates.issue(self.ca, Names("client", uri=[identity]), 1) if identity else None
        return grpc.ssl_channel_credentials(
            self.ca.certificate, own.key if own else None, own.certificate if own else None
        )

    def open(self, service: str, identity: str | None) -> Callable[[], grpc.aio.Channel]:
        return wire.opener(self.ports[service], self.credentials(identity))

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._start("cloud")
            uplink = ("--cloud", f"localhost:{self.ports['cloud']}", "--cloud-ca", str(self.folder / "ca.pem"))
            own = (str(self.folder / "uplink.pem"), str(self.folder / "uplink.key"))
            self._start("edge", *uplink, "--cloud-certificate", own[0], "--cloud-key", own[1])
            yield
        finally:
            for process in self.processes.values():
                process.send_signal(signal.SIGTERM)
            for process in self.processes.values():
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _start(self, name: str, *more: str) -> None:
        ready = self.folder / f"{name}.ready"
        at = str(self.folder)
        command = [
            *(sys.executable, "-m", "cli.main", name, "--listen", "127.0.0.1:0", "--metrics-listen", ""),
            *("--data-dir", f"{at}/{name}", "--ready-file", str(ready), "--log-level", "error", "--threads", "1"),
            *("--tls-certificate", f"{at}/server.pem", "--tls-key", f"{at}/server.key"),
            *("--tls-client-ca", f"{at}/ca.pem", "--policy", f"{at}/policy.toml", *more),
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
            )
        deadline = time.monotonic() + READY_S
        while not ready.exists():
            self.check()
            if time.monotonic() > deadline:
                raise Unavailable(f"the {name} was not ready after {READY_S:g} s")
            time.sleep(0.1)
        self.ports[name] = json.loads(ready.read_text())["port"]

    def check(self) -> None:
        """Raises Unavailable with the end of its log if a service has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise Unavailable(f"the {name} ended with {process.returncode}: {log}")

    def resident_mib(self, name: str) -> float:
        pages = int(Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def main(arguments: list[str] | None = None) -> int:
    """Runs it and prints the summary as JSON; exit code 1 if anything went wrong that must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many in all, parsers and wire")
    parser.add_argument("--wire-share", type=float, default=WIRE_SHARE, help="part of them that goes over the wire")
    parser.add_argument("--minutes", type=float, default=60.0, help="inputs end after this long, however many they are")
    parser.add_argument("--connections", type=int, default=10_000, help="silent connections of the flood")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="JSON file to which the counts are added")
    parser.add_argument("--plot", type=Path, help="file for the plot of memory")
    parser.add_argument("--parsers-only", action="store_true", help="no services, nothing over the wire, no floods")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    report = Report()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        if given.parsers_only:
            until_s = time.monotonic() + given.minutes * 60
            with _progress() as progress:
                bar = progress.add_task("hostile inputs", total=given.inputs)
                _parse(Path(name), report, given.seed, given.inputs, until_s, lambda n: progress.advance(bar, n))
        else:
            house = House(Path(name))
            with house.running():
                asyncio.run(besiege(house, report, given))
    summary = report.summary()
    if given.ledger is not None:
        summary["all_runs"] = add_to(given.ledger, summary, given.seed)
    if given.plot is not None:
        plot(report, given.plot)
    print(json.dumps(summary, indent=2))
    answered = bool(report.good_ms) or given.parsers_only
    return 1 if report.faults or report.good_failures or not answered else 0


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


async def besiege(house: House, report: Report, given: argparse.Namespace) -> None:
    """Everything at once on a good client: parsers and wire side by side, and then the floods."""
    sampling = asyncio.create_task(_sample(house, report))
    good = GoodClient(house.ports["edge"], house.ca, GOOD, scene_jpeg())
    try:
        with good.asking(), _progress() as progress:
            until_s = time.monotonic() + given.minutes * 60
            over_wire = round(given.inputs * given.wire_share)
            bar = progress.add_task("hostile inputs", total=given.inputs)
            codec = await asyncio.to_thread(Codec.load, "detection")
            coded = await asyncio.to_thread(codec.encode, Frame(np.full((32, 48, 3), 90, np.uint8)), 2)
            attack = wire.Attack(house.open("edge", EDGE), house.open("cloud", EDGE), scene_jpeg(), coded)
            consumer = wire.Attack(house.open("edge", EDGE), house.open("cloud", CONSUMER), scene_jpeg(), coded)
            seed = given.seed * 10**9

            def advance(count: int) -> None:
                progress.advance(bar, count)

            await asyncio.gather(
                asyncio.to_thread(_parse, house.folder, report, given.seed, given.inputs - over_wire, until_s, advance),
                attack.run(over_wire, seed, advance, until_s=until_s),
                consumer.run(over_wire // 20, seed + 5 * 10**8, advance, lanes=1, until_s=until_s),
            )
            for side in (attack, consumer):
                report.inputs.update(side.outcomes)
                report.faults += side.faults
            await _flood(house, report, given.connections, progress)
        report.good_ms, report.good_failures = good.milliseconds, good.failures
        house.check()
    finally:
        sampling.cancel()


def _parse(folder: Path, report: Report, seed: int, count: int, until_s: float, advance: Callable[[int], None]) -> None:
    """Inputs into the parsers, in this process: each target in turn, a hundredth of its share at a time."""
    rng = np.random.default_rng(seed)
    found = targets(Codec.load("detection"), folder)
    rounds = 100
    for _ in range(rounds):
        for name, target in found.items():
            share = max(1, round(count * target.share / rounds))
            for _ in range(share):
                try:
                    report.inputs[f"{name}: {target.attempt(rng)}"] += 1
                except Exception as error:
                    report.faults.append(f"{name}, seed {seed}: {error!r}")
            advance(share)
        if time.monotonic() > until_s:
            return


async def _flood(house: House, report: Report, count: int, progress: Progress) -> None:
    """What strangers do who have no certificate, and what a caller with one can hold open."""
    bar = progress.add_task("floods", total=5)
    edge = house.ports["edge"]
    async with wire.connections(edge, count) as opened:
        report.floods["silent_connections"] = len(opened)
        await asyncio.sleep(3)  # the good client asks meanwhile
    progress.advance(bar)
    tried = 300
    closed = await wire.slow_loris(edge, tried, HANDSHAKE_S * 3)
    report.floods["slow_loris"] = {"tried": tried, "closed_by_the_server": closed}
    if closed < tried:
        report.faults.append(f"{tried - closed} of {tried} slow connections were still open after {HANDSHAKE_S * 3} s")
    progress.advance(bar)
    statuses = Counter(
        [await wire.giant_metadata(house.open("edge", EDGE), size) for size in (40_000, 200_000, 1 << 20, 8 << 20)]
    )
    report.floods["giant_metadata"] = dict(statuses)
    if set(statuses) - {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"}:
        report.faults.append(f"giant metadata ended in {dict(statuses)}")
    progress.advance(bar)
    await wire.rapid_reset(house.open("edge", EDGE), 5000)
    report.floods["rapid_resets"] = 5000
    progress.advance(bar)
    deaf = await wire.deaf_consumers(house.open("cloud", CONSUMER), 64)
    await asyncio.sleep(3)
    for channel in deaf:
        await channel.close()
    report.floods["deaf_consumers"] = len(deaf)
    progress.advance(bar)


async def _sample(house: House, report: Report) -> None:
    start = time.monotonic()
    while True:
        resident = (house.resident_mib("edge"), house.resident_mib("cloud"))
        report.memory.append((time.monotonic() - start, *resident))
        await asyncio.sleep(SAMPLE_S)


def add_to(ledger: Path, summary: dict[str, Any], seed: int) -> dict[str, Any]:
    """All runs of a ledger together. A seed that is there already counts once: its inputs would be the same."""
    runs: dict[str, Any] = json.loads(ledger.read_text()) if ledger.exists() else {}
    runs[str(seed)] = summary
    ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger.write_text(json.dumps(runs, indent=1))
    good = [run["good_client"] for run in runs.values()]
    memory = [run["memory_mib"] for run in runs.values()]
    return {
        "runs": len(runs),
        "inputs": sum(run["inputs"] for run in runs.values()),
        "faults": sum(len(run["faults"]) for run in runs.values()),
        "good_answered": sum(each["answered"] for each in good),
        "good_failed": sum(len(each["failed"]) for each in good),
        "edge_most_mib": max(each["edge"]["most"] for each in memory),
        "parsers_most_mib": max(each["parsers"]["most"] for each in memory),
        "cloud_most_mib": max(each["cloud"]["most"] for each in memory),
    }


def plot(report: Report, path: Path) -> None:
    """Both services' resident memory over the run."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    seconds, edge, cloud = zip(*report.memory, strict=True)
    axes.plot(seconds, edge, label="edge")
    axes.plot(seconds, cloud, label="cloud")
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
