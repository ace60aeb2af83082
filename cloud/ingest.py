"""Where edges upload: one long stream each, frames up, credit and typed acks down.

    reader: announcements, frames, tombstones --> one task a frame --> pipeline --> ack, credit
    writer: what has gathered since the last write, as few messages as possible

The reader never waits for work: what may be under way is bounded by the credit the stream was given, and an edge that
sends more has broken the protocol. Credit comes back with a frame's final ack.

A stream ends by itself when the edge half-closes, when the server drains and when the stream is old (so that replicas
share the load): DRAIN is said, no more credit comes, what is held is answered, then OK. If the edge has not half-closed
after the grace, what it still sends is left unanswered, and it sends it again elsewhere.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
from sightline.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc

from cloud.again import FramesAgain
from cloud.detections.log import FrameName
from cloud.metrics import CloudMetrics
from cloud.pipeline import Pipeline, ReceivedFrame, Tombstone, Verdict
from cloud.tasks.labels import COCO_LABELS
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.logs import facts
from shared.rpc.access import caller
from shared.rpc.frames import from_upload

_log = logging.getLogger("sightline.cloud.ingest")
PROTOCOL_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MODEL_ID = re.compile(r"[0-9a-f]{64}")
_MAX_MODELS = 256
_MAX_SOURCES = 65_536
_MAX_VERSION = 64  # characters of an edge's software version that are kept
_MAX_REASON = 1000  # characters of a tombstone's reason that are kept
_ACKS_A_MESSAGE = 512
_AGE_JITTER = 0.2
_TOMBSTONE_OUTCOMES = (
    common_pb2.OUTCOME_EXPIRED,
    common_pb2.OUTCOME_DROPPED,
    common_pb2.OUTCOME_REJECTED,
)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Of one upload stream. `credit_...`: what may be unanswered. `max_age_s`: asked to reopen after it, 0: never.

    `grace_s`: how long it may go on once it was asked to end.
    """

    credit_frames: int
    credit_bytes: int
    max_age_s: float
    grace_s: float


