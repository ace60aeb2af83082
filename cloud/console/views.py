"""Events as the console's page reads them: JSON with short numbers. Times are milliseconds since 1970."""

from typing import Any

from sightline.v1 import common_pb2, detection_pb2

from cloud.detections.log import Record
from cloud.events import outcome_label

COUNTED_SCORE = 0.5  # objects are drawn and counted from this score on


def of_event(event: detection_pb2.DetectionEvent, record: Record) -> dict[str, Any]:
    """One event with everything that is drawn of it. An epoch is hex: JavaScript's numbers end at 2^53."""
    return {
        "sequence": record.sequence,
        "camera": record.name.camera,
        "epoch": f"{record.name.epoch:016x}",
        "frame": str(record.name.seq),
        "edge": event.edge_id,
        "captured": event.capture_time.ToMicroseconds() / 1e3 or None,
        "logged": record.logged_ns // 1_000_000,
        "latency": latency_ms(event, record.logged_ns),
        "outcome": outcome_label(event.outcome),
        "reason": event.reason,
        "width": event.width,
        "height": event.height,
        "bytes": event.payload_bytes,
        "quality": round(event.quality, 2),
        "model": event.model_id,
        "objects": counted(event),
        "timings": _timings(event.timings),
        "results": [_result(result) for result in event.results],
    }


def latency_ms(event: detection_pb2.DetectionEvent, logged_ns: int) -> float | None:
    """From capture, by the edge's clock, to the record on disk; None where either is unknown."""
    captured_us = event.capture_time.ToMicroseconds()
    if not captured_us or event.outcome != common_pb2.OUTCOME_DETECTIONS:
        return None
    return round(max(0.0, logged_ns / 1e6 - captured_us / 1e3), 1)


def counted(event: detection_pb2.DetectionEvent) -> dict[str, int]:
    """How many of each class the first task found, most frequent first."""
    counts: dict[str, int] = {}
    for found in event.results[0].detections if event.results else ():
        if found.score >= COUNTED_SCORE:
            counts[found.label] = counts.get(found.label, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _timings(timings: detection_pb2.CloudTimings) -> dict[str, float]:
    stages = ("queue_ms", "unpack_ms", "synthesise_ms", "task_ms", "total_ms")
    return {stage: round(getattr(timings, stage), 1) for stage in stages}


def _result(result: detection_pb2.TaskResult) -> dict[str, Any]:
    return {"task": result.task, "kind": result.kind, "objects": [_object(found) for found in result.detections]}


def _object(found: detection_pb2.Detection) -> dict[str, Any]:
    box = found.box
    shown: dict[str, Any] = {
        "label": found.label,
        "category": found.category_id,
        "score": round(found.score, 3),
        "box": [round(side, 1) for side in (box.x_min, box.y_min, box.x_max, box.y_max)],
    }
    if found.mask.counts:
        shown["mask"] = found.mask.counts.decode("ascii")
    return shown
