"""The border between the clients' dataclasses and protobuf: every conversion stands here, once, in both directions."""

import math
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from sightline.v1 import common_pb2, detection_pb2, edge_pb2, ingest_pb2

from shared.clients.types import (
    Box,
    CloudTimings,
    CompressOptions,
    Cursor,
    Delivery,
    Detected,
    Detection,
    DetectionEvent,
    EdgeTimings,
    EventFilter,
    FrameName,
    Mask,
    Outcome,
    Progress,
    Receipt,
    ReceiptState,
    Reviewed,
    Start,
    TaskResult,
)
from shared.codec.types import quality_to_steps
from shared.errors import InvalidImage, InvalidInput, SightlineError

# A JPEG, PNG or WebP file, as its bytes or its path; or pixels: uint8 [height, width, 3] RGB or [height, width] grey.
Picture: TypeAlias = bytes | Path | NDArray[np.uint8]
# Where a subscription starts: after a cursor, at a time (aware), or at an end of the log.
StartAt: TypeAlias = Cursor | datetime | Start

_DELIVERIES = {
    Delivery.NONE: edge_pb2.DELIVERY_NONE,
    Delivery.SPOOLED: edge_pb2.DELIVERY_SPOOLED,
    Delivery.PERSISTED: edge_pb2.DELIVERY_PERSISTED,
}
_STATES = {
    edge_pb2.RECEIPT_STATE_ENCODED: ReceiptState.ENCODED,
    edge_pb2.RECEIPT_STATE_SPOOLED: ReceiptState.SPOOLED,
    edge_pb2.RECEIPT_STATE_PERSISTED: ReceiptState.PERSISTED,
}
_OUTCOMES = {
    Outcome.DETECTIONS: common_pb2.OUTCOME_DETECTIONS,
    Outcome.REJECTED: common_pb2.OUTCOME_REJECTED,
    Outcome.EXPIRED: common_pb2.OUTCOME_EXPIRED,
    Outcome.DROPPED: common_pb2.OUTCOME_DROPPED,
}
_OUTCOME_OF = {number: outcome for outcome, number in _OUTCOMES.items()}
_POSITIONS = {
    Start.BEGINNING: detection_pb2.START_POSITION_BEGINNING,
    Start.END: detection_pb2.START_POSITION_END,
}


def compress_request(
    camera_id: str, picture: Picture, options: CompressOptions, capture_time: datetime | None, token: str
) -> edge_pb2.CompressRequest:
    """A request that may be sent again: one that spools always has an idempotency token.

    Raises InvalidImage, InvalidInput, and OSError for a path that cannot be read.
    """
    request = edge_pb2.CompressRequest(
        camera_id=camera_id,
        options=_options(options),
        idempotency_token=token or ("" if options.delivery is Delivery.NONE else uuid.uuid4().hex),
    )
    if isinstance(picture, Path):
        request.encoded = picture.read_bytes()
    elif isinstance(picture, np.ndarray):
        request.raw.CopyFrom(_raw(picture))
    else:
        request.encoded = picture
    if capture_time is not None:
        request.capture_time.CopyFrom(_timestamp(capture_time, "capture_time"))
    return request


def receipt(message: edge_pb2.Receipt) -> Receipt:
    timings = message.timings
    if message.state not in _STATES:
        raise SightlineError(f"expected a receipt's state out of {', '.join(ReceiptState)}, got {message.state}")
    return Receipt(
        state=_STATES[message.state],
        frame=_frame_name(message.frame) if message.HasField("frame") else None,
        model_id=message.model_id,
        width=message.width,
        height=message.height,
        quality=message.quality,
        coded_bytes=message.coded_bytes,
        bits_per_pixel=message.bits_per_pixel,
        timings=EdgeTimings(
            image_decode_ms=timings.image_decode_ms,
            queue_ms=timings.queue_ms,
            analyse_ms=timings.analyse_ms,
            pack_ms=timings.pack_ms,
            spool_ms=timings.spool_ms,
            deliver_ms=timings.deliver_ms,
            total_ms=timings.total_ms,
        ),
        bitstream=message.bitstream,
        outcome=_OUTCOME_OF.get(message.outcome),
        outcome_reason=message.outcome_reason,
        duplicate=message.duplicate,
    )


def subscribe_request(start: StartAt, event_filter: EventFilter) -> detection_pb2.SubscribeRequest:
    """Raises InvalidInput."""
    request = detection_pb2.SubscribeRequest(
        filter=detection_pb2.EventFilter(
            camera_ids=event_filter.camera_ids,
            category_ids=event_filter.category_ids,
            min_score=event_filter.min_score,
            outcomes=[_OUTCOMES[outcome] for outcome in event_filter.outcomes],
        )
    )
    if isinstance(start, Cursor):
        request.after.CopyFrom(detection_pb2.Cursor(log_id=start.log_id, sequence=start.sequence))
    elif isinstance(start, datetime):
        request.start_time.CopyFrom(_timestamp(start, "start"))
    else:
        request.position = _POSITIONS[start]
    return request


def update(message: detection_pb2.SubscribeResponse) -> DetectionEvent | Progress | None:
    """None for a kind of message that is newer than this client."""
    kind = message.WhichOneof("message")
    if kind == "event":
        return _event(message.event)
    if kind == "progress":
        return Progress(_cursor(message.progress.cursor), message.progress.caught_up)
    return None


