"""A running edge for tests: the real process parts in this event loop, on free ports and a temporary spool."""

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import skimage.data
from PIL import Image
from sightline.v1 import edge_pb2_grpc

from edge.server import Edge
from edge.settings import EdgeSettings
from shared.rpc.tls import open_channel

RunningEdge = Callable[..., AbstractAsyncContextManager[tuple[Edge, Any]]]


@pytest.fixture
def running_edge(tmp_path: Path) -> RunningEdge:
    """`async with running_edge(**settings) as (edge, stub)`; the spool outlives it within one test."""

    @asynccontextmanager
    async def run(**flags: Any) -> AsyncIterator[tuple[Edge, Any]]:
        given = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "data_dir": tmp_path / "edge", "drain_s": 5}
        edge = await Edge.start(EdgeSettings.load(**{**given, **flags}))
        channel: grpc.aio.Channel = open_channel(f"127.0.0.1:{edge.server.port}", None, max_message_bytes=64 << 20)
        try:
            yield edge, edge_pb2_grpc.EdgeServiceStub(channel)
        finally:
            await channel.close()
            await edge.close()

    return run


@pytest.fixture(scope="session")
def small_rgb() -> np.ndarray:
    """uint8 [72, 96, 3]: the cat, small enough to code in milliseconds."""
    return np.asarray(Image.fromarray(skimage.data.chelsea()).resize((96, 72)))


@pytest.fixture(scope="session")
def small_jpeg(small_rgb: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(small_rgb).save(out, "JPEG", quality=90)
    return out.getvalue()
