"""The consumer side: detection events, replayed and then followed, over any number of lost connections.

    start or cursor file -> Subscribe -> updates -> the wire breaks -> pause -> Subscribe after the last update

Because the resume is by cursor, an iteration shows every event once and in order, whatever happens to the server. Over
runs it is at least once: a cursor file names the last event whose handling had ended, that is, after which the next one
was asked for.

`DetectionClient` is for threads, `AsyncDetectionClient` for asyncio; they take and give the same.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import grpc
from sightline.v1 import detection_pb2, detection_pb2_grpc, ingest_pb2, ingest_pb2_grpc

from shared.clients import messages
from shared.clients.connection import AsyncLine, BlockingLine, Connection
from shared.clients.cursor_file import CursorFile
from shared.clients.messages import StartAt
from shared.clients.retry import Attempts, Retry
from shared.clients.types import Detected, DetectionEvent, EventFilter, FrameName, Progress, Reviewed, Start
from shared.errors import SightlineError, Unavailable
from shared.logs import facts
from shared.rpc.status import from_rpc_error

_log = logging.getLogger("sightline.clients")
CALL_S = 60.0
_Answer = TypeVar("_Answer")


class _Place:
    """Where a subscription is, and what it tells of that to the cursor file."""

    def __init__(self, start: StartAt, event_filter: EventFilter, cursor_file: CursorFile | None) -> None:
        self._at = start
        self._filter = event_filter
        self._file = cursor_file
        kept = cursor_file.load() if cursor_file else None
        if kept is not None:
            self._at = kept

    def request(self) -> detection_pb2.SubscribeRequest:
        return messages.subscribe_request(self._at, self._filter)

    def passed(self, update: DetectionEvent | Progress) -> None:
        """The caller has asked for what follows `update`."""
        self._at = update.cursor
        if self._file:
            self._file.save(update.cursor)

    def end(self) -> None:
        if self._file:
            self._file.flush()


def _interrupted(attempts: Attempts, error: SightlineError) -> float:
    """Seconds until the next attempt. Raises `error` if there is to be none."""
    pause_s = attempts.failed(error)
    _log.warning("the subscription broke, resuming", extra=facts(reason=str(error), pause_s=round(pause_s, 2)))
    return pause_s


def _detection(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return detection_pb2_grpc.DetectionServiceStub(channel)


def _ingest(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return ingest_pb2_grpc.IngestServiceStub(channel)


_ENDED = "the server ended the subscription"
_CLOSED = "the client is closed"


class DetectionClient:
    """Reads detections from a cloud, from any thread.

    `cloud`: host:port, or a Connection. `retry`: how a broken subscription is resumed and a failed call repeated.
    `call_s`: deadline of one attempt of `detect` or `review`, seconds. Raises InvalidSettings.
    """

    def __init__(self, cloud: str | Connection, *, retry: Retry | None = None, call_s: float = CALL_S) -> None:
        connection = Connection(cloud) if isinstance(cloud, str) else cloud
        self._retry = retry or Retry()
        self._call_s = call_s
        self._line = BlockingLine(connection)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; subscriptions end, in other threads too."""
        self._closed.set()
        self._line.close()

    def events(
        self,
        start: StartAt = Start.END,
        event_filter: EventFilter | None = None,
        *,
        cursor_file: CursorFile | None = None,
    ) -> Iterator[DetectionEvent]:
        """Events from `start` on, or from the cursor file's place if it has one; endless.

        Raises CursorMismatch for a cursor of another log, CursorExpired for one older than what the log keeps, what
        else the cloud answers, and Unavailable or Overloaded once resuming is given up.
        """
        for update in self.updates(start, event_filter, cursor_file=cursor_file):
            if isinstance(update, DetectionEvent):
                yield update

    def updates(
        self,
        start: StartAt = Start.END,
        event_filter: EventFilter | None = None,
        *,
        cursor_file: CursorFile | None = None,
    ) -> Iterator[DetectionEvent | Progress]:
        """As `events`, with the messages between that tell how far it is."""
        place = _Place(start, event_filter or EventFilter(), cursor_file)
        attempts = Attempts(self._retry)
        try:
            while not self._closed.is_set():
                try:
                    call = _detection(self._line.channel()).Subscribe(place.request())
                except ValueError:  # the channel was closed meanwhile
                    continue
                error: SightlineError = Unavailable(_ENDED)
                try:
                    for response in call:
                        attempts.succeeded()
                        update = messages.update(response)
                        if update is not None:
                            yield update
                            place.passed(update)
                except grpc.RpcError as broken:
                    error = from_rpc_error(broken)
                finally:
                    call.cancel()
                if not self._closed.is_set():
                    self._closed.wait(_interrupted(attempts, error))
        finally:
            place.end()

    def detect(
        self, bitstream: bytes, *, tasks: Sequence[str] = (), min_score: float = 0.0, return_image: bool = False
    ) -> Detected:
        """One bitstream (.slc) at once, past the log. `tasks`: empty for those that run on every frame. `min_score` in
        [0, 1], 0: the task's own. Raises InvalidBitstream, UnknownModel, TooLarge and what else the cloud answers."""
        request = detection_pb2.DetectRequest(
            bitstream=bitstream, tasks=tasks, min_score=min_score, return_image=return_image
        )
        return messages.detected(self._call(lambda channel: _detection(channel).Detect(request, timeout=self._call_s)))

    def review(self, frame: FrameName, *, quality: float | None = None, return_bitstream: bool = False) -> Reviewed:
        """An event's picture. `quality` None: as the task models saw it, from the bitstream that the cloud kept; in
        [1, 8]: coded again at that quality by its edge, where that keeps originals.

        Raises NotFound where bitstream, original or event is not kept, InvalidQuality, PermissionDenied and what else
        the cloud answers; Unavailable where the edge is not connected, Overloaded where there is no room, once retries
        are given up.
        """
        request = messages.review_request(frame, quality, return_bitstream)
        return messages.reviewed(self._call(lambda channel: _detection(channel).Review(request, timeout=self._call_s)))

    def categories(self) -> dict[int, str]:
        """Names by COCO category id, of all tasks that the cloud has."""
        request = ingest_pb2.ListModelsRequest()
        return messages.categories(
            self._call(lambda channel: _ingest(channel).ListModels(request, timeout=self._call_s))
        )

    def _call(self, ask: Callable[[grpc.Channel], _Answer]) -> _Answer:
        """One unary call, with retries."""
        attempts = Attempts(self._retry)
        while True:
            try:
                return ask(self._line.channel())
            except grpc.RpcError as error:
                pause_s = attempts.failed(from_rpc_error(error))
            except ValueError:  # how gRPC says that the channel was closed
                if self._closed.is_set():
                    raise Unavailable(_CLOSED) from None
                continue  # by a renewed certificate, between taking it and calling
            self._closed.wait(pause_s)


