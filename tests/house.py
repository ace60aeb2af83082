"""A true edge and a true cloud in this process, on free ports, with whatever is put between them."""

# ruff: noqa: ASYNC110 - the spool tells nobody when it is empty

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from sightline.v1 import edge_pb2, edge_pb2_grpc

from edge.server import Edge
from edge.settings import EdgeSettings
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.rpc.tls import open_channel
from tests.cloud.harness import BrightSpot, RunningCloud, settings


@asynccontextmanager
async def house(
    folder: Path,
    codec: Codec,
    *,
    between: Callable[[int], Awaitable[int]] | None = None,
    edge_flags: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[Edge, RunningCloud]]:
    """Both running. `between` gets the cloud's port and gives the one that the edge shall call instead."""
    cloud = await RunningCloud(settings(folder / "cloud", admin_listen="127.0.0.1:0"), [codec], BrightSpot()).start()
    port = await between(cloud.server.port) if between else cloud.server.port
    given = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "",
        "admin_listen": "127.0.0.1:0",
        "edge_id": "north",
        "cloud": f"127.0.0.1:{port}",
        "data_dir": folder / "edge",
        "uplink_backoff_max_s": 0.3,
    }
    edge = await Edge.start(EdgeSettings.load(**(given | (edge_flags or {}))))
    try:
        yield edge, cloud
    finally:
        await edge.close()
        await cloud.stop()


async def send(
    edge: Edge, frame: Frame, delivery: int, *, camera: str = "gate", token: str = "", max_age_s: float = 0
) -> edge_pb2.Receipt:
    """One picture as a camera sends it."""
    out = io.BytesIO()
    Image.fromarray(frame.rgb).save(out, "PNG")
    options = edge_pb2.CompressOptions(quality=8, delivery=edge_pb2.Delivery.ValueType(delivery))
    if max_age_s:
        options.max_age.FromNanoseconds(int(max_age_s * 1e9))
    request = edge_pb2.CompressRequest(
        camera_id=camera, encoded=out.getvalue(), options=options, idempotency_token=token
    )
    async with open_channel(f"127.0.0.1:{edge.server.port}", None, max_message_bytes=1 << 20) as channel:
        return (await edge_pb2_grpc.EdgeServiceStub(channel).Compress(request, timeout=120)).receipt


async def until_empty(edge: Edge, limit_s: float = 120) -> None:
    """Returns once every spooled frame has its final acknowledgement on the edge's disk."""
    async with asyncio.timeout(limit_s):
        while await edge.spool.take(0, frames=1, max_bytes=1):
            await asyncio.sleep(0.05)
