"""The events of the detection log, and the parts of them that Detect answers with: from typed results to protobuf."""

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from sightline.v1 import common_pb2, detection_pb2

from cloud.inference import Inferred, TaskOutput
from cloud.masks import encode_mask
from cloud.tasks.types import Detections
from shared.codec.types import QUALITY_STEP, Bitstream

_LAST_US = 253_402_300_799_999_999  # the end of the year 9999


def task_results(inferred: Inferred) -> list[detection_pb2.TaskResult]:
    """What each task found. Encoding masks takes milliseconds: not for the event loop."""
    return [_task_result(output, inferred.batch_size) for output in inferred.outputs]


def timings(inferred: Inferred, total_s: float) -> detection_pb2.CloudTimings:
    """Where the time went; `total_s` from receipt to now."""
    return detection_pb2.CloudTimings(
        queue_ms=inferred.queue_s * 1e3,
        unpack_ms=inferred.unpack_s * 1e3,
        synthesise_ms=inferred.synthesise_s * 1e3,
        task_ms=sum(output.task_s for output in inferred.outputs) * 1e3,
        total_ms=total_s * 1e3,
    )


def describe_bitstream(event: detection_pb2.DetectionEvent, bitstream: Bitstream) -> None:
    """Fills in what is known of a frame from its bitstream alone."""
    event.width = bitstream.width
    event.height = bitstream.height
    event.model_id = bitstream.model_id
    event.quality = bitstream.quality / QUALITY_STEP
    event.payload_bytes = len(bitstream.hyper) + len(bitstream.latents)


def from_micros(unix_us: int) -> Timestamp:
    """Microseconds since 1970 as a timestamp; what a timestamp cannot hold becomes the nearest that it can."""
    stamp = Timestamp()
    stamp.FromMicroseconds(min(max(unix_us, 0), _LAST_US))
    return stamp


def outcome_label(outcome: int) -> str:
    """An Outcome's name in small letters, for metrics and logs."""
    return common_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_").lower()  # type: ignore[arg-type]


def _task_result(output: TaskOutput, batch_size: int) -> detection_pb2.TaskResult:
    return detection_pb2.TaskResult(
        task=output.task.name,
        kind=str(output.task.kind),
        model_id=output.task.model_id,
        detections=_detections(output.detections),
        task_ms=output.task_s * 1e3,
        batch_size=batch_size,
    )


def _detections(found: Detections) -> Sequence[detection_pb2.Detection]:
    masks = found.masks
    return [
        detection_pb2.Detection(
            box=detection_pb2.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3]),
            score=score,
            category_id=category,
            label=label,
            mask=None
            if masks is None
            else detection_pb2.Mask(height=masks.shape[1], width=masks.shape[2], counts=encode_mask(masks[i].numpy())),
        )
        for i, (box, score, category, label) in enumerate(
            zip(found.boxes.tolist(), found.scores.tolist(), found.category_ids.tolist(), found.labels, strict=True)
        )
    ]
