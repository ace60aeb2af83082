"""The camera side: pictures to an edge, receipts back, with retries that make no second frame.

A picture that is to be spooled carries an idempotency token, drawn here unless the caller gives one; so a call whose
answer was lost is sent again and gets the first call's receipt. What may be tried again is decided in
`shared.clients.retry`.

`CameraClient` is for threads, `AsyncCameraClient` for asyncio; they take and give the same.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, Self

import grpc
from sightline.v1 import edge_pb2, edge_pb2_grpc

from shared.clients import messages
from shared.clients.connection import AsyncLine, BlockingLine, Connection
from shared.clients.messages import Picture
from shared.clients.retry import Attempts, Retry
from shared.clients.types import CompressOptions, Receipt
from shared.errors import SightlineError, Unavailable
from shared.rpc.status import from_rpc_error

CALL_S = 60.0
WINDOW = 8


class CameraClient:
    """Sends pictures to an edge, from any thread.

    `edge`: host:port, or a Connection. `camera_id`: 1 to 64 characters out of A-Z a-z 0-9 . _ : -. `options`: for calls
    that give none. `call_s`: deadline of one attempt, seconds. `on_retry` hears each error after which a picture is
    sent again, from the thread that sends it. Raises InvalidSettings.
    """

    def __init__(
        self,
        edge: str | Connection,
        camera_id: str = "default",
        *,
        options: CompressOptions | None = None,
        retry: Retry | None = None,
        call_s: float = CALL_S,
    ) -> None:
        connection = Connection(edge) if isinstance(edge, str) else edge
        self.camera_id = camera_id
        self._options = options or CompressOptions()
        self._retry = retry or Retry()
        self._call_s = call_s
        self._line = BlockingLine(connection)
        self._closed = threading.Event()
        self.on_retry: Callable[[SightlineError], None] = lambda _error: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls under way fail with Unavailable."""
        self._closed.set()
        self._line.close()

    def compress(
        self,
        picture: Picture,
        options: CompressOptions | None = None,
        *,
        capture_time: datetime | None = None,
        token: str = "",
    ) -> Receipt:
        """One picture: a JPEG, PNG or WebP file as bytes or Path, or pixels (uint8 [height, width, 3] RGB or
        [height, width] grey). `capture_time`: aware; None: when it arrives. `token`: at most 128 bytes.

        Raises InvalidImage, InvalidQuality, TooLarge, UnknownModel, TokenConflict and what else the edge answers;
        Unavailable or Overloaded once retries are given up; OSError for a path that cannot be read.
        """
        return self._send(
            messages.compress_request(self.camera_id, picture, options or self._options, capture_time, token)
        )

    def compress_many(
        self, pictures: Iterable[Picture], options: CompressOptions | None = None, *, window: int = WINDOW
    ) -> Iterator[Receipt | SightlineError]:
        """Many pictures, up to `window` under way at once; their receipts, or the errors of those that failed, in the
        pictures' order. Reads no further ahead than the window."""
        waiting: deque[Future[Receipt | SightlineError]] = deque()
        pool = ThreadPoolExecutor(window, "sightline-camera")
        try:
            for picture in pictures:
                if len(waiting) == window:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(self._try, picture, options))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, picture: Picture, options: CompressOptions | None) -> Receipt | SightlineError:
        try:
            return self.compress(picture, options)
        except SightlineError as error:
            return error

    def _send(self, request: edge_pb2.CompressRequest) -> Receipt:
        attempts = Attempts(self._retry)
        while True:
            try:
                stub = edge_pb2_grpc.EdgeServiceStub(self._line.channel())
                return messages.receipt(stub.Compress(request, timeout=self._call_s).receipt)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                pause_s = attempts.failed(failure)
                self.on_retry(failure)
            except ValueError:  # how gRPC says that the channel was closed
                if self._closed.is_set():
                    raise Unavailable("the client is closed") from None
                continue  # by a renewed certificate, between taking it and calling
            self._closed.wait(pause_s)


class AsyncCameraClient:
    """Sends pictures to an edge; made inside a running loop. Arguments as CameraClient's."""

    def __init__(
        self,
        edge: str | Connection,
        camera_id: str = "default",
        *,
        options: CompressOptions | None = None,
        retry: Retry | None = None,
        call_s: float = CALL_S,
    ) -> None:
        connection = Connection(edge) if isinstance(edge, str) else edge
        self.camera_id = camera_id
        self._options = options or CompressOptions()
        self._retry = retry or Retry()
        self._call_s = call_s
        self._line = AsyncLine(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls under way fail."""
        await self._line.close()

    async def compress(
        self,
        picture: Picture,
        options: CompressOptions | None = None,
        *,
        capture_time: datetime | None = None,
        token: str = "",
    ) -> Receipt:
        """As CameraClient.compress."""
        request = messages.compress_request(self.camera_id, picture, options or self._options, capture_time, token)
        attempts = Attempts(self._retry)
        while True:
            try:
                stub: Any = edge_pb2_grpc.EdgeServiceStub(self._line.channel())
                return messages.receipt((await stub.Compress(request, timeout=self._call_s)).receipt)
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.failed(from_rpc_error(error))
            await asyncio.sleep(pause_s)

    async def compress_many(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        options: CompressOptions | None = None,
        *,
        window: int = WINDOW,
    ) -> AsyncIterator[Receipt | SightlineError]:
        """As CameraClient.compress_many."""
        waiting: deque[asyncio.Task[Receipt | SightlineError]] = deque()
        try:
            async for picture in _each(pictures):
                if len(waiting) == window:
                    yield await waiting.popleft()
                waiting.append(asyncio.create_task(self._try(picture, options)))
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _try(self, picture: Picture, options: CompressOptions | None) -> Receipt | SightlineError:
        try:
            return await self.compress(picture, options)
        except SightlineError as error:
            return error


async def _each(pictures: Iterable[Picture] | AsyncIterable[Picture]) -> AsyncIterator[Picture]:
    if isinstance(pictures, AsyncIterable):
        async for picture in pictures:
            yield picture
    else:
        for picture in pictures:
            yield picture
