"""What durable delivery costs at the edge, a frame: `python -m bench.delivery --frames N`.

A true edge (gRPC, encoder, spool, uplink) and a cloud that acknowledges at once, in two processes on one machine. The
same small frame is sent N times by as many cameras as asked for, each waiting for its receipt, under:

    none           Compress without delivery: the encoder and gRPC alone
    spooled        SPOOLED receipts while the uplink sends, commits grouped as the spool does it
    spooled alone  the same with one frame a commit: what each fsync costs when it is not shared
    persisted      receipts that wait for the cloud's acknowledgement

Reported: the camera's wait and, out of the receipt, what spool and delivery took of it, p50 and p99 in milliseconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sightline.v1 import common_pb2, edge_pb2, edge_pb2_grpc, ingest_pb2, ingest_pb2_grpc

MODES = ("none", "spooled", "spooled alone", "persisted")
CREDIT_FRAMES = 64
DELIVERIES = {
    "none": edge_pb2.DELIVERY_NONE,
    "spooled": edge_pb2.DELIVERY_SPOOLED,
    "spooled alone": edge_pb2.DELIVERY_SPOOLED,
    "persisted": edge_pb2.DELIVERY_PERSISTED,
}


class WillingCloud(ingest_pb2_grpc.IngestServiceServicer):
    """Takes every frame and says PERSISTED: what is measured is the edge."""

    async def Upload(self, request_iterator: Any, context: Any) -> AsyncIterator[ingest_pb2.UploadResponse]:
        hello = (await anext(request_iterator)).hello
        models = [model.model_id for model in hello.models]
        yield ingest_pb2.UploadResponse(welcome=ingest_pb2.Welcome(protocol_version=1, cloud_id="b", model_ids=models))
        yield credit(CREDIT_FRAMES)
        async for request in request_iterator:
            if request.WhichOneof("message") == "frame":
                ack = ingest_pb2.FrameAck(
                    source_index=request.frame.source_index,
                    seq=request.frame.seq,
                    state=ingest_pb2.ACK_STATE_PERSISTED,
                    outcome=common_pb2.OUTCOME_DETECTIONS,
                )
                yield ingest_pb2.UploadResponse(acks=ingest_pb2.Acks(acks=[ack]))
                yield credit(1)


def credit(frames: int) -> ingest_pb2.UploadResponse:
    return ingest_pb2.UploadResponse(credit=ingest_pb2.CreditGrant(frames=frames, bytes=frames << 20))


def serve_both(told: Connection, folder: Path, alone: bool) -> None:
    """In a process of its own: the cloud, and an edge that sends to it."""

    async def serve() -> None:
        from edge import spool
        from edge.server import Edge
        from edge.settings import EdgeSettings

        if alone:
            spool.GROUP_OPERATIONS = 1
        cloud = grpc.aio.server()
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(WillingCloud(), cloud)
        port = cloud.add_insecure_port("127.0.0.1:0")
        await cloud.start()
        edge = await Edge.start(
            EdgeSettings.load(
                listen="127.0.0.1:0", metrics_listen="", data_dir=folder, cloud=f"127.0.0.1:{port}", threads=1
            )
        )
        told.send(edge.server.port)
        await asyncio.to_thread(told.recv)
        await edge.close()
        await cloud.stop(0)

    asyncio.run(serve())


async def measure(port: int, delivery: int, side: int, frames: int, cameras: int) -> dict[str, list[float]]:
    """Milliseconds of each frame: `wait` as the camera sees it, `spool` and `deliver` as the receipt says."""
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes()
    took: dict[str, list[float]] = {"wait": [], "spool": [], "deliver": []}
    left = iter(range(frames))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)

        async def camera(name: str) -> None:
            request = edge_pb2.CompressRequest(
                camera_id=name,
                raw=edge_pb2.RawImage(pixel_format=edge_pb2.PIXEL_FORMAT_RGB24, width=side, height=side, data=picture),
                options=edge_pb2.CompressOptions(delivery=edge_pb2.Delivery.ValueType(delivery)),
            )
            for _ in left:
                start = time.perf_counter()
                receipt = (await stub.Compress(request)).receipt
                took["wait"].append((time.perf_counter() - start) * 1e3)
                took["spool"].append(receipt.timings.spool_ms)
                took["deliver"].append(receipt.timings.deliver_ms)

        await asyncio.gather(*(camera(f"camera-{i}") for i in range(cameras)))
    return took


def run(frames: int, cameras: int, side: int) -> list[dict[str, Any]]:
    """One row a mode: p50 and p99 of each figure, and frames a second."""
    rows = []
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["edge.server"])
    with Progress(console=Console(stderr=True)) as progress:
        for mode in progress.track(MODES, description="modes"):
            ours, theirs = forked.Pipe()
            with tempfile.TemporaryDirectory(prefix="sightline-delivery-", dir="/var/tmp") as folder:
                server = forked.Process(
                    target=serve_both, args=(theirs, Path(folder), mode == "spooled alone"), daemon=True
                )
                server.start()
                port = ours.recv()
                asyncio.run(measure(port, DELIVERIES[mode], side, cameras * 4, cameras))  # warm
                began = time.perf_counter()
                took = asyncio.run(measure(port, DELIVERIES[mode], side, frames, cameras))
                seconds = time.perf_counter() - began
                ours.send("end")
                server.join(60)
            row: dict[str, Any] = {"mode": mode, "frames_s": frames / seconds}
            for name, values in took.items():
                row |= {f"{name}_p{q}_ms": float(np.percentile(values, q)) for q in (50, 99)}
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--side", type=int, default=64, help="of the square picture, pixels")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {cameras: run(arguments.frames, cameras, arguments.side) for cameras in arguments.cameras}
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for cameras, rows in found.items():
        grid = Table(title=f"{cameras} cameras, {arguments.side}x{arguments.side}, {arguments.frames} frames; ms")
        for column in rows[0]:
            grid.add_column(column, justify="right")
        for row in rows:
            grid.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
        console.print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
