"""What the console knows of each camera: its last event and five minutes of history, folded from the detection log.

The log is the source, not the pipeline: what is shown is what is on disk, of every replica that writes the same log. A
wall lives while somebody watches; opened again, it is folded anew from the log.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sightline.v1 import common_pb2, detection_pb2

from cloud.console.views import COUNTED_SCORE, latency_ms, of_event
from cloud.detections.log import FrameName, Record

WINDOW_S = 300
BUCKET_S = 2
_BUCKETS = WINDOW_S // BUCKET_S
_FORGET_S = 24 * 3600  # a camera that sent nothing for this long leaves the wall


@dataclass(slots=True)
class Bucket:
    """`BUCKET_S` seconds of one camera. `at`: Unix seconds of its beginning, a multiple of BUCKET_S."""

    at: int
    frames: int = 0
    failed: int = 0
    payload_bytes: int = 0
    pixels: int = 0
    objects: int = 0
    latency_ms: float = 0.0
    timed: int = 0

    def row(self) -> list[float | None]:
        """[at, frames/s, kbit/s, bit per pixel, latency in ms, objects a frame]; None where nothing was measured."""
        return [
            self.at,
            round(self.frames / BUCKET_S, 2),
            round(8e-3 * self.payload_bytes / BUCKET_S, 2),
            round(8 * self.payload_bytes / self.pixels, 4) if self.pixels else None,
            round(self.latency_ms / self.timed, 1) if self.timed else None,
            round(self.objects / self.frames, 2) if self.frames else None,
        ]


@dataclass(slots=True)
class Camera:
    """One camera. `version` rises with each event; `pictured` is its last event whose picture is at hand."""

    name: str
    version: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    pictured: dict[str, Any] | None = None
    buckets: list[Bucket] = field(default_factory=list)
    _told: tuple[int, str] = (0, "")

    def fold(self, record: Record, event: detection_pb2.DetectionEvent, *, at_hand: bool) -> None:
        self.version = record.sequence
        self.latest = of_event(event, record)
        if at_hand:
            self.pictured = self.latest
        self._count(record, event)

    def _count(self, record: Record, event: detection_pb2.DetectionEvent) -> None:
        at = record.logged_ns // 1_000_000_000 // BUCKET_S * BUCKET_S
        if not self.buckets or self.buckets[-1].at != at:
            self.buckets.append(Bucket(at))
            del self.buckets[:-_BUCKETS]
        bucket = self.buckets[-1]
        if event.outcome != common_pb2.OUTCOME_DETECTIONS:
            bucket.failed += 1
            return
        bucket.frames += 1
        bucket.payload_bytes += event.payload_bytes
        bucket.pixels += event.width * event.height
        if event.results:
            bucket.objects += sum(found.score >= COUNTED_SCORE for found in event.results[0].detections)
        taken_ms = latency_ms(event, record.logged_ns)
        if taken_ms is not None:
            bucket.latency_ms += taken_ms
            bucket.timed += 1

    def whole(self) -> str:
        """Everything, as JSON."""
        return self._json([bucket.row() for bucket in self.buckets])

    def news(self) -> str:
        """What an event changes, as JSON: the last buckets stand for the history."""
        version, text = self._told
        if version != self.version:
            text = self._json([bucket.row() for bucket in self.buckets[-2:]])
            self._told = (self.version, text)
        return text

    def _json(self, rows: list[list[float | None]]) -> str:
        shown = self.pictured or self.latest
        latest = {key: value for key, value in self.latest.items() if key != "results"}
        fields = {"id": self.name, "latest": latest, "shown": shown, "rows": rows}
        return json.dumps(fields, separators=(",", ":"))


class Wall:
    """Every camera of the last minutes. `at_hand` tells whether a frame's picture can be had at no cost."""

    def __init__(self, at_hand: Callable[[FrameName], bool]) -> None:
        self.cameras: dict[str, Camera] = {}
        self.version = 0  # sequence of the last record folded
        self._at_hand = at_hand

    def fold(self, records: Iterable[Record]) -> None:
        """Takes the log's next records."""
        now_ns = 0
        for record in records:
            camera = self.cameras.get(record.name.camera)
            if camera is None:
                camera = self.cameras[record.name.camera] = Camera(record.name.camera)
            event = detection_pb2.DetectionEvent.FromString(record.event)
            camera.fold(record, event, at_hand=self._at_hand(record.name))
            self.version, now_ns = record.sequence, record.logged_ns
        oldest_ms = now_ns / 1e6 - 1000 * _FORGET_S
        for name in [name for name, camera in self.cameras.items() if camera.latest["logged"] < oldest_ms]:
            del self.cameras[name]

    def whole(self, may_see: Callable[[str], bool]) -> str:
        """All that this viewer may see, as JSON."""
        cameras = ",".join(camera.whole() for name, camera in sorted(self.cameras.items()) if may_see(name))
        now_ms = time.time_ns() // 1_000_000
        return f'{{"now":{now_ms},"bucket_s":{BUCKET_S},"window_s":{WINDOW_S},"cameras":[{cameras}]}}'

    def news(self, since: int, may_see: Callable[[str], bool]) -> str:
        """The cameras with an event after sequence `since`, as JSON; "" if there is none."""
        cameras = [camera.news() for name, camera in self.cameras.items() if camera.version > since and may_see(name)]
        return f'{{"cameras":[{",".join(cameras)}]}}' if cameras else ""
