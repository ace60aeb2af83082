"""Compress through gRPC: what the service adds to a frame's encoding, and how many frames a second come through.

    sightline bench rpc [--short] [--json]

An edge in a process of its own, with its spool on a disk; cameras in this one, over loopback without TLS. A frame's
overhead is the camera's wait less what the receipt says that image decoding, queueing, transforms and entropy coder
took: gRPC both ways, checks, metrics and, with delivery, the spool's commit with its fsync. Cameras and edge share the
machine's cores. The peer takes the same JPEG over the same gRPC and commits as many bytes to SQLite with the same
durability.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from sightline.v1 import edge_pb2, edge_pb2_grpc

from bench import plain
from bench.pictures import SMALL, VGA, jpeg, picture, size_name
from bench.report import Report, Say, resident_bytes, run
from bench.services import folder_on_disk, started
from bench.timing import sample

QUALITY = 4.0
STAGES = ("image_decode_ms", "queue_ms", "analyse_ms", "pack_ms")


@dataclass(frozen=True, slots=True)
class Sent:
    """One frame, milliseconds: the camera's wait, and of it the spool's and the stages' part."""

    wait_ms: float
    spool_ms: float
    stages_ms: float


def measure(short: bool, say: Say) -> Report:
    frames, cameras = (6, 2) if short else (120, 8)
    overhead_size, rate_size = ((96, 128), (96, 128)) if short else (VGA, SMALL)
    settings = {"quality": QUALITY, "frames": frames, "cameras": cameras, "size": size_name(overhead_size)}
    report = Report("rpc", "Compress through gRPC and the spool", settings)
    files = [jpeg(picture(overhead_size, i)) for i in range(4)]
    with folder_on_disk() as folder:
        say("the peer")
        with plain.echo(folder) as port:
            echo = asyncio.run(_echo(port, files, frames))
        with started("edge", [], folder) as edge:
            for delivery in ("NONE", "SPOOLED"):
                say(f"one camera, {delivery.lower()}")
                _overhead(report, edge.address, files, frames, delivery, echo)
            say("frames a second")
            files = [jpeg(picture(rate_size, i)) for i in range(4)]
            _rate(report, edge.address, files, frames, cameras, size_name(rate_size))
            report.add("the edge's memory, most", resident_bytes(edge.pid, "VmHWM") / 2**20, "MiB")
    return report


def _overhead(
    report: Report, address: str, files: Sequence[bytes], frames: int, delivery: str, echo: list[float]
) -> None:
    sent = asyncio.run(compress(address, files, frames, 1, f"DELIVERY_{delivery}"))
    added = sample([one.wait_ms - one.stages_ms for one in sent])
    spooled = delivery == "SPOOLED"
    report.add(
        f"gRPC and spool, {delivery.lower()}", added, "ms",
        peer=("echo + SQLite", sample(echo)) if spooled else None, at_most=3.0 if spooled else None,
    )  # fmt: skip
    report.add(f"a frame's stages, {delivery.lower()}", sample([one.stages_ms for one in sent]), "ms")
    if spooled:
        report.add("of it the spool", sample([one.spool_ms for one in sent]), "ms")


def _rate(report: Report, address: str, files: Sequence[bytes], frames: int, cameras: int, size: str) -> None:
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        asyncio.run(compress(address, files, frames // 2, cameras, "DELIVERY_SPOOLED"))
        rates.append(frames // 2 / (time.perf_counter() - start))
    name = f"{size} JPEG to SPOOLED, {cameras} cameras"
    report.add(name, sample(rates), "frames/s", more_is_better=True, at_least=30)


async def compress(
    address: str, files: Sequence[bytes], frames: int, cameras: int, delivery: str, quality: float = QUALITY
) -> list[Sent]:
    """`frames` in all; a camera sends its next once it has its receipt. One frame a camera goes before, uncounted."""
    sent: list[Sent] = []
    options = edge_pb2.CompressOptions(quality=quality, delivery=edge_pb2.Delivery.Value(delivery))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)

        async def one(name: str, i: int) -> Sent:
            request = edge_pb2.CompressRequest(camera_id=name, encoded=files[i % len(files)], options=options)
            start = time.perf_counter()
            timings = (await stub.Compress(request)).receipt.timings
            wait_ms = (time.perf_counter() - start) * 1e3
            return Sent(wait_ms, timings.spool_ms, sum(getattr(timings, stage) for stage in STAGES))

        left = iter(range(frames))

        async def camera(name: str) -> None:
            sent.extend([await one(name, i) for i in left])

        names = [f"camera-{i}" for i in range(cameras)]
        await asyncio.gather(*(one(name, 0) for name in names))
        await asyncio.gather(*(camera(name) for name in names))
    return sent


async def _echo(port: int, files: Sequence[bytes], frames: int) -> list[float]:
    waits = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = plain.stub(channel)
        for i in range(frames + 1):
            start = time.perf_counter()
            await call(files[i % len(files)])
            waits.append((time.perf_counter() - start) * 1e3)
    return waits[1:]


def main() -> int:
    return run(__doc__, "rpc", measure)


if __name__ == "__main__":
    raise SystemExit(main())
