"""One Upload stream, from hello to its end: what was sent on it, what was acknowledged, what is still owed.

A session only sends and listens. Which frame is next, and what an acknowledgement means for the spool, is for
`edge.uplink`, which outlives it.

    run -> hello -> welcomed -> frames against credit, acks -> (drain -> half-close) -> ended
"""

import asyncio
import logging
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
from sightline.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc

from edge.spool_rows import Entry, Final, FrameName, Outcome
from shared.codec.bitstream import to_bytes
from shared.errors import NotFound, SightlineError, TooLarge
from shared.logs import facts, frame_id
from shared.metrics import software_version
from shared.rpc import status
from shared.rpc.frames import to_upload

if TYPE_CHECKING:
    from edge.uplink import Uplink

_log = logging.getLogger("sightline.edge.uplink")

PROTOCOL_VERSION = 1
MAX_SOURCES = 65536
MAX_MODELS = 256
FRAMES_AT_ONCE = 32
_AGAIN_AT_ONCE = 4
_OUTCOMES = {int(outcome): outcome for outcome in Outcome if outcome is not Outcome.NONE}


@dataclass(slots=True)
class _Sent:
    """`received`: the cloud has it and works on it. `reason`: why its end is told instead, "" for a frame."""

    id: int
    model_id: str
    size_bytes: int
    reason: str = ""
    received: bool = False