class AsyncDetectionClient:
    """Reads detections from a cloud; made inside a running loop. Arguments as DetectionClient's.

    An iteration that is left early ends its subscription when the iterator is closed: use ``contextlib.aclosing``.
    """

    def __init__(self, cloud: str | Connection, *, retry: Retry | None = None, call_s: float = CALL_S) -> None:
        connection = Connection(cloud) if isinstance(cloud, str) else cloud
        self._retry = retry or Retry()
        self._call_s = call_s
        self._line = AsyncLine(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        await self._line.close()

    async def events(
        self,
        start: StartAt = Start.END,
        event_filter: EventFilter | None = None,
        *,
        cursor_file: CursorFile | None = None,
    ) -> AsyncGenerator[DetectionEvent, None]:
        """As DetectionClient.events."""
        updates = self.updates(start, event_filter, cursor_file=cursor_file)
        try:
            async for update in updates:
                if isinstance(update, DetectionEvent):
                    yield update
        finally:
            await updates.aclose()

    async def updates(
        self,
        start: StartAt = Start.END,
        event_filter: EventFilter | None = None,
        *,
        cursor_file: CursorFile | None = None,
    ) -> AsyncGenerator[DetectionEvent | Progress, None]:
        """As DetectionClient.updates."""
        place = _Place(start, event_filter or EventFilter(), cursor_file)
        attempts = Attempts(self._retry)
        try:
            while True:
                call = _detection(self._line.channel()).Subscribe(place.request())
                error: SightlineError = Unavailable(_ENDED)
                try:
                    async for response in call:
                        attempts.succeeded()
                        update = messages.update(response)
                        if update is not None:
                            yield update
                            place.passed(update)
                except grpc.aio.AioRpcError as broken:
                    error = from_rpc_error(broken)
                finally:
                    call.cancel()
                await asyncio.sleep(_interrupted(attempts, error))
        finally:
            place.end()

    async def detect(
        self, bitstream: bytes, *, tasks: Sequence[str] = (), min_score: float = 0.0, return_image: bool = False
    ) -> Detected:
        """As DetectionClient.detect."""
        request = detection_pb2.DetectRequest(
            bitstream=bitstream, tasks=tasks, min_score=min_score, return_image=return_image
        )
        return messages.detected(
            await self._call(lambda channel: _detection(channel).Detect(request, timeout=self._call_s))
        )

    async def review(
        self, frame: FrameName, *, quality: float | None = None, return_bitstream: bool = False
    ) -> Reviewed:
        """As DetectionClient.review."""
        request = messages.review_request(frame, quality, return_bitstream)
        return messages.reviewed(
            await self._call(lambda channel: _detection(channel).Review(request, timeout=self._call_s))
        )

    async def categories(self) -> dict[int, str]:
        """As DetectionClient.categories."""
        request = ingest_pb2.ListModelsRequest()
        return messages.categories(
            await self._call(lambda channel: _ingest(channel).ListModels(request, timeout=self._call_s))
        )

    async def _call(self, ask: Callable[[grpc.aio.Channel], Awaitable[_Answer]]) -> _Answer:
        """One unary call, with retries."""
        attempts = Attempts(self._retry)
        while True:
            try:
                return await ask(self._line.channel())
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.failed(from_rpc_error(error))
            await asyncio.sleep(pause_s)
