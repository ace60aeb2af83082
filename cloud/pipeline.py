"""The way of an uploaded frame through the cloud, from receipt to the verdict that its edge is told.

    known already? -> in time? -> check -> infer -> event -> log (durable) -> PERSISTED
                                    |        |
                                    `--------`---> quarantine -> REJECTED event -> log -> REJECTED

Every frame ends in exactly one record in the log, or is sent away with RETRY_LATER and leaves nothing behind. What
another attempt could cure (a model not loaded here, no room, a full disk) is RETRY_LATER, never REJECTED. A frame whose
record is in the log is PERSISTED again without work, and one that comes again while it is worked on shares that work.

Frames are worked on together and finish in any order. The log gets those of one camera in the order in which they came:
a record waits until the one before it was handed to the log, or its frame was sent away (`shared.turns`).

Work belongs to the pipeline and not to the stream that brought it: if the stream breaks, the work goes on and the
resend finds its result.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sightline.v1 import common_pb2, detection_pb2, ingest_pb2

from cloud import events
from cloud.detections.log import DetectionLog, FrameName
from cloud.inference import Inference, Inferred
from cloud.metrics import CloudMetrics
from cloud.quarantine import Quarantine
from shared.codec import bitstream as bits
from shared.codec.types import Bitstream
from shared.errors import (
    CursorExpired,
    InvalidBitstream,
    Overloaded,
    SymbolsMismatch,
    TooLarge,
    Unavailable,
    UnknownModel,
)
from shared.logs import facts
from shared.tracing import Stage, Tracer
from shared.turns import Turn, Turns

_log = logging.getLogger("sightline.cloud.pipeline")
_UNKNOWN_MODEL_RETRY_MS = 10_000  # a model comes with a restart, not by itself
_LOG_RETRY_MS = 2_000
_LOG_PAUSE_S = 1.0  # after a failed write, frames are sent away without work for this long
_ATTEMPTS = 2  # of the networks at one frame
_PATIENCE_S = 60.0  # how long a record waits for its camera's one before; longer than any batch and its repetition


@dataclass(frozen=True, slots=True)
class ReceivedFrame:
    """A frame as it came. Times are microseconds since 1970; `spooled_us` and `expires_us` may be 0: unknown, never.

    `payload_crc`: what the sender says of its bytes, not checked yet. `received_us` is the cloud's clock.
    """

    name: FrameName
    edge_id: str
    bitstream: Bitstream
    payload_crc: int
    capture_us: int
    spooled_us: int
    expires_us: int
    received_us: int

    @property
    def payload_bytes(self) -> int:
        return len(self.bitstream.hyper) + len(self.bitstream.latents)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The end of a frame that never comes: `outcome` EXPIRED, DROPPED or REJECTED, and why."""

    name: FrameName
    edge_id: str
    outcome: int
    reason: str
    capture_us: int
    received_us: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an edge is told; fields as in FrameAck."""

    state: ingest_pb2.AckState.ValueType
    outcome: common_pb2.Outcome.ValueType = common_pb2.OUTCOME_UNSPECIFIED
    reject_reason: ingest_pb2.RejectReason.ValueType = ingest_pb2.REJECT_REASON_UNSPECIFIED
    retry_reason: ingest_pb2.RetryReason.ValueType = ingest_pb2.RETRY_REASON_UNSPECIFIED
    retry_after_ms: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """`max_frames` and `max_bytes`: of what is held. `max_age_s`: a frame spooled longer ago is EXPIRED.

    `retry_after_ms`: what is said when there is no room.
    """

    max_pixels: int
    max_frame_bytes: int
    max_frames: int
    max_bytes: int
    max_age_s: float
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class LogFailure:
    """The log could not be written: why, and when by the monotonic clock, seconds."""

    sentence: str
    at_s: float


class _Rejected(Exception):
    """The frame cannot be used; `reason` says which kind of not."""

    def __init__(self, reason: ingest_pb2.RejectReason.ValueType, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Pipeline:
    """See the module's head. `tasks` run on every frame; detections below `min_score` are not logged.

    `on_seen` is given each frame that the networks have looked at, on the event loop, before its record is written.
    """

    def __init__(
        self,
        inference: Inference,
        log: DetectionLog,
        quarantine: Quarantine,
        *,
        tasks: Sequence[str],
        min_score: float,
        limits: PipelineLimits,
        metrics: CloudMetrics,
        tracer: Tracer | None = None,
        on_seen: Callable[[ReceivedFrame, Inferred], None] = lambda frame, inferred: None,
        unix_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.inference = inference
        self.tasks = tuple(tasks)
        self._log = log
        self._quarantine = quarantine
        self._min_score = min_score
        self.limits = limits
        self._metrics = metrics
        self._tracer = tracer
        self._on_seen = on_seen
        self._unix_us = unix_us
        self._running: dict[FrameName, asyncio.Task[Verdict]] = {}
        self._turns = Turns(_PATIENCE_S)
        self._held_bytes = 0
        self.log_failure: LogFailure | None = None  # of the latest append; None once one succeeded
        self._closing = False

    @property
    def held_frames(self) -> int:
        """Frames under way."""
        return len(self._running)

    async def process(self, frame: ReceivedFrame) -> Verdict:
        """Carries a frame to its end. Always answers, never raises."""
        running = self._running.get(frame.name)
        if running is None:
            self._metrics.frame_bytes.observe(frame.payload_bytes)
            refusal = self._refuse(frame)
            if refusal is not None:
                return refusal
            turn = self._turns.take(frame.name.camera)  # here: calls begin in the order in which frames came
            running = asyncio.create_task(self._carry(frame, turn))
            self._running[frame.name] = running
            self._hold(frame.payload_bytes)
            running.add_done_callback(lambda _: self._let_go(frame, turn))
        return await asyncio.shield(running)

    async def bury(self, tombstone: Tombstone) -> Verdict:
        """Logs the end of a frame that never comes. Always answers, never raises."""
        event = self._event(tombstone.name, tombstone.edge_id, tombstone.outcome, tombstone.capture_us)
        event.reason = tombstone.reason
        event.received_time.CopyFrom(events.from_micros(tombstone.received_us))
        turn = self._turns.take(tombstone.name.camera)
        try:
            return await self._persist(tombstone.name, event, turn)
        except Unavailable as error:
            return self._log_unavailable(str(error))
        finally:
            turn.end()

    async def close(self) -> None:
        """Takes nothing new and finishes what is held."""
        self._closing = True
        while self._running:
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _carry(self, frame: ReceivedFrame, turn: Turn) -> Verdict:
        try:
            known = await self._log.find(frame.name)
            if known is not None:
                return await self._already(known)
            return await self._decide(frame, turn)
        except UnknownModel as error:
            return self._retry(ingest_pb2.RETRY_REASON_UNKNOWN_MODEL, _UNKNOWN_MODEL_RETRY_MS, str(error))
        except Overloaded as error:
            return self._no_room(str(error))
        except Unavailable as error:
            return self._log_unavailable(str(error))
        except Exception:
            _log.exception("a frame could not be carried to its end", extra=facts(frame=frame.name))
            return self._no_room("internal error; the cloud's log has the details")

    async def _decide(self, frame: ReceivedFrame, turn: Turn) -> Verdict:
        try:
            late = self._too_late(frame)
            if late is None:
                self._check(frame)
                event = await self._see(frame)
                if event is not None:
                    return await self._persist(frame.name, event, turn)
                late = self._too_late(frame) or "its time was over before its batch began"
        except _Rejected as rejected:
            return await self._reject(frame, rejected, turn)
        event = self._frame_event(frame, common_pb2.OUTCOME_EXPIRED)
        event.reason = late
        return await self._persist(frame.name, event, turn)

    def _check(self, frame: ReceivedFrame) -> None:
        """Everything that can be said of a frame without decoding it. Raises _Rejected, UnknownModel."""
        coded = frame.bitstream
        if frame.payload_bytes > self.limits.max_frame_bytes:
            raise _Rejected(
                ingest_pb2.REJECT_REASON_TOO_LARGE,
                f"expected at most {self.limits.max_frame_bytes} coded bytes, got {frame.payload_bytes}",
            )
        actual = bits.payload_crc(coded)
        if actual != frame.payload_crc:
            raise _Rejected(
                ingest_pb2.REJECT_REASON_PAYLOAD_CRC,
                f"expected payload CRC-32C {frame.payload_crc:08x} as sent, the bytes that came have {actual:08x}",
            )
        self.inference.require_model(coded.model_id)
        try:
            bits.check_frame(coded.quality, coded.height, coded.width, max_pixels=self.limits.max_pixels)
        except TooLarge as error:
            raise _Rejected(ingest_pb2.REJECT_REASON_TOO_LARGE, str(error)) from error
        except InvalidBitstream as error:
            raise _Rejected(ingest_pb2.REJECT_REASON_INVALID_BITSTREAM, str(error)) from error

    async def _see(self, frame: ReceivedFrame) -> detection_pb2.DetectionEvent | None:
        """The event with what the tasks found, None if it was too late for that. Raises _Rejected."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                inferred = await self.inference.infer(
                    frame.name.camera,
                    frame.bitstream,
                    self.tasks,
                    expires_unix_us=frame.expires_us,
                    min_score=self._min_score,
                )
                if inferred is None:
                    return None
                event = await self._detections_event(frame, inferred)
                self._on_seen(frame, inferred)
                return event
            except SymbolsMismatch as error:
                raise _Rejected(ingest_pb2.REJECT_REASON_SYMBOLS_CRC, str(error)) from error
            except InvalidBitstream as error:
                raise _Rejected(ingest_pb2.REJECT_REASON_INVALID_BITSTREAM, str(error)) from error
            except (Overloaded, UnknownModel):
                raise
            except Exception as error:
                _log.exception("attempt %d at a frame failed", attempt, extra=facts(frame=frame.name))
                failure = error
        detail = f"the networks failed {_ATTEMPTS} times on this frame: {type(failure).__name__}: {failure}"
        raise _Rejected(ingest_pb2.REJECT_REASON_TASK_FAILED, detail) from failure

    async def _reject(self, frame: ReceivedFrame, rejected: _Rejected, turn: Turn) -> Verdict:
        reason = ingest_pb2.RejectReason.Name(rejected.reason).removeprefix("REJECT_REASON_").lower()
        detail = str(rejected)
        await self._quarantine.put(frame.name, reason, detail, frame.edge_id, frame.bitstream, frame.capture_us)
        event = self._frame_event(frame, common_pb2.OUTCOME_REJECTED)
        event.reason = detail
        verdict = await self._persist(frame.name, event, turn)
        if verdict.outcome != common_pb2.OUTCOME_REJECTED:  # another replica was first and could use it
            return verdict
        self._metrics.rejected.labels(reason).inc()
        _log.warning("rejected a frame: %s", detail, extra=facts(frame=frame.name, edge=frame.edge_id, reason=reason))
        return Verdict(ingest_pb2.ACK_STATE_REJECTED, verdict.outcome, reject_reason=rejected.reason, detail=detail)

    async def _persist(self, name: FrameName, event: detection_pb2.DetectionEvent, turn: Turn) -> Verdict:
        await turn.come()
        start = time.perf_counter()
        try:
            appending = asyncio.create_task(self._log.append(name, event.SerializeToString()))
            turn.end()  # whoever wakes by this begins after what was just made: one sync serves both
            appended = await appending
        except Unavailable as error:
            self.log_failure = LogFailure(str(error), time.monotonic())
            raise
        self.log_failure = None
        if not appended.new:
            return await self._already(appended.sequence)
        log_s = time.perf_counter() - start
        self._metrics.log_append_seconds.observe(log_s)
        self._metrics.events.labels(events.outcome_label(event.outcome)).inc()
        captured_us = event.capture_time.ToMicroseconds()
        if event.outcome == common_pb2.OUTCOME_DETECTIONS and captured_us:
            delay_us = self._unix_us() - captured_us
            self._metrics.capture_to_detection_seconds.observe(max(0.0, delay_us / 1e6))
        _log.debug("persisted", extra=facts(frame=name, outcome=events.outcome_label(event.outcome)))
        if self._tracer is not None:
            self._trace(self._tracer, name, event, log_s)
        return Verdict(ingest_pb2.ACK_STATE_PERSISTED, event.outcome)

    def _trace(self, tracer: Tracer, name: FrameName, event: detection_pb2.DetectionEvent, log_s: float) -> None:
        """The cloud's span of a frame, from its receipt to its record, which is durable now."""
        timings = event.timings
        stages = [
            Stage(stage, milliseconds / 1e3)
            for stage, milliseconds in (
                ("queue", timings.queue_ms),
                ("unpack", timings.unpack_ms),
                ("synthesise", timings.synthesise_ms),
                ("task", timings.task_ms),
                ("log", log_s * 1e3),
            )
            if milliseconds
        ]
        tracer.record(
            str(name),
            "cloud.frame",
            seconds=(self._unix_us() - event.received_time.ToMicroseconds()) / 1e6,
            stages=stages,
            attributes={
                "sightline.outcome": events.outcome_label(event.outcome),
                "sightline.edge": event.edge_id,
                "sightline.detections": sum(len(result.detections) for result in event.results),
            },
        )

    async def _already(self, sequence: int) -> Verdict:
        """The verdict on a frame whose record is at `sequence`; its outcome is unspecified if retention took it."""
        self._metrics.duplicates.inc()
        try:
            records = await self._log.read(sequence - 1, 1)
        except CursorExpired:
            records = []
        outcome = common_pb2.OUTCOME_UNSPECIFIED
        if records and records[0].sequence == sequence:
            outcome = detection_pb2.DetectionEvent.FromString(records[0].event).outcome
        return Verdict(ingest_pb2.ACK_STATE_PERSISTED, outcome)

    async def _detections_event(self, frame: ReceivedFrame, inferred: Inferred) -> detection_pb2.DetectionEvent:
        event = self._frame_event(frame, common_pb2.OUTCOME_DETECTIONS)
        event.results.extend(await asyncio.to_thread(events.task_results, inferred))
        event.timings.CopyFrom(events.timings(inferred, (self._unix_us() - frame.received_us) / 1e6))
        return event

    def _frame_event(self, frame: ReceivedFrame, outcome: int) -> detection_pb2.DetectionEvent:
        event = self._event(frame.name, frame.edge_id, outcome, frame.capture_us)
        event.received_time.CopyFrom(events.from_micros(frame.received_us))
        events.describe_bitstream(event, frame.bitstream)
        return event

    def _event(self, name: FrameName, edge_id: str, outcome: int, capture_us: int) -> detection_pb2.DetectionEvent:
        return detection_pb2.DetectionEvent(
            frame=common_pb2.FrameName(camera_id=name.camera, epoch=name.epoch, seq=name.seq),
            edge_id=edge_id,
            capture_time=events.from_micros(capture_us),
            outcome=outcome,  # type: ignore[arg-type]
        )

    def _too_late(self, frame: ReceivedFrame) -> str | None:
        """Why the frame is too old to be worked on, or None."""
        now_us = self._unix_us()
        if frame.expires_us and now_us > frame.expires_us:
            return f"it was to be used within its time, which was over {(now_us - frame.expires_us) / 1e6:.3f} s ago"
        age_s = (now_us - frame.spooled_us) / 1e6
        if frame.spooled_us and age_s > self.limits.max_age_s:
            return (
                f"it was spooled {age_s:.0f} s ago by the edge's clock; frame names are remembered for "
                f"{self.limits.max_age_s:.0f} s, so an older one could have been here before"
            )
        return None

    def _refuse(self, frame: ReceivedFrame) -> Verdict | None:
        """Sends a frame away before anything is spent on it."""
        if self._closing:
            return self._retry(ingest_pb2.RETRY_REASON_DRAINING, 0, "this cloud is about to stop")
        if self.log_failure is not None and time.monotonic() - self.log_failure.at_s < _LOG_PAUSE_S:
            return self._log_unavailable("the detection log could not be written a moment ago")
        if len(self._running) >= self.limits.max_frames:
            return self._no_room(f"{len(self._running)} frames are held, the limit is {self.limits.max_frames}")
        if self._held_bytes and self._held_bytes + frame.payload_bytes > self.limits.max_bytes:
            return self._no_room(f"{self._held_bytes} coded bytes are held, the limit is {self.limits.max_bytes}")
        return None

    def _retry(self, reason: ingest_pb2.RetryReason.ValueType, after_ms: int, detail: str) -> Verdict:
        label = ingest_pb2.RetryReason.Name(reason).removeprefix("RETRY_REASON_").lower()
        self._metrics.retried.labels(label).inc()
        return Verdict(ingest_pb2.ACK_STATE_RETRY_LATER, retry_reason=reason, retry_after_ms=after_ms, detail=detail)

    def _no_room(self, detail: str) -> Verdict:
        return self._retry(ingest_pb2.RETRY_REASON_OVERLOADED, self.limits.retry_after_ms, detail)

    def _log_unavailable(self, detail: str) -> Verdict:
        return self._retry(ingest_pb2.RETRY_REASON_LOG_UNAVAILABLE, _LOG_RETRY_MS, detail)

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        self._metrics.in_flight_bytes.set(self._held_bytes)
        self._metrics.in_flight_frames.set(len(self._running))

    def _let_go(self, frame: ReceivedFrame, turn: Turn) -> None:
        turn.end()
        del self._running[frame.name]
        self._hold(-frame.payload_bytes)