class Session:
    """See the head of this module. `run` once; the futures tell how far it has come."""

    def __init__(self, uplink: "Uplink", channel: grpc.aio.Channel) -> None:
        loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[None] = loop.create_future()
        self.draining: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.in_flight: dict[tuple[int, int], _Sent] = {}
        self.progressed = False  # something was finally acknowledged
        self._uplink = uplink
        self._channel = channel
        self._call = ingest_pb2_grpc.IngestServiceStub(channel).Upload()  # type: ignore[no-untyped-call,unused-ignore]
        self._models: dict[str, int] = {}
        self._sources: dict[tuple[str, int], int] = {}
        self._announced: set[int] = set()
        self._max_frame_bytes = 0
        self._credit_frames = 0
        self._credit_bytes = 0
        self._heard = time.monotonic()
        self._stalled = False
        self._greeted = False  # hello was written, so there is a connection
        self._running: asyncio.Task[None] | None = None
        self._again: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Lives until the stream has ended, however that happens; raises only when cancelled from outside."""
        self._running = asyncio.current_task()
        tasks = [asyncio.create_task(self._watch())]
        reason = "ok"
        try:
            await self._write(ingest_pb2.UploadRequest(hello=self._hello()))
            self._greeted = True
            async for response in self._call:
                self._heard = time.monotonic()
                if response.WhichOneof("message") == "welcome" and not self.welcomed.done():
                    self._on_welcome(response.welcome)
                    tasks.append(asyncio.create_task(self._send()))
                else:
                    self._on_message(response)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter where it ended before hello was written
            reason = (await self._call.code()).name.lower()
            _log.warning("the upload stream ended", extra=facts(code=reason, detail=await self._call.details()))
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            reason = "stalled"
            _log.warning("the cloud owed an answer for too long; the upload stream was given up")
        except Exception:
            reason = "failed"
            _log.exception("the upload stream failed")
        finally:
            tasks += self._again
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._uplink.on_ended(self, reason)
            self.ended.set_result(None)
            await self._channel.close()

    @property
    def without_credit(self) -> bool:
        """Nothing more may be sent until the cloud grants it."""
        return self._credit_frames < 1 or self._credit_bytes < 1

    def ask_to_drain(self) -> None:
        """Sends nothing new from now on."""
        if not self.draining.done():
            self.draining.set_result(None)

    async def half_close(self) -> None:
        """Tells the cloud that nothing more comes; its acknowledgements still do."""
        self.ask_to_drain()
        if not self._greeted:
            self._give_up()
            return
        try:
            await self._call.done_writing()
        except Exception as error:  # grpc.aio raises one of its inner errors where the stream is breaking just then
            _log.debug("the upload stream ended before it was half-closed", extra=facts(error=repr(error)))

    # -- up ------------------------------------------------------------------------------------------------------

    def _hello(self) -> ingest_pb2.Hello:
        self._models = {model_id: index for index, model_id in enumerate(self._uplink.model_ids)}
        return ingest_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            edge_id=self._uplink.edge_id,
            boot_id=self._uplink.boot_id,
            models=[ingest_pb2.ModelAnnouncement(index=i, model_id=m) for m, i in self._models.items()],
            software_version=software_version(),
            keeps_originals=self._uplink.code_again is not None,
        )

    async def _write(self, request: ingest_pb2.UploadRequest) -> None:
        """gRPC takes one write at a time; frames and answers come from two tasks."""
        async with self._writing:
            await self._call.write(request)

    async def _send(self) -> None:
        while not self.draining.done():
            if max(len(self._sources) - MAX_SOURCES, len(self._models) - MAX_MODELS) > -FRAMES_AT_ONCE:
                self.ask_to_drain()  # indexes run out: the next stream begins anew
                return
            if self.without_credit:
                await self._uplink.look_again()
                continue
            entries = await self._uplink.next_entries(
                frames=min(self._credit_frames, FRAMES_AT_ONCE), max_bytes=self._credit_bytes
            )
            try:
                for entry in entries:
                    self._claim(entry)
                for entry in entries:
                    await self._send_entry(entry)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader hears the reason

    def _claim(self, entry: Entry) -> None:
        """From here on the frame is this session's to send again or to have acknowledged."""
        source = self._sources.setdefault((entry.name.camera_id, entry.name.epoch), len(self._sources))
        bits = entry.bitstream
        model_id, size = (bits.model_id, len(bits.hyper) + len(bits.latents)) if bits else ("", 0)
        self.in_flight[source, entry.name.seq] = _Sent(entry.id, model_id, size, entry.reason)

    async def _send_entry(self, entry: Entry) -> None:
        source = self._sources[entry.name.camera_id, entry.name.epoch]
        if source not in self._announced:
            self._announced.add(source)
            announcement = ingest_pb2.SourceAnnouncement(
                index=source, camera_id=entry.name.camera_id, epoch=entry.name.epoch
            )
            await self._write(ingest_pb2.UploadRequest(source=announcement))
        self._credit_frames -= 1
        bits = entry.bitstream
        if bits is None:
            await self._send_tombstone(source, entry)
            return
        size = len(bits.hyper) + len(bits.latents)
        if size > self._max_frame_bytes:  # sent, it would break this stream and every one after it
            reason = f"expected at most {self._max_frame_bytes} bytes of streams, as the cloud takes, got {size}"
            self.in_flight[source, entry.name.seq].reason = reason
            await self._send_tombstone(source, replace(entry, outcome=Outcome.REJECTED, reason=reason))
            return
        if bits.model_id not in self._models:
            self._models[bits.model_id] = len(self._models)
            model = ingest_pb2.ModelAnnouncement(index=self._models[bits.model_id], model_id=bits.model_id)
            await self._write(ingest_pb2.UploadRequest(model=model))
        self._credit_bytes -= size
        frame = to_upload(bits, source_index=source, seq=entry.name.seq, model_index=self._models[bits.model_id])
        frame.capture_time_unix_us = entry.captured_us
        frame.spooled_time_unix_us = entry.spooled_us
        frame.expires_time_unix_us = entry.expires_us
        frame.resends = self._uplink.resends(entry.id)
        frame.idempotency_token = entry.token
        await self._write(ingest_pb2.UploadRequest(frame=frame))
        self._uplink.on_sent(size)

    async def _send_tombstone(self, source: int, entry: Entry) -> None:
        tombstone = ingest_pb2.FrameTombstone(
            source_index=source,
            seq=entry.name.seq,
            capture_time_unix_us=entry.captured_us,
            spooled_time_unix_us=entry.spooled_us,
            outcome=common_pb2.Outcome.ValueType(int(entry.outcome)),
            reason=entry.reason,
        )
        await self._write(ingest_pb2.UploadRequest(tombstone=tombstone))

    # -- down ----------------------------------------------------------------------------------------------------

    def _on_welcome(self, welcome: ingest_pb2.Welcome) -> None:
        _log.info("the cloud welcomed this edge", extra=facts(cloud=welcome.cloud_id))
        self._max_frame_bytes = welcome.max_frame_bytes or sys.maxsize
        self.welcomed.set_result(None)
        self._uplink.on_welcome(set(welcome.model_ids))

    def _on_message(self, response: ingest_pb2.UploadResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "credit":
            self._credit_frames += response.credit.frames
            self._credit_bytes += response.credit.bytes
            self._uplink.look_again_now()
        elif kind == "acks":
            for ack in response.acks.acks:
                self._on_ack(ack)
        elif kind == "drain":
            _log.info("the cloud drains this stream", extra=facts(reason=response.drain.reason))
            self.ask_to_drain()
            self._uplink.look_again_now()
        elif kind == "again" and len(self._again) < _AGAIN_AT_ONCE:  # one too many the cloud gives up by itself
            task = asyncio.create_task(self._code_again(response.again))
            self._again.add(task)
            task.add_done_callback(self._again.discard)
        # Anything else is from a newer cloud and may be left alone.

    async def _code_again(self, request: ingest_pb2.FrameAgainRequest) -> None:
        """Answers with the frame, or with why not."""
        answer = ingest_pb2.FrameAgain(request_id=request.request_id)
        name = FrameName(request.camera_id, request.epoch, request.seq)
        try:
            if self._uplink.code_again is None:
                raise NotFound("this edge keeps no originals")
            coded = (await self._uplink.code_again(name, request.quality_steps)).bitstream
            if len(coded.hyper) + len(coded.latents) > self._max_frame_bytes:
                raise TooLarge(
                    f"expected at most {self._max_frame_bytes} bytes of streams, as the cloud takes, got more"
                )
            answer.bitstream = to_bytes(coded)
        except SightlineError as error:
            answer.error.CopyFrom(status.to_message(error))
        except Exception:
            _log.exception(
                "a frame could not be coded again", extra=facts(frame=frame_id(name.camera_id, name.epoch, name.seq))
            )
            answer.error.CopyFrom(status.to_message(SightlineError("internal error; the edge's log has the details")))
        try:
            await self._write(ingest_pb2.UploadRequest(again=answer))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream has ended; the cloud knows

    def _on_ack(self, ack: ingest_pb2.FrameAck) -> None:
        key = (ack.source_index, ack.seq)
        sent = self.in_flight.get(key)
        self._uplink.on_ack(ack)
        if sent is None or ack.state == ingest_pb2.ACK_STATE_UNSPECIFIED:
            return
        if ack.state == ingest_pb2.ACK_STATE_RECEIVED:
            if not sent.received:
                self._uplink.on_received(sent.size_bytes)
            sent.received = True
            return
        del self.in_flight[key]
        if ack.state == ingest_pb2.ACK_STATE_RETRY_LATER:
            unknown_model = ack.retry_reason == ingest_pb2.RETRY_REASON_UNKNOWN_MODEL
            self._uplink.on_retry_later(
                sent.id, sent.model_id if unknown_model else "", ack.retry_after_ms / 1000, ack.detail
            )
            return
        self.progressed = True
        rejected = ack.state == ingest_pb2.ACK_STATE_REJECTED
        outcome = Outcome.REJECTED if rejected else _OUTCOMES.get(int(ack.outcome), Outcome.DETECTIONS)
        if rejected:
            _log.warning("the cloud rejected a frame", extra=facts(frame=self._frame_id(key), reason=ack.detail))
        self._uplink.on_final(Final(sent.id, outcome, ack.detail or sent.reason))

    def _frame_id(self, key: tuple[int, int]) -> str:
        for (camera_id, epoch), index in self._sources.items():
            if index == key[0]:
                return frame_id(camera_id, epoch, key[1])
        return f"?/{key[0]}/{key[1]}"

    async def _watch(self) -> None:
        """Gives up a cloud that took frames, or the hello, and says nothing; reads are never timed (grpc 43360)."""
        while True:
            await asyncio.sleep(min(1.0, self._uplink.stall_s / 4))
            owes = not self.welcomed.done() or bool(self.in_flight)
            if owes and time.monotonic() - self._heard > self._uplink.stall_s:
                self._stalled = True
                self._give_up()
                return
            if not owes:
                self._heard = time.monotonic()

    def _give_up(self) -> None:
        if not self._greeted and self._running is not None:
            self._running.cancel()  # grpc.aio does not wake a first write when its call is cancelled
        self._call.cancel()
