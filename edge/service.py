"""EdgeService: a picture comes in, is checked, coded, spooled where asked for, and answered with a receipt.

The way of a frame through the edge is `EdgeService.answer`, top to bottom. Protobuf ends in this module.
"""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sightline.v1 import common_pb2, edge_pb2, edge_pb2_grpc

from edge import images
from edge.control import Control
from edge.engine import Encoded, Engine, Rate
from edge.images import ImageFile, ImageLimits, PixelFormat, RawPicture
from edge.metrics import EdgeMetrics
from edge.models import Models
from edge.originals import Originals
from edge.rate import Pacing
from edge.settings import NAME_PATTERN
from edge.spool import Spool, wall_clock_us
from edge.spool_rows import Draft, Final, Placed
from shared import tracing
from shared.codec import bitstream
from shared.codec.types import QUALITY_STEP, quality_to_steps
from shared.errors import InvalidImage, InvalidInput, SightlineError, TooLarge, Unavailable
from shared.logs import facts, frame_id
from shared.rpc import status
from shared.rpc.access import caller
from shared.tracing import FIRST_SPAN, Stage, Tracer
from shared.turns import Turn, Turns

_log = logging.getLogger("sightline.edge")
_CAMERA_ID = re.compile(NAME_PATTERN)
DEFAULT_CAMERA = "default"
MAX_TOKEN_BYTES = 128
_PATIENCE_S = 30.0  # longest that a coded frame waits for its camera's earlier ones
_FORMATS = {
    edge_pb2.PIXEL_FORMAT_RGB24: PixelFormat.RGB24,
    edge_pb2.PIXEL_FORMAT_BGR24: PixelFormat.BGR24,
    edge_pb2.PIXEL_FORMAT_NV12: PixelFormat.NV12,
    edge_pb2.PIXEL_FORMAT_GRAY8: PixelFormat.GRAY8,
}
_DELIVERIES = frozenset(edge_pb2.Delivery.values())


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request that leaves it open gets, and what an operator has changed.

    `frame_max_age_s`: 0 for never; `camera_max_age_s`: instead of it, by camera. `delivers`: there is a cloud to wait
    for. `max_coded_bytes`: of a spooled frame.
    `pacing`: None where the uplink has no budget.
    """

    quality: float
    models: Models
    control: Control
    frame_max_age_s: float
    camera_max_age_s: dict[str, float]
    delivers: bool
    limits: ImageLimits
    max_coded_bytes: int
    stream_window: int
    pacing: Pacing | None


@dataclass(frozen=True, slots=True)
class _Order:
    """A request that was checked, without its picture. Times in microseconds since 1970 UTC, `expires_us` 0: never."""

    camera_id: str
    model_id: str
    rate: Rate
    return_bitstream: bool
    delivery: int
    max_wait_s: float | None
    captured_us: int
    expires_us: int
    token: str

    @property
    def delivers(self) -> bool:
        return _delivers(self.delivery)


class EdgeService(edge_pb2_grpc.EdgeServiceServicer):
    """See the head of this module. `draining`: no more pictures are read from streams."""

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        metrics: EdgeMetrics,
        defaults: Defaults,
        draining: asyncio.Event,
        originals: Originals,
    ) -> None:
        self._engine = engine
        self._spool = spool
        self._metrics = metrics
        self._defaults = defaults
        self._draining = draining
        self._turns = Turns(_PATIENCE_S)
        self.tracer: Tracer | None = None
        self._originals = originals

    async def Compress(self, request: edge_pb2.CompressRequest, context: Any) -> edge_pb2.CompressResponse:
        tracing.hear(context)
        return edge_pb2.CompressResponse(receipt=await self.answer(request, wait_for_room=False))

    async def CompressStream(
        self, request_iterator: AsyncIterator[edge_pb2.CompressStreamRequest], context: Any
    ) -> AsyncIterator[edge_pb2.CompressStreamResponse]:
        tracing.hear(context)
        answers: asyncio.Queue[edge_pb2.CompressStreamResponse | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, answers))
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        stop = asyncio.create_task(self._draining.wait())
        stop.add_done_callback(lambda _: reader.cancel())
        try:
            while (response := await answers.get()) is not None:
                yield response
            await reader  # for its error
        finally:
            reader.cancel()
            stop.cancel()

    async def _read(
        self,
        requests: AsyncIterator[edge_pb2.CompressStreamRequest],
        answers: "asyncio.Queue[edge_pb2.CompressStreamResponse | None]",
    ) -> None:
        """Pictures overlap up to the window; beyond it nothing is read, so that the camera feels it."""
        window = asyncio.Semaphore(self._defaults.stream_window)
        running: set[asyncio.Task[None]] = set()
        cut = False
        try:
            async for request in requests:
                await window.acquire()
                task = asyncio.create_task(self._answer_one(request, answers, window))
                running.add(task)
                task.add_done_callback(running.discard)
        except asyncio.CancelledError:
            if not self._draining.is_set():  # the camera went away
                for task in running:
                    task.cancel()
                raise
            cut = True
        await asyncio.gather(*running)
        if cut:
            raise Unavailable("the edge is stopping; every picture that it read was answered, send the others again")

    async def _answer_one(
        self,
        request: edge_pb2.CompressStreamRequest,
        answers: "asyncio.Queue[edge_pb2.CompressStreamResponse | None]",
        window: asyncio.Semaphore,
    ) -> None:
        response = edge_pb2.CompressStreamResponse(request_id=request.request_id)
        try:
            await caller().turn()
            response.receipt.CopyFrom(await self.answer(request.request, wait_for_room=True))
        except SightlineError as error:
            response.error.CopyFrom(status.to_message(error))
        except Exception:
            _log.exception("a picture of a stream failed")
            fault = SightlineError("internal error; the server's log has the details")
            response.error.CopyFrom(status.to_message(fault))
        answers.put_nowait(response)
        window.release()

    async def answer(self, request: edge_pb2.CompressRequest, *, wait_for_room: bool) -> edge_pb2.Receipt:
        """The way of one picture. Raises SightlineError."""
        start = time.perf_counter()
        try:
            order = self._read_order(request)
            caller().require("send", order.camera_id)
            self._defaults.control.require_running(order.camera_id)
            picture = self._read_picture(request)
            with self._defaults.models.using(order.model_id), self._turns.take(order.camera_id) as turn:
                receipt = await self._carry_out(order, picture, turn, wait_for_room)
        except SightlineError as error:
            self._metrics.failed.labels(status.code_of(error).name).inc()
            raise
        self._defaults.control.saw(order.camera_id)
        receipt.timings.total_ms = _ms(time.perf_counter() - start)
        state = edge_pb2.ReceiptState.Name(receipt.state).removeprefix("RECEIPT_STATE_").lower()
        self._metrics.frames.labels(self._metrics.camera(order.camera_id), state).inc()
        return receipt

    async def _carry_out(
        self, order: _Order, picture: ImageFile | RawPicture, turn: Turn, wait_for_room: bool
    ) -> edge_pb2.Receipt:
        if not order.delivers:
            turn.end()
        async with self._engine.admitted(picture, wait=wait_for_room):
            self._metrics.in_flight_bytes.set(self._engine.in_flight_bytes)
            encoded = await self._engine.encode(picture, order.model_id, order.rate)
        self._metrics.in_flight_bytes.set(self._engine.in_flight_bytes)
        self._observe(encoded)
        receipt = _receipt(order, encoded)
        if order.delivers:
            await self._deliver(order, picture, encoded, turn, receipt)
        return receipt

    # -- reading -------------------------------------------------------------------------------------------------

    def _read_order(self, request: edge_pb2.CompressRequest) -> _Order:
        defaults, options = self._defaults, request.options
        camera_id = request.camera_id or DEFAULT_CAMERA
        if not _CAMERA_ID.fullmatch(camera_id):
            raise InvalidInput(f"camera_id must be 1 to 64 characters out of A-Z a-z 0-9 . _ : -, got {camera_id!r}")
        token_bytes = len(request.idempotency_token.encode())
        if token_bytes > MAX_TOKEN_BYTES:
            raise InvalidInput(f"idempotency_token must be at most {MAX_TOKEN_BYTES} bytes, got {token_bytes}")
        if options.delivery not in _DELIVERIES:
            raise InvalidInput(f"delivery must be one of {sorted(_DELIVERIES)}, got {options.delivery}")
        if options.delivery == edge_pb2.DELIVERY_PERSISTED and not defaults.delivers:
            raise Unavailable("DELIVERY_PERSISTED needs a cloud; this edge's setting `cloud` is empty")
        captured_us = wall_clock_us()
        if request.HasField("capture_time"):
            captured_us = _microseconds(request.capture_time, "capture_time")
        max_age_s = defaults.camera_max_age_s.get(camera_id, defaults.frame_max_age_s)
        if options.HasField("max_age"):
            max_age_s = _seconds(options.max_age, "max_age")
        return _Order(
            camera_id=camera_id,
            model_id=self._defaults.models.resolve(options.model_id),
            rate=self._rate(options),
            return_bitstream=options.return_bitstream,
            delivery=options.delivery,
            max_wait_s=_seconds(options.max_wait, "max_wait") if options.HasField("max_wait") else None,
            captured_us=captured_us,
            expires_us=captured_us + int(max_age_s * 1e6) if max_age_s else 0,
            token=request.idempotency_token,
        )

    def _rate(self, options: edge_pb2.CompressOptions) -> Rate:
        rate = options.WhichOneof("rate")
        if rate == "target_bytes":
            if options.target_bytes < 1:
                raise InvalidInput("target_bytes must be at least 1, got 0")
            lowest, highest = self._defaults.control.quality_bounds
            return Rate(target_bytes=options.target_bytes, lowest=lowest, highest=highest)
        pacing = self._defaults.pacing
        if rate is None and _delivers(options.delivery) and pacing is not None:
            quality = pacing.quality()
        else:
            quality = options.quality if rate == "quality" else self._defaults.quality
        # In the steps it is coded in, so that frames that differ by less still share a batch.
        asked = quality_to_steps(quality) / QUALITY_STEP
        return Rate(quality=self._defaults.control.clamp(asked))

    def _read_picture(self, request: edge_pb2.CompressRequest) -> ImageFile | RawPicture:
        kind = request.WhichOneof("image")
        if kind == "encoded":
            return images.open_file(request.encoded, self._defaults.limits)
        if kind == "raw":
            raw = request.raw
            if raw.pixel_format not in _FORMATS:
                known = ", ".join(each.value for each in PixelFormat)
                raise InvalidImage(f"expected a pixel_format out of {known}, got {raw.pixel_format}")
            pixel_format = _FORMATS[raw.pixel_format]
            return images.open_raw(pixel_format, raw.width, raw.height, raw.data, self._defaults.limits)
        raise InvalidImage("expected a picture in `encoded` or `raw`, got neither")

    # -- delivering ----------------------------------------------------------------------------------------------

    async def _deliver(
        self,
        order: _Order,
        picture: ImageFile | RawPicture,
        encoded: Encoded,
        turn: Turn,
        receipt: edge_pb2.Receipt,
    ) -> None:
        """Spools the frame, waits for the cloud where asked for, and says so in the receipt.

        Frames of a camera are handed to the spool in the order in which they came, whichever was coded first.
        """
        start = time.perf_counter()
        if receipt.coded_bytes > self._defaults.max_coded_bytes:
            raise TooLarge(
                f"expected at most {self._defaults.max_coded_bytes} coded bytes, what one message to the cloud may "
                f"hold, got {receipt.coded_bytes}; a lower quality makes fewer"
            )
        content = _content(picture)
        draft = Draft(order.camera_id, order.captured_us, order.expires_us, order.token, content, encoded.bitstream)
        waits = order.delivery == edge_pb2.DELIVERY_PERSISTED
        await turn.come()
        putting = asyncio.create_task(self._spool.put(draft, watch=waits))  # begun in this order, committed together
        turn.end()
        placed, final = await putting
        self._originals.keep(placed.name, picture)
        spooled_s = time.perf_counter() - start
        self._metrics.spool_seconds.observe(spooled_s)
        if self._defaults.pacing is not None and not placed.duplicate:
            self._defaults.pacing.on_spooled(encoded.bitstream)
        _log.debug("spooled", extra=facts(frame=frame_id(order.camera_id, placed.name.epoch, placed.name.seq)))
        receipt.state = edge_pb2.RECEIPT_STATE_SPOOLED
        receipt.frame.CopyFrom(
            common_pb2.FrameName(camera_id=order.camera_id, epoch=placed.name.epoch, seq=placed.name.seq)
        )
        receipt.duplicate = placed.duplicate
        receipt.timings.spool_ms = _ms(spooled_s)
        if self.tracer is not None and not placed.duplicate:
            _trace(self.tracer, order, encoded, placed, spooled_s)
        end = await self._end(order, placed, final)
        if end is not None:
            receipt.state = edge_pb2.RECEIPT_STATE_PERSISTED
            receipt.outcome = common_pb2.Outcome.ValueType(int(end.outcome))
            receipt.outcome_reason = end.reason
            receipt.timings.deliver_ms = _ms(time.perf_counter() - start - spooled_s)

    async def _end(self, order: _Order, placed: Placed, final: "Future[Final] | None") -> Final | None:
        if placed.outcome:
            return Final(placed.id, placed.outcome, placed.reason)
        if final is None:
            return None
        try:
            async with asyncio.timeout(order.max_wait_s):
                return await asyncio.wrap_future(final)
        except TimeoutError:
            return None

    def _observe(self, encoded: Encoded) -> None:
        metrics, bits = self._metrics, encoded.bitstream
        for stage, seconds in (
            ("image", encoded.image_s),
            ("queue", encoded.queue_s),
            ("analyse", encoded.analyse_s),
            ("pack", encoded.pack_s),
        ):
            metrics.encode_seconds.labels(stage).observe(seconds)
        metrics.batch_frames.observe(encoded.batch_frames)
        size = len(bits.hyper) + len(bits.latents)
        metrics.frame_bytes.observe(size)
        metrics.bits_per_pixel.observe(8 * size / (bits.width * bits.height))


def _delivers(delivery: int) -> bool:
    return delivery not in (edge_pb2.DELIVERY_UNSPECIFIED, edge_pb2.DELIVERY_NONE)


def _receipt(order: _Order, encoded: Encoded) -> edge_pb2.Receipt:
    bits = encoded.bitstream
    file = bitstream.to_bytes(bits)
    return edge_pb2.Receipt(
        state=edge_pb2.RECEIPT_STATE_ENCODED,
        model_id=bits.model_id,
        width=bits.width,
        height=bits.height,
        quality=bits.quality / QUALITY_STEP,
        coded_bytes=len(file),
        bits_per_pixel=8 * len(file) / (bits.width * bits.height),
        timings=edge_pb2.EdgeTimings(
            image_decode_ms=_ms(encoded.image_s),
            queue_ms=_ms(encoded.queue_s),
            analyse_ms=_ms(encoded.analyse_s),
            pack_ms=_ms(encoded.pack_s),
        ),
        bitstream=file if order.return_bitstream else b"",
    )


def _trace(tracer: Tracer, order: _Order, encoded: Encoded, placed: Placed, spooled_s: float) -> None:
    """The edge's span of a spooled frame, which ends now."""
    stages = [
        Stage("image", encoded.image_s),
        Stage("queue", encoded.queue_s),
        Stage("analyse", encoded.analyse_s),
        Stage("pack", encoded.pack_s),
        Stage("spool", spooled_s),
    ]
    bits = encoded.bitstream
    tracer.record(
        frame_id(order.camera_id, placed.name.epoch, placed.name.seq),
        FIRST_SPAN,
        seconds=sum(stage.seconds for stage in stages),
        stages=stages,
        attributes={
            "sightline.camera": order.camera_id,
            "sightline.model": bits.model_id,
            "sightline.quality": bits.quality / QUALITY_STEP,
            "sightline.coded_bytes": len(bits.hyper) + len(bits.latents),
        },
    )


def _content(picture: ImageFile | RawPicture) -> bytes:
    """What an idempotency token stands for: SHA-256 over the picture as it came."""
    digest = hashlib.sha256(picture.data)
    if isinstance(picture, RawPicture):
        digest.update(f"{picture.pixel_format.value} {picture.width} {picture.height}".encode())
    return digest.digest()


def _microseconds(time_: Timestamp, name: str) -> int:
    """Since 1970 UTC. Raises InvalidInput outside the years 1970 to 9999."""
    if not (0 <= time_.seconds < 253_402_300_800 and 0 <= time_.nanos < 1_000_000_000):
        raise InvalidInput(f"{name} must be a time from 1970 to 9999, got {time_.seconds} s and {time_.nanos} ns")
    return time_.seconds * 1_000_000 + time_.nanos // 1000


def _seconds(duration: Duration, name: str) -> float:
    """Raises InvalidInput unless it is positive and below 10 years."""
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 < seconds < 315_360_000:
        raise InvalidInput(f"{name} must be more than 0 and less than 10 years, got {seconds} s")
    return seconds


def _ms(seconds: float) -> float:
    return seconds * 1000
