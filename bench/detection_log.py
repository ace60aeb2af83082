"""The detection log's backends beside each other: `python -m bench.detection_log --backend sqlite jetstream cluster`.

For each backend and number of cameras: appends a second and their latency (a camera waits for one append before the
next, as a stream of frames in order would), then how fast a consumer that begins at the beginning reads. `cluster` is
three NATS servers on loopback with three copies. Every append is durable when it returns, on every backend. For NATS,
the servers' memory per name that they remember is given too, since names are kept for days.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.broker import Broker
from cloud.detections.broker import BrokerOptions
from cloud.detections.jetstream import JetStreamLog
from cloud.detections.log import DetectionLog, FrameName, Retention
from cloud.detections.sqlite import SqliteLog

BACKENDS = {"sqlite": 0, "jetstream": 1, "cluster": 3}  # and how many brokers it takes
KEEP_ALL = Retention(max_age_s=86_400, max_bytes=4 << 30, key_age_s=2 * 86_400)
HERE = Path.cwd()
_READ = 256


@dataclass(frozen=True, slots=True)
class Measured:
    """One row. Rates a second, latencies in ms; `broker_bytes_a_name` is None without a broker."""

    backend: str
    cameras: int
    appends_s: float
    p50_ms: float
    p99_ms: float
    reads_s: float
    broker_bytes_a_name: float | None


def resident_bytes(broker: Broker) -> int:
    """Memory that the broker's first server holds."""
    process = broker.nodes[0].process
    if process is None:
        raise RuntimeError("the broker does not run")
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@asynccontextmanager
async def opened(backend: str, folder: Path, broker: Broker | None) -> AsyncIterator[DetectionLog]:
    log: DetectionLog
    if broker is None:
        log = await SqliteLog.open(folder / "log.sqlite", KEEP_ALL)
    else:
        servers, pages = (tuple(addresses.split(",")) for addresses in (broker.servers, broker.monitoring))
        log = await JetStreamLog.open(BrokerOptions(servers, replicas=len(broker.nodes), monitoring=pages), KEEP_ALL)
    try:
        yield log
    finally:
        await log.close()


async def measure(backend: str, cameras: int, appends: int, event: bytes, progress: Progress) -> Measured:
    """Runs one backend from an empty store."""
    task = progress.add_task(f"{backend}, {cameras} cameras", total=appends)
    nodes = BACKENDS[backend]
    with tempfile.TemporaryDirectory(prefix="sightline-log-", dir=HERE) as name:  # a disk, as /tmp need not be
        folder = Path(name)
        broker = Broker(folder, nodes) if nodes else None
        if broker is not None:
            broker.start()
        try:
            async with opened(backend, folder, broker) as log:
                await log.append(FrameName("warm-up", 1, 0), event)
                memory = resident_bytes(broker) if broker else 0
                latencies: list[float] = []

                async def camera(label: str) -> None:
                    for seq in range(appends // cameras):
                        start = time.perf_counter()
                        await log.append(FrameName(label, 1, seq), event)
                        latencies.append(time.perf_counter() - start)
                        progress.advance(task)

                start = time.perf_counter()
                await asyncio.gather(*(camera(f"camera-{i}") for i in range(cameras)))
                appending_s = time.perf_counter() - start
                grown = resident_bytes(broker) - memory if broker else None
            async with opened(backend, folder, broker) as log:  # one that has nothing in memory
                start, position = time.perf_counter(), 0
                while records := await log.read(position, _READ):
                    position = records[-1].sequence
                reading_s = time.perf_counter() - start
        finally:
            if broker is not None:
                broker.stop()
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    count = len(latencies)
    return Measured(
        backend, cameras, count / appending_s, p50, p99, count / reading_s, None if grown is None else grown / count
    )


def table(rows: list[Measured], event_bytes: int) -> Table:
    shown = Table(title=f"detection log, events of {event_bytes} bytes")
    for column in ("backend", "cameras", "appends/s", "p50 ms", "p99 ms", "reads/s", "broker bytes/name"):
        shown.add_column(column, justify="left" if column == "backend" else "right")
    for row in rows:
        memory = "-" if row.broker_bytes_a_name is None else f"{row.broker_bytes_a_name:,.0f}"
        shown.add_row(
            row.backend, str(row.cameras), f"{row.appends_s:,.0f}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}",
            f"{row.reads_s:,.0f}", memory,
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--cameras", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--appends", type=int, default=5000, help="appends of one measurement")
    parser.add_argument("--event-bytes", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    event = np.random.default_rng(0).bytes(arguments.event_bytes)
    console = Console()
    with Progress(console=console) as progress:
        rows = [
            asyncio.run(measure(backend, cameras, arguments.appends, event, progress))
            for backend in arguments.backend
            for cameras in arguments.cameras
        ]
    console.print(table(rows, arguments.event_bytes))
    if arguments.json:
        fields = Measured.__dataclass_fields__
        arguments.json.write_text(json.dumps([{name: getattr(row, name) for name in fields} for row in rows], indent=2))


if __name__ == "__main__":
    main()
