"""One consumer's subscription: replay from a place in the log, then follow, with no seam between the two.

    log --read--> filter --> buffer (bounded) --write--> consumer

Replay and follow are one loop that reads what comes after its position, so nothing can fall between them or come
twice; the only state is the position. What differs is a full buffer: a consumer that still replays is waited for,
one that had caught up and now does not keep up is cut off with Overloaded. It resumes from its cursor and, the
records being on disk, loses nothing. One that is slower than the log for longer than the log keeps records is told so
with CursorExpired.

A cut-off does not wait for the consumer: the buffer is freed at once, and the error reaches the consumer behind the
messages that gRPC had already taken.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp
from sightline.v1 import common_pb2, detection_pb2

from cloud.detections.log import DetectionLog, Record
from shared.errors import CursorExpired, CursorMismatch, InvalidInput, Overloaded, Unavailable

_READ_RECORDS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one subscription: what its buffer may hold, and how often hidden events are told of."""

    buffer_events: int
    buffer_bytes: int
    progress_interval_s: float


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What a consumer wants to see; empty sets mean all. Conditions on detections apply to DETECTIONS events only."""

    camera_ids: frozenset[str]
    category_ids: frozenset[int]
    min_score: float
    outcomes: frozenset[int]
    may_see: Callable[[str], bool] = lambda _: True  # a camera, by the policy in force; may raise PermissionDenied

    @classmethod
    def from_proto(
        cls, message: detection_pb2.EventFilter, may_see: Callable[[str], bool] = lambda _: True
    ) -> "EventFilter":
        """Raises InvalidInput if the score is not in [0, 1]."""
        if not 0.0 <= message.min_score <= 1.0:  # also false for NaN
            raise InvalidInput(f"min_score must be in [0, 1], got {message.min_score}")
        return cls(
            frozenset(message.camera_ids),
            frozenset(message.category_ids),
            message.min_score,
            frozenset(message.outcomes),
            may_see,
        )

    def apply(self, record: Record) -> detection_pb2.DetectionEvent | None:
        """The record's event with what the filter leaves of it, or None if it hides it."""
        if self.camera_ids and record.name.camera not in self.camera_ids:
            return None
        if not self.may_see(record.name.camera):
            return None
        event = detection_pb2.DetectionEvent.FromString(record.event)
        if self.outcomes and event.outcome not in self.outcomes:
            return None
        if event.outcome == common_pb2.OUTCOME_DETECTIONS and (self.category_ids or self.min_score > 0):
            for result in event.results:
                shown = [d for d in result.detections if self._shows(d)]
                del result.detections[:]
                result.detections.extend(shown)
            if not any(result.detections for result in event.results):
                return None
        return event

    def _shows(self, detection: detection_pb2.Detection) -> bool:
        if self.category_ids and detection.category_id not in self.category_ids:
            return False
        return detection.score >= self.min_score


async def start_position(log: DetectionLog, request: detection_pb2.SubscribeRequest) -> int:
    """The sequence after which a subscription begins.

    Raises CursorMismatch for a cursor of another log (or ahead of this one), CursorExpired for one whose next event
    is no longer kept. A start time before everything kept means the oldest event kept.
    """
    span = await log.span()
    start = request.WhichOneof("start")
    if start == "after":
        cursor = request.after
        if cursor.log_id != log.log_id:
            raise CursorMismatch(f"expected a cursor of log {log.log_id}, got one of log {cursor.log_id!r}")
        if cursor.sequence > span.newest:
            raise CursorMismatch(
                f"log {log.log_id} ends at sequence {span.newest}, the cursor is at {cursor.sequence}: "
                "the log has lost its end or the cursor was made up"
            )
        if cursor.sequence < span.oldest - 1:
            raise CursorExpired(
                f"the log keeps sequences from {span.oldest} on, got a cursor at {cursor.sequence}: "
                f"what followed it is gone; resume after {span.oldest - 1}"
            )
        return int(cursor.sequence)
    if start == "start_time":
        try:
            return await log.position_at(request.start_time.ToNanoseconds())
        except ValueError as error:
            raise InvalidInput(f"start_time must be a valid timestamp: {error}") from error
    if start == "position" and request.position == detection_pb2.START_POSITION_BEGINNING:
        return span.oldest - 1
    return span.newest


