"""An event as what leaves the program: one JSON object, or one flat row for each detection."""

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.clients import Detection, DetectionEvent

# Columns of a flat row and their types. Times are UTC, boxes in pixels. An event without a detection is one row whose
# columns from `task` on are empty, so that pictures in which nothing was found are counted too.
COLUMNS: dict[str, type] = {
    "sequence": int,
    "camera": str,
    "epoch": str,
    "seq": int,
    "captured": datetime,
    "persisted": datetime,
    "outcome": str,
    "width": int,
    "height": int,
    "quality": float,
    "payload_bytes": int,
    "task": str,
    "label": str,
    "category_id": int,
    "score": float,
    "x_min": float,
    "y_min": float,
    "x_max": float,
    "y_max": float,
}


def as_json(event: "DetectionEvent") -> dict[str, Any]:
    """All of an event. Boxes are [x_min, y_min, x_max, y_max] in pixels, masks COCO's compressed RLE, times ISO."""
    return {
        "cursor": str(event.cursor),
        "frame": str(event.frame),
        "camera": event.frame.camera_id,
        "seq": event.frame.seq,
        "edge": event.edge_id,
        "captured": iso(event.capture_time),
        "received": iso(event.received_time),
        "persisted": iso(event.persisted_time),
        "outcome": event.outcome.value,
        "reason": event.reason,
        "width": event.width,
        "height": event.height,
        "quality": event.quality,
        "payload_bytes": event.payload_bytes,
        "model_id": event.model_id,
        "results": [
            {
                "task": result.task,
                "kind": result.kind,
                "model_id": result.model_id,
                "detections": [detection_json(one) for one in result.detections],
            }
            for result in event.results
        ],
    }


def detection_json(found: "Detection") -> dict[str, Any]:
    box = found.box
    told: dict[str, Any] = {
        "label": found.label,
        "category_id": found.category_id,
        "score": round(found.score, 4),
        "box": [round(side, 2) for side in (box.x_min, box.y_min, box.x_max, box.y_max)],
    }
    if found.mask is not None:
        told["mask"] = {"size": [found.mask.height, found.mask.width], "counts": found.mask.counts.decode("ascii")}
    return told


def as_rows(event: "DetectionEvent") -> list[dict[str, Any]]:
    """Rows with COLUMNS, None where there is nothing."""
    frame = {
        "sequence": event.cursor.sequence,
        "camera": event.frame.camera_id,
        "epoch": f"{event.frame.epoch:016x}",
        "seq": event.frame.seq,
        "captured": event.capture_time,
        "persisted": event.persisted_time,
        "outcome": event.outcome.value,
        "width": event.width,
        "height": event.height,
        "quality": event.quality,
        "payload_bytes": event.payload_bytes,
    }
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    rows = [
        {
            **frame,
            "task": result.task,
            "label": found.label,
            "category_id": found.category_id,
            "score": found.score,
            "x_min": found.box.x_min,
            "y_min": found.box.y_min,
            "x_max": found.box.x_max,
            "y_max": found.box.y_max,
        }
        for result in event.results
        for found in result.detections
    ]
    return rows or [empty | frame]


def counted(event: "DetectionEvent", min_score: float) -> str:
    """What was found with at least `min_score`, most frequent first: "2 person, car"."""
    counts = Counter(one.label for one in event.detections if one.score >= min_score)
    return ", ".join(f"{number} {label}" if number > 1 else label for label, number in counts.most_common())


def iso(time: datetime | None) -> str | None:
    return time.isoformat() if time else None
