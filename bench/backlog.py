"""A day of backlog drained in order, with memory flat: `python -m bench.backlog --hours 24`.

A true edge spools what cameras send for so many simulated hours while no cloud is there: one frame a camera and
interval, by a clock that the bench moves and that ends at the present. Then a true cloud starts and it drains. Both are
processes of their own. Reported: frames and bytes of the backlog, seconds to fill and to drain it, order of the records
by camera, and the RSS of both over the whole time, also as a plot (SVG).
"""

# ruff: noqa: ASYNC110 - a file is what the cloud tells its readiness by

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import Progress
from sightline.v1 import common_pb2, detection_pb2_grpc, edge_pb2_grpc

from bench.chaos_house import free_address
from bench.chaos_parts import frame_request, name_of, subscription

SAMPLE_S = 0.5


def serve_edge(told: Connection, folder: Path, cloud: str) -> None:
    """The edge, by a clock that is set by the bench."""
    from edge.server import Edge
    from edge.settings import EdgeSettings

    began_ns, ahead_ns = time.time_ns, 0
    time.time_ns = lambda: began_ns() + ahead_ns

    async def serve() -> None:
        nonlocal ahead_ns
        settings = EdgeSettings.load(
            listen="127.0.0.1:0", metrics_listen="", data_dir=folder / "edge", cloud=cloud, threads=1,
            uplink_backoff_max_s=1, log_level="error", workers=1,
        )  # fmt: skip
        edge = await Edge.start(settings)
        told.send(edge.server.port)
        while (seconds := await asyncio.to_thread(told.recv)) is not None:
            ahead_ns = int(seconds * 1e9)
        await edge.close()

    asyncio.run(serve())


def serve_cloud(told: Connection, folder: Path, address: str, tasks: str) -> None:
    """The cloud, as `sightline cloud` runs it."""
    from cloud.server import serve
    from cloud.settings import CloudSettings

    settings = CloudSettings.load(
        listen=address, metrics_listen="", data_dir=folder / "cloud", threads=1, unpack_threads=1, log_level="error",
        ready_file=folder / "ready", **({"tasks": tasks} if tasks else {}),
    )  # fmt: skip
    asyncio.run(serve(settings))


@dataclass
class Memory:
    """RSS over time, of processes by name: (seconds since the start, bytes)."""

    began: float = field(default_factory=time.monotonic)
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    async def watch(self, pids: dict[str, int]) -> None:
        while True:
            for name, pid in pids.items():
                self.samples[name].append((time.monotonic() - self.began, _rss_bytes(pid)))
            await asyncio.sleep(SAMPLE_S)

    def growth_bytes(self, name: str, after_s: float) -> int:
        """How much more than at `after_s` it ever was."""
        later = [size for at, size in self.samples[name] if at >= after_s]
        return max(later) - later[0] if later else 0

    def plot(self, path: Path, drains_s: float) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, samples in self.samples.items():
            axes.plot([at for at, _ in samples], [size / 2**20 for _, size in samples], label=name)
        axes.axvline(drains_s, color="grey", linestyle=":", label="the cloud is there")
        axes.set(xlabel="seconds", ylabel="RSS, MiB", ylim=(0, None))
        axes.legend()
        figure.savefig(path)


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


async def fill(port: int, clock: Connection, *, hours: float, interval_s: float, cameras: int, bar: Any) -> set[Any]:
    """Spools a frame of each camera at each interval of the simulated time. Returns the receipts' names."""
    names = set()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)
        for tick in range(round(hours * 3600 / interval_s)):
            clock.send(tick * interval_s - hours * 3600)
            calls = [stub.Compress(frame_request(f"camera-{camera}", tick + 1)) for camera in range(cameras)]
            for call in calls:
                receipt = (await call).receipt
                names.add(name_of(receipt.frame))
            bar(len(names))
    return names