class IngestService(ingest_pb2_grpc.IngestServiceServicer):
    """Serves once `open` has given it a pipeline; until then callers are told UNAVAILABLE."""

    def __init__(self, cloud_id: str, limits: StreamLimits, draining: asyncio.Event, metrics: CloudMetrics) -> None:
        self._cloud_id = cloud_id
        self._limits = limits
        self._draining = draining
        self._metrics = metrics
        self._pipeline: Pipeline | None = None
        self._streams: set[_UploadStream] = set()
        self._no_streams = asyncio.Event()
        self._no_streams.set()

    def open(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @property
    def streams(self) -> "list[_UploadStream]":
        """Those that are open."""
        return list(self._streams)

    def keeper(self, edge_id: str, camera: str) -> FramesAgain:
        """The way to ask an edge for frames of a camera again. Raises Unavailable where it is not connected to this
        process, NotFound where it keeps no originals."""
        connected = [each for each in self._streams if each.edge_id == edge_id and each.answers_for(camera)]
        if not connected:
            raise Unavailable(f"edge {edge_id!r} is not connected to this cloud now")
        if not connected[0].keeps_originals:
            raise NotFound(f"edge {edge_id!r} keeps no originals; its operator can allow it (originals_max_bytes)")
        return connected[0].again

    async def until_idle(self) -> None:
        """Returns when no upload stream is open."""
        await self._no_streams.wait()

    async def Upload(  # type: ignore[override]  # grpc.aio takes a coroutine that writes as well as a generator
        self,
        request_iterator: AsyncIterator[ingest_pb2.UploadRequest],
        context: "grpc.aio.ServicerContext[ingest_pb2.UploadRequest, ingest_pb2.UploadResponse]",
    ) -> None:
        # Before the call may be refused: grpc.aio's callers make INTERNAL of a refusal that meets their first write.
        first = await anext(request_iterator, None)
        pipeline = self._ready()
        if first is None:
            return
        stream = _UploadStream(pipeline, self._cloud_id, self._limits, self._draining, context)
        self._streams.add(stream)
        self._no_streams.clear()
        self._metrics.upload_streams.set(len(self._streams))
        try:
            await stream.run(first, request_iterator)
        finally:
            self._streams.discard(stream)
            self._metrics.upload_streams.set(len(self._streams))
            if not self._streams:
                self._no_streams.set()

    async def ListModels(self, request: ingest_pb2.ListModelsRequest, context: Any) -> ingest_pb2.ListModelsResponse:
        pipeline = self._ready()
        return ingest_pb2.ListModelsResponse(
            codecs=[
                ingest_pb2.CodecModel(model_id=codec.model_id, name=codec.bundle.name)
                for codec in pipeline.inference.codecs.values()
            ],
            tasks=[
                ingest_pb2.TaskModel(
                    name=task.name,
                    kind=str(task.kind),
                    categories=COCO_LABELS,
                    runs_on_upload=task.name in pipeline.tasks,
                    model_id=task.model_id,
                )
                for task in pipeline.inference.tasks.values()
            ],
        )

    def _ready(self) -> Pipeline:
        if self._pipeline is None:
            raise Unavailable("the models are still loading; call again in a moment")
        return self._pipeline


class _UploadStream:
    """One stream from hello to OK."""

    def __init__(
        self,
        pipeline: Pipeline,
        cloud_id: str,
        limits: StreamLimits,
        draining: asyncio.Event,
        context: "grpc.aio.ServicerContext[ingest_pb2.UploadRequest, ingest_pb2.UploadResponse]",
    ) -> None:
        self._pipeline = pipeline
        self._cloud_id = cloud_id
        self._limits = limits
        self._draining = draining
        self._context = context
        self._caller = caller()
        self.frames = 0  # that came, tombstones included
        self._edge_id = ""
        self.software_version = ""
        self.keeps_originals = False
        self.opened_us = self.last_frame_us = 0  # Unix time; 0: not yet
        self.payload_bytes = 0  # of the frames that came
        self._models: dict[int, str] = {}
        self._sources: dict[int, tuple[str, int]] = {}
        self._work: set[asyncio.Task[None]] = set()
        # What the edge may still send, and what came back since the last grant.
        self._credit_frames = self._credit_bytes = 0
        self._grant_frames, self._grant_bytes = limits.credit_frames, limits.credit_bytes
        # What the writer has to write. One ack a frame: a later one takes the place of an earlier.
        self._acks: dict[tuple[int, int], ingest_pb2.FrameAck] = {}
        self._drain: ingest_pb2.Drain | None = None
        self._ending = False  # DRAIN was said: no more credit
        self._closing = False  # all is answered: the writer ends when it has written that
        self._news = asyncio.Event()
        self.again = FramesAgain(self._news.set)

    @property
    def edge_id(self) -> str:
        """The name that the edge gave itself, "" before its hello."""
        return self._edge_id

    @property
    def identity(self) -> str:
        return self._caller.name

    @property
    def held_frames(self) -> int:
        """Frames that are not answered yet."""
        return len(self._work)

    @property
    def cameras(self) -> set[str]:
        """Whose frames it announced."""
        return {camera for camera, _ in self._sources.values()}

    def answers_for(self, camera: str) -> bool:
        """It is not about to end, and its caller may send for that camera: a name alone is anybody's to claim."""
        return not self._ending and self._caller.may("send", camera)

    @property
    def model_ids(self) -> set[str]:
        """Bundles that the edge spoke of."""
        return set(self._models.values())

    async def run(self, first: ingest_pb2.UploadRequest, requests: AsyncIterator[ingest_pb2.UploadRequest]) -> None:
        """Raises InvalidInput where the edge breaks the protocol."""
        await self._greet(first)
        reading = asyncio.create_task(self._read(requests))
        writing = asyncio.create_task(self._write())
        ending = asyncio.create_task(self._until_end())
        try:
            await asyncio.wait({reading, writing, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and not writing.done():
                self._say_drain(ending.result())
                await asyncio.wait(
                    {reading, writing}, timeout=self._limits.grace_s, return_when=asyncio.FIRST_COMPLETED
                )
            for task in (reading, writing):
                if task.done():
                    task.result()
            await asyncio.gather(*self._work)
            self._closing = True
            self._news.set()
            await writing
        finally:
            # A read or write under way is not cancelled: it ends with the call, and cancelling it would leave gRPC's
            # side of it behind.
            self._ending = self._closing = True
            self._news.set()
            ending.cancel()
            self.again.end(Unavailable(f"the stream of edge {self._edge_id} ended"))
            for work in self._work:
                work.cancel()  # the pipeline goes on with the frame
            for task in (reading, writing):
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            _log.info("an upload stream ended", extra=facts(edge=self._edge_id))

    async def _greet(self, request: ingest_pb2.UploadRequest) -> None:
        if request.WhichOneof("message") != "hello":
            raise InvalidInput(f"expected hello as the first message, got {request.WhichOneof('message')}")
        hello = request.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            await self._context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol version {PROTOCOL_VERSION} is spoken here, got {hello.protocol_version}",
            )
        if not _NAME.fullmatch(hello.edge_id):
            raise InvalidInput(f"edge_id must match {_NAME.pattern}, got {hello.edge_id!r}")
        self._edge_id, self.software_version = hello.edge_id, hello.software_version[:_MAX_VERSION]
        self.keeps_originals = hello.keeps_originals
        self.opened_us = time.time_ns() // 1000
        for model in hello.models:
            self._announce_model(model)
        _log.info("an edge opened an upload stream", extra=facts(edge=self._edge_id, version=hello.software_version))
        welcome = ingest_pb2.Welcome(
            protocol_version=PROTOCOL_VERSION,
            cloud_id=self._cloud_id,
            model_ids=sorted(self._pipeline.inference.codecs),
            max_frame_bytes=self._pipeline.limits.max_frame_bytes,
        )
        # Written here and not by the writer: gRPC cannot abort a call while its first write is under way.
        await self._context.write(ingest_pb2.UploadResponse(welcome=welcome))

    async def _until_end(self) -> str:
        """Returns, with the reason, when this stream should end though the edge would go on."""
        age_s = self._limits.max_age_s * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)  # noqa: S311
        try:
            async with asyncio.timeout(age_s or None):
                await self._draining.wait()
        except TimeoutError:
            return "this stream is old; the next one may reach another replica"
        return "this cloud is about to stop"

    def _say_drain(self, reason: str) -> None:
        self._ending = True
        self._drain = ingest_pb2.Drain(reason=reason, grace_ms=round(self._limits.grace_s * 1e3))
        self._news.set()

    # What comes.

    async def _read(self, requests: AsyncIterator[ingest_pb2.UploadRequest]) -> None:
        async for request in requests:
            if self._closing:
                return
            match request.WhichOneof("message"):
                case "frame":
                    self._take_frame(request.frame)
                case "tombstone":
                    self._take_tombstone(request.tombstone)
                case "source":
                    self._announce_source(request.source)
                case "model":
                    self._announce_model(request.model)
                case "again":
                    self.again.answer(request.again)
                case other:
                    raise InvalidInput(f"expected a frame, a tombstone or an announcement, got {other}")

    def _announce_model(self, model: ingest_pb2.ModelAnnouncement) -> None:
        if not (model.index < _MAX_MODELS and _MODEL_ID.fullmatch(model.model_id)):
            raise InvalidInput(
                f"expected a model id of 64 hex digits and an index below {_MAX_MODELS}, "
                f"got {model.model_id!r} and {model.index}"
            )
        if self._models.setdefault(model.index, model.model_id) != model.model_id:
            raise InvalidInput(f"model index {model.index} stands for {self._models[model.index]} on this stream")

    def _announce_source(self, source: ingest_pb2.SourceAnnouncement) -> None:
        if not (source.index < _MAX_SOURCES and _NAME.fullmatch(source.camera_id)):
            raise InvalidInput(
                f"expected a camera id that matches {_NAME.pattern} and an index below {_MAX_SOURCES}, "
                f"got {source.camera_id!r} and {source.index}"
            )
        announced = (source.camera_id, source.epoch)
        if self._sources.setdefault(source.index, announced) != announced:
            raise InvalidInput(f"source index {source.index} stands for {self._sources[source.index]} on this stream")

    def _take_frame(self, frame: ingest_pb2.FrameUpload) -> None:
        name = self._name(frame.source_index, frame.seq)
        model_id = self._models.get(frame.model_index)
        if model_id is None:
            raise InvalidInput(f"model index {frame.model_index} was not announced on this stream")
        received = ReceivedFrame(
            name=name,
            edge_id=self._edge_id,
            bitstream=from_upload(frame, model_id),
            payload_crc=frame.payload_crc,
            capture_us=frame.capture_time_unix_us,
            spooled_us=frame.spooled_time_unix_us,
            expires_us=frame.expires_time_unix_us,
            received_us=time.time_ns() // 1000,
        )
        self._spend(received.payload_bytes)
        self.payload_bytes += received.payload_bytes
        self.last_frame_us = received.received_us
        key = (frame.source_index, frame.seq)
        if not self._may_send(name):
            self._start(key, _not_authorised(name), received.payload_bytes)
            return
        wait_s = self._caller.turn_in_s()
        if wait_s > 0:
            self._start(key, _too_fast(wait_s), received.payload_bytes)
            return
        self._acks.setdefault(key, _ack(key, Verdict(ingest_pb2.ACK_STATE_RECEIVED)))
        self._start(key, self._pipeline.process(received), received.payload_bytes)

    def _take_tombstone(self, tombstone: ingest_pb2.FrameTombstone) -> None:
        name = self._name(tombstone.source_index, tombstone.seq)
        if tombstone.outcome not in _TOMBSTONE_OUTCOMES:
            raise InvalidInput(f"a tombstone's outcome is EXPIRED, DROPPED or REJECTED, got {tombstone.outcome}")
        self._spend(0)
        buried = Tombstone(
            name=name,
            edge_id=self._edge_id,
            outcome=tombstone.outcome,
            reason=tombstone.reason[:_MAX_REASON],
            capture_us=tombstone.capture_time_unix_us,
            received_us=time.time_ns() // 1000,
        )
        verdict = self._pipeline.bury(buried) if self._may_send(name) else _not_authorised(name)
        self._start((tombstone.source_index, tombstone.seq), verdict, 0)

    def _may_send(self, name: FrameName) -> bool:
        """By the policy in force now. Raises PermissionDenied where this caller may send for no camera any more: the
        stream ends and its frames stay at the edge."""
        self._caller.require("send")
        if self._caller.may("send", name.camera):
            return True
        self._caller.count_refused("camera")
        return False

    def _name(self, source_index: int, seq: int) -> FrameName:
        source = self._sources.get(source_index)
        if source is None:
            raise InvalidInput(f"source index {source_index} was not announced on this stream")
        return FrameName(*source, seq)

    def _spend(self, payload_bytes: int) -> None:
        if self._credit_frames <= 0 or self._credit_bytes <= 0:
            raise InvalidInput(
                f"a frame came without credit: {self._credit_frames} frames and {self._credit_bytes} bytes were left"
            )
        self.frames += 1
        self._credit_frames -= 1
        self._credit_bytes -= payload_bytes

    def _start(self, key: tuple[int, int], work: Awaitable[Verdict], payload_bytes: int) -> None:
        async def answer() -> None:
            verdict = await work
            self._acks[key] = _ack(key, verdict)
            self._grant_frames += 1
            self._grant_bytes += payload_bytes
            self._news.set()

        task = asyncio.create_task(answer())
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        self._news.set()

    # What goes.

    async def _write(self) -> None:
        while True:
            message = self._next_message()
            if message is not None:
                await self._context.write(message)
            elif self._closing:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def _next_message(self) -> ingest_pb2.UploadResponse | None:
        if self._drain is not None:
            message = ingest_pb2.UploadResponse(drain=self._drain)
            self._drain = None
            return message
        asked = self.again.next_request()
        if asked is not None:
            return ingest_pb2.UploadResponse(again=asked)
        if self._acks:
            keys = list(self._acks)[:_ACKS_A_MESSAGE]
            return ingest_pb2.UploadResponse(acks=ingest_pb2.Acks(acks=[self._acks.pop(key) for key in keys]))
        return self._next_grant()

    def _next_grant(self) -> ingest_pb2.UploadResponse | None:
        """Credit that came back, once it is worth a message. An edge without credit has a whole window coming."""
        worth = (
            self._grant_frames * 4 >= self._limits.credit_frames or self._grant_bytes * 4 >= self._limits.credit_bytes
        )
        if self._ending or not worth:
            return None
        grant = ingest_pb2.CreditGrant(frames=self._grant_frames, bytes=self._grant_bytes)
        self._credit_frames += self._grant_frames
        self._credit_bytes += self._grant_bytes
        self._grant_frames = self._grant_bytes = 0
        return ingest_pb2.UploadResponse(credit=grant)


async def _not_authorised(name: FrameName) -> Verdict:
    """A frame for a camera that is not its sender's. It is told so and leaves nothing in the log: a record under that
    name would let any edge end another's frames before they come."""
    return Verdict(
        ingest_pb2.ACK_STATE_REJECTED,
        common_pb2.OUTCOME_REJECTED,
        reject_reason=ingest_pb2.REJECT_REASON_NOT_AUTHORISED,
        detail=f"{caller().name} may not send for camera {name.camera!r}",
    )


async def _too_fast(wait_s: float) -> Verdict:
    return Verdict(
        ingest_pb2.ACK_STATE_RETRY_LATER,
        retry_reason=ingest_pb2.RETRY_REASON_OVERLOADED,
        retry_after_ms=max(1, round(wait_s * 1e3)),
        detail=f"{caller().name} sends more frames per second than one caller may",
    )


def _ack(key: tuple[int, int], verdict: Verdict) -> ingest_pb2.FrameAck:
    return ingest_pb2.FrameAck(
        source_index=key[0],
        seq=key[1],
        state=verdict.state,
        outcome=verdict.outcome,
        reject_reason=verdict.reject_reason,
        retry_reason=verdict.retry_reason,
        retry_after_ms=verdict.retry_after_ms,
        detail=verdict.detail,
    )