class Subscription:
    """One consumer, from `after` on. `run` writes until the consumer goes or is cut off."""

    def __init__(self, log: DetectionLog, after: int, event_filter: EventFilter, limits: Limits) -> None:
        self._log = log
        self._position = after  # of the last record read, shown or hidden
        self._told = after  # position of the last message put into the buffer
        self._given = after  # position of the last message written to the consumer
        self._moved = asyncio.Event()  # one of these changed
        self._filter = event_filter
        self._limits = limits
        self._buffer: deque[detection_pb2.SubscribeResponse] = deque()
        self._buffer_bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._caught_up = False  # the reader has met the log's end
        self._following = False  # and then the consumer took all that waited for it
        self._over = False
        self._last_message_s = time.monotonic()

    @property
    def given(self) -> int:
        """Sequence of the last message that the consumer took."""
        return self._given

    @property
    def lag(self) -> int:
        """Records of the log that this consumer has not been shown or told of."""
        return max(0, self._log.newest - self._given)

    async def run(
        self, write: Callable[[detection_pb2.SubscribeResponse], Awaitable[None]], stop: asyncio.Event
    ) -> None:
        """Passes every message to `write`, one at a time; once `stop` is set, until the consumer has all there is.

        Raises Overloaded, CursorExpired, Unavailable at a stop, or what `write` raises.
        """
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write(write))
        stopping = asyncio.create_task(self._stop(stop))
        try:
            await asyncio.wait({reading, writing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (reading, writing, stopping):
                if task.done():
                    task.result()
        finally:
            # A write that the consumer blocks is not cancelled: it ends with the call, and cancelling it would leave
            # gRPC's side of it behind.
            self._over = True
            self._buffer.clear()
            self._filled.set()
            reading.cancel()
            stopping.cancel()
            writing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _write(self, write: Callable[[detection_pb2.SubscribeResponse], Awaitable[None]]) -> None:
        while not self._over:
            if not self._buffer:
                self._following = self._caught_up
                self._filled.clear()
                await self._filled.wait()
                continue
            message = self._buffer.popleft()
            self._buffer_bytes -= message.ByteSize()
            self._emptied.set()
            await write(message)
            self._given = max(message.event.cursor.sequence, message.progress.cursor.sequence)
            self._moved.set()

    async def _stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        end = self._log.newest
        while self._position < end or self._given < self._told:
            self._moved.clear()
            await self._moved.wait()
        raise Unavailable(f"the server is stopping and has given all up to sequence {end}; resume elsewhere from there")

    async def _read(self) -> None:
        while True:
            records = await self._log.read(self._position, _READ_RECORDS)
            for record in records:
                self._position = record.sequence
                event = self._filter.apply(record)
                if event is not None:
                    await self._put(self._event_message(record, event))
                elif self._progress_due_s() <= 0:
                    self._put_progress(caught_up=False)
            self._moved.set()
            if records:
                await asyncio.sleep(0)  # reading from memory never yields, and the writer needs a turn
            else:
                await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        if not self._caught_up:
            await self._put(self._progress_message(caught_up=True))
            self._caught_up = True
        hidden = self._told < self._position
        try:
            async with asyncio.timeout(max(0.0, self._progress_due_s()) if hidden else None):
                await self._log.wait_beyond(self._position)
        except TimeoutError:
            self._put_progress(caught_up=True)

    async def _put(self, message: detection_pb2.SubscribeResponse) -> None:
        size = message.ByteSize()
        while self._buffer and not self._has_room(size):
            if self._following:
                raise Overloaded(
                    f"the consumer is too slow: {len(self._buffer)} events ({self._buffer_bytes} bytes) wait for it "
                    "though it had caught up; resume from the last event received"
                )
            self._emptied.clear()
            await self._emptied.wait()
        self._append(message, size)

    def _put_progress(self, *, caught_up: bool) -> None:
        message = self._progress_message(caught_up=caught_up)
        if self._has_room(size := message.ByteSize()):  # else the events that wait tell more
            self._append(message, size)

    def _append(self, message: detection_pb2.SubscribeResponse, size: int) -> None:
        self._buffer.append(message)
        self._buffer_bytes += size
        self._told = self._position
        self._last_message_s = time.monotonic()
        self._filled.set()

    def _has_room(self, size: int) -> bool:
        fits = self._buffer_bytes + size <= self._limits.buffer_bytes
        return fits and len(self._buffer) < self._limits.buffer_events

    def _progress_due_s(self) -> float:
        return self._last_message_s + self._limits.progress_interval_s - time.monotonic()

    def _progress_message(self, *, caught_up: bool) -> detection_pb2.SubscribeResponse:
        cursor = detection_pb2.Cursor(log_id=self._log.log_id, sequence=self._position)
        return detection_pb2.SubscribeResponse(progress=detection_pb2.Progress(cursor=cursor, caught_up=caught_up))

    def _event_message(self, record: Record, event: detection_pb2.DetectionEvent) -> detection_pb2.SubscribeResponse:
        event.cursor.CopyFrom(detection_pb2.Cursor(log_id=self._log.log_id, sequence=record.sequence))
        persisted = Timestamp()
        persisted.FromNanoseconds(record.logged_ns)
        event.persisted_time.CopyFrom(persisted)
        return detection_pb2.SubscribeResponse(event=event)