async def drain(address: str, names: set[Any], bar: Any) -> tuple[int, int]:
    """Reads the log until every name was there. Returns how many came twice, and how many out of a camera's order."""
    missing, doubled, disorder = set(names), 0, 0
    last: dict[Any, int] = {}
    log_id, sequence = "", 0
    while missing:
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                async for answer in detection_pb2_grpc.DetectionServiceStub(channel).Subscribe(
                    subscription(log_id, sequence)
                ):
                    if answer.WhichOneof("message") != "event":
                        continue
                    event = answer.event
                    log_id, sequence = event.cursor.log_id, event.cursor.sequence
                    if event.outcome != common_pb2.OUTCOME_DETECTIONS:
                        raise RuntimeError(f"a frame ended otherwise: {event}")
                    name = name_of(event.frame)
                    doubled += name not in missing
                    missing.discard(name)
                    disorder += name[2] < last.get(name[:2], 0)
                    last[name[:2]] = max(name[2], last.get(name[:2], 0))
                    bar(len(names) - len(missing))
                    if not missing:
                        break
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
        await asyncio.sleep(0.2)
    return doubled, disorder


async def run(
    folder: Path, *, hours: float, interval_s: float, cameras: int, tasks: str = "", plot: Path | None
) -> dict[str, Any]:
    """The whole story in `folder`. Returns its figures."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["edge.server", "cloud.server"])
    address = free_address()
    ours, theirs = forked.Pipe()
    memory = Memory()
    edge = forked.Process(target=serve_edge, args=(theirs, folder, address), daemon=True)
    cloud = forked.Process(target=serve_cloud, args=(theirs, folder, address, tasks), daemon=True)
    edge.start()
    port = await asyncio.to_thread(ours.recv)
    pids = {"edge": edge.pid or 0}
    watching = asyncio.create_task(memory.watch(pids))
    total = round(hours * 3600 / interval_s) * cameras
    try:
        with Progress(console=Console(stderr=True)) as progress:
            filling, draining = progress.add_task("fill", total=total), progress.add_task("drain", total=total)
            began = time.monotonic()
            names = await fill(
                port, ours, hours=hours, interval_s=interval_s, cameras=cameras,
                bar=lambda done: progress.update(filling, completed=done),
            )  # fmt: skip
            filled = time.monotonic()
            spool_bytes = sum(path.stat().st_size for path in (folder / "edge").glob("spool.sqlite*"))
            cloud.start()
            pids["cloud"] = cloud.pid or 0
            while not (folder / "ready").exists():
                await asyncio.sleep(0.1)
            ready = time.monotonic()
            doubled, disorder = await drain(address, names, lambda done: progress.update(draining, completed=done))
            drained = time.monotonic()
    finally:
        watching.cancel()
        for process in (edge, cloud):
            if process.pid is not None:
                process.kill()
    if plot is not None:
        memory.plot(plot, ready - memory.began)
    return {
        "hours": hours,
        "frames": len(names),
        "spool_bytes": spool_bytes,
        "fill_s": filled - began,
        "drain_s": drained - ready,
        "doubled": doubled,
        "out_of_order": disorder,
        "edge_growth_bytes": memory.growth_bytes("edge", began - memory.began + (filled - began) / 10),
        "cloud_growth_bytes": memory.growth_bytes("cloud", ready - memory.began + (drained - ready) / 10),
        "edge_rss_bytes": max(size for _, size in memory.samples["edge"]),
        "cloud_rss_bytes": max(size for _, size in memory.samples["cloud"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument(
        "--interval-s", type=float, default=60, help="between two frames of a camera, simulated seconds"
    )
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--tasks", default="", help="as the cloud's setting; a light ONNX detector drains sooner")
    parser.add_argument("--plot", type=Path, help="SVG file of both processes' RSS")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("hours", "interval_s", "cameras", "tasks")}
    with tempfile.TemporaryDirectory(prefix="sightline-backlog-", dir="/var/tmp") as folder:
        found = asyncio.run(run(Path(folder), **shape, plot=arguments.plot))
    json.dump(found, sys.stdout, indent=2)
    print()
    return 1 if found["doubled"] or found["out_of_order"] else 0


if __name__ == "__main__":
    sys.exit(main())
