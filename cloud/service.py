"""What consumers call: Subscribe, from the log, Detect, past it, and Review, for a person's eyes."""

import asyncio
import io
import time
from typing import Any

import grpc
from PIL import Image
from sightline.v1 import detection_pb2, detection_pb2_grpc

from cloud import events
from cloud.detections.log import DetectionLog, FrameName
from cloud.detections.subscribe import EventFilter, Limits, Subscription, start_position
from cloud.metrics import CloudMetrics
from cloud.pipeline import Pipeline
from cloud.review import Reviewer
from shared.codec import bitstream as bits
from shared.codec.types import QUALITY_STEP, Frame, quality_to_steps
from shared.errors import InvalidInput, Overloaded, TooLarge, Unavailable
from shared.rpc.access import caller


class DetectionService(detection_pb2_grpc.DetectionServiceServicer):
    """Serves once `open` has given it a pipeline and a log; until then callers are told UNAVAILABLE.

    `stop` ends subscriptions once they have given all there is; it is set when no more events will come.
    """

    def __init__(self, limits: Limits, max_subscribers: int, metrics: CloudMetrics) -> None:
        self.stop = asyncio.Event()
        self._limits = limits
        self._max_subscribers = max_subscribers
        self._metrics = metrics
        self._opened: tuple[Pipeline, DetectionLog] | None = None
        self._reviewer: Reviewer | None = None
        self._subscriptions: dict[Subscription, str] = {}  # and the consumer's identity
        metrics.subscribers.set_function(lambda: len(self._subscriptions))
        metrics.subscriber_lag.set_function(
            lambda: max((subscription.lag for subscription in tuple(self._subscriptions)), default=0)
        )

    def open(self, pipeline: Pipeline, log: DetectionLog, reviewer: Reviewer) -> None:
        self._opened = pipeline, log
        self._reviewer = reviewer

    @property
    def subscriptions(self) -> dict[Subscription, str]:
        """Those that are open, and whose."""
        return dict(self._subscriptions)

    async def Subscribe(  # type: ignore[override]  # grpc.aio takes a coroutine that writes as well as a generator
        self,
        request: detection_pb2.SubscribeRequest,
        context: "grpc.aio.ServicerContext[detection_pb2.SubscribeRequest, detection_pb2.SubscribeResponse]",
    ) -> None:
        _, log = self._ready()
        if len(self._subscriptions) >= self._max_subscribers:
            raise Overloaded(f"{len(self._subscriptions)} subscriptions are open, the limit is {self._max_subscribers}")
        consumer = caller()
        for camera in request.filter.camera_ids:
            consumer.require("subscribe", camera)

        def may_see(camera: str) -> bool:
            consumer.require("subscribe")  # taken back: the subscription ends
            return consumer.may("subscribe", camera)

        event_filter = EventFilter.from_proto(request.filter, may_see)
        after = await start_position(log, request)
        await context.send_initial_metadata(
            ()
        )  # gRPC cannot abort a call while its first write, with these, is under way
        subscription = Subscription(log, after, event_filter, self._limits)
        self._subscriptions[subscription] = consumer.name
        try:
            await subscription.run(context.write, self.stop)
        finally:
            del self._subscriptions[subscription]

    async def Detect(self, request: detection_pb2.DetectRequest, context: Any) -> detection_pb2.DetectResponse:
        start = time.perf_counter()
        pipeline, _ = self._ready()
        if not 0.0 <= request.min_score <= 1.0:  # also false for NaN
            raise InvalidInput(f"min_score must be in [0, 1], got {request.min_score}")
        limits = pipeline.limits
        if len(request.bitstream) > limits.max_frame_bytes:
            raise TooLarge(f"expected at most {limits.max_frame_bytes} coded bytes, got {len(request.bitstream)}")
        inference = pipeline.inference
        coded = bits.from_bytes(request.bitstream, inference.codecs.keys(), max_pixels=limits.max_pixels)
        # Each caller's address takes turns like a camera.
        caller = f"detect {context.peer().rpartition(':')[0]}"
        inferred = await inference.infer(
            caller, coded, list(request.tasks) or pipeline.tasks, min_score=request.min_score
        )
        if inferred is None:
            raise Unavailable("the request's time was over before its batch began")
        response = detection_pb2.DetectResponse(
            results=await asyncio.to_thread(events.task_results, inferred),
            width=coded.width,
            height=coded.height,
            model_id=coded.model_id,
            quality=coded.quality / QUALITY_STEP,
            timings=events.timings(inferred, time.perf_counter() - start),
        )
        if request.return_image:
            response.image_png = await asyncio.to_thread(_to_png, inferred.frame)
        return response

    async def Review(self, request: detection_pb2.ReviewRequest, context: Any) -> detection_pb2.ReviewResponse:
        self._ready()
        assert self._reviewer is not None  # noqa: S101 - opened with the rest
        caller().require("subscribe", request.frame.camera_id)
        name = FrameName(request.frame.camera_id, request.frame.epoch, request.frame.seq)
        if request.quality:
            seen = await self._reviewer.again(name, quality_to_steps(request.quality))
        else:
            seen = await self._reviewer.as_seen(name)
        coded = seen.bitstream
        return detection_pb2.ReviewResponse(
            image_png=await asyncio.to_thread(_to_png, seen.frame),
            width=coded.width,
            height=coded.height,
            model_id=coded.model_id,
            quality=coded.quality / QUALITY_STEP,
            bitstream=bits.to_bytes(coded) if request.return_bitstream else b"",
        )

    def _ready(self) -> tuple[Pipeline, DetectionLog]:
        if self._opened is None:
            raise Unavailable("the models are still loading; call again in a moment")
        return self._opened


def _to_png(frame: Frame) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame.rgb).save(out, "PNG", compress_level=1)
    return out.getvalue()
