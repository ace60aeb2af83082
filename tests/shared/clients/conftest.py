"""A real edge and a real cloud for clients, and one way to call the blocking and the asyncio client.

Servers run in the test's event loop, blocking clients in threads beside it.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from shared.clients import AsyncCameraClient, AsyncDetectionClient, CameraClient, DetectionClient
from tests.cloud.conftest import red, spot, start_cloud
from tests.edge.conftest import running_edge

__all__ = ["red", "running_edge", "spot", "start_cloud"]


class InThread:
    """A blocking client, called in threads: its methods can be awaited, its iterators iterated asynchronously."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name in ("events", "updates", "compress_many"):
            return lambda *args, **kwargs: iterate(method(*args, **kwargs))
        return lambda *args, **kwargs: asyncio.to_thread(method, *args, **kwargs)


async def iterate(iterator: Iterator[Any]) -> AsyncIterator[Any]:
    end = object()
    try:
        while (item := await asyncio.to_thread(next, iterator, end)) is not end:
            yield item
    finally:
        await asyncio.to_thread(iterator.close)  # type: ignore[attr-defined]


class Clients:
    """Makes clients of one kind and closes them."""

    def __init__(self, *, blocking: bool) -> None:
        self._blocking = blocking
        self._made: list[Any] = []

    def camera(self, *args: Any, **kwargs: Any) -> Any:
        return self._make(CameraClient if self._blocking else AsyncCameraClient, args, kwargs)

    def detections(self, *args: Any, **kwargs: Any) -> Any:
        return self._make(DetectionClient if self._blocking else AsyncDetectionClient, args, kwargs)

    def _make(self, cls: Any, args: Any, kwargs: Any) -> Any:
        client = InThread(cls(*args, **kwargs)) if self._blocking else cls(*args, **kwargs)
        self._made.append(client)
        return client

    async def close(self) -> None:
        for client in self._made:
            await client.close()


@pytest.fixture(params=["blocking", "asyncio"])
async def clients(request: pytest.FixtureRequest) -> AsyncIterator[Clients]:
    made = Clients(blocking=request.param == "blocking")
    yield made
    await made.close()


@pytest.fixture(scope="session")
def small_rgb() -> np.ndarray:
    """uint8 [72, 96, 3]: the cat, small enough to code in milliseconds."""
    return np.asarray(Image.fromarray(skimage.data.chelsea()).resize((96, 72)))


@pytest.fixture(scope="session")
def small_jpeg(small_rgb: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(small_rgb).save(out, "JPEG", quality=90)
    return out.getvalue()