def detected(message: detection_pb2.DetectResponse) -> Detected:
    return Detected(
        results=tuple(map(_task_result, message.results)),
        width=message.width,
        height=message.height,
        model_id=message.model_id,
        quality=message.quality,
        image_png=message.image_png,
        timings=_cloud_timings(message.timings),
    )


def review_request(frame: FrameName, quality: float | None, return_bitstream: bool) -> detection_pb2.ReviewRequest:
    """Raises InvalidQuality."""
    if quality is not None:
        quality_to_steps(quality)  # 0 would say "as it was seen"
    return detection_pb2.ReviewRequest(
        frame=common_pb2.FrameName(camera_id=frame.camera_id, epoch=frame.epoch, seq=frame.seq),
        quality=quality or 0.0,
        return_bitstream=return_bitstream,
    )


def reviewed(message: detection_pb2.ReviewResponse) -> Reviewed:
    return Reviewed(
        image_png=message.image_png,
        width=message.width,
        height=message.height,
        model_id=message.model_id,
        quality=message.quality,
        bitstream=message.bitstream,
    )


def categories(message: ingest_pb2.ListModelsResponse) -> dict[int, str]:
    return {number: name for task in message.tasks for number, name in task.categories.items()}


def _options(options: CompressOptions) -> edge_pb2.CompressOptions:
    message = edge_pb2.CompressOptions(
        return_bitstream=options.return_bitstream, delivery=_DELIVERIES[options.delivery], model_id=options.model_id
    )
    if options.quality is not None:
        message.quality = options.quality
    if options.target_bytes is not None:
        if not 0 <= options.target_bytes < 1 << 32:
            raise InvalidInput(f"expected target_bytes below 2^32, got {options.target_bytes}")
        message.target_bytes = options.target_bytes
    if options.max_wait_s is not None:
        message.max_wait.CopyFrom(_duration(options.max_wait_s, "max_wait_s"))
    if options.max_age_s is not None:
        message.max_age.CopyFrom(_duration(options.max_age_s, "max_age_s"))
    return message


def _raw(pixels: NDArray[np.uint8]) -> edge_pb2.RawImage:
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InvalidImage(
            f"expected uint8 [height, width, 3] or [height, width], got {pixels.dtype} {list(pixels.shape)}"
        )
    return edge_pb2.RawImage(
        pixel_format=edge_pb2.PIXEL_FORMAT_GRAY8 if grey else edge_pb2.PIXEL_FORMAT_RGB24,
        width=pixels.shape[1],
        height=pixels.shape[0],
        data=pixels.tobytes(),
    )


def _event(message: detection_pb2.DetectionEvent) -> DetectionEvent:
    if message.outcome not in _OUTCOME_OF:
        raise SightlineError(f"expected an outcome out of {', '.join(Outcome)}, got {message.outcome}")
    return DetectionEvent(
        cursor=_cursor(message.cursor),
        frame=_frame_name(message.frame),
        edge_id=message.edge_id,
        capture_time=_datetime(message, "capture_time"),
        received_time=_datetime(message, "received_time"),
        persisted_time=_datetime(message, "persisted_time"),
        outcome=_OUTCOME_OF[message.outcome],
        reason=message.reason,
        width=message.width,
        height=message.height,
        model_id=message.model_id,
        quality=message.quality,
        payload_bytes=message.payload_bytes,
        results=tuple(map(_task_result, message.results)),
        timings=_cloud_timings(message.timings),
    )


def _task_result(message: detection_pb2.TaskResult) -> TaskResult:
    return TaskResult(
        task=message.task,
        kind=message.kind,
        model_id=message.model_id,
        detections=tuple(map(_detection, message.detections)),
        task_ms=message.task_ms,
        batch_size=message.batch_size,
    )


def _detection(message: detection_pb2.Detection) -> Detection:
    box, mask = message.box, message.mask
    return Detection(
        box=Box(box.x_min, box.y_min, box.x_max, box.y_max),
        score=message.score,
        category_id=message.category_id,
        label=message.label,
        mask=Mask(mask.height, mask.width, mask.counts) if message.HasField("mask") else None,
    )


def _cloud_timings(message: detection_pb2.CloudTimings) -> CloudTimings:
    return CloudTimings(
        queue_ms=message.queue_ms,
        unpack_ms=message.unpack_ms,
        synthesise_ms=message.synthesise_ms,
        task_ms=message.task_ms,
        total_ms=message.total_ms,
    )


def _frame_name(message: common_pb2.FrameName) -> FrameName:
    return FrameName(message.camera_id, message.epoch, message.seq)


def _cursor(message: detection_pb2.Cursor) -> Cursor:
    return Cursor(message.log_id, message.sequence)


def _datetime(message: detection_pb2.DetectionEvent, name: str) -> datetime | None:
    value: Timestamp = getattr(message, name)
    return value.ToDatetime(UTC) if message.HasField(name) else None  # type: ignore[arg-type]


def _timestamp(value: datetime, name: str) -> Timestamp:
    if value.tzinfo is None:
        raise InvalidInput(f"expected {name} with a time zone, got {value.isoformat()} without")
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def _duration(seconds: float, name: str) -> Duration:
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidInput(f"expected {name} above 0 seconds, got {seconds}")
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
