"""The edge's own Prometheus metrics. A camera chooses its id, so that label is bounded."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sightline.v1 import ingest_pb2

from edge.models import Loaded
from edge.spool import Stats
from shared.metrics import BPP_BUCKETS, BYTES_BUCKETS, SECONDS_BUCKETS, BoundedLabel, gauge

MAX_CAMERA_LABELS = 200


class EdgeMetrics:
    """One set a server, in that server's registry. `spool` gives the spool's latest figures."""

    def __init__(self, registry: CollectorRegistry, spool: Callable[[], Stats]) -> None:
        self.camera = BoundedLabel(MAX_CAMERA_LABELS)
        self.frames = Counter(
            "sightline_edge_frames", "Pictures answered, by camera and state of the receipt.", ["camera", "state"],
            registry=registry,
        )  # fmt: skip
        self.failed = Counter(
            "sightline_edge_frames_failed", "Pictures refused, by gRPC status.", ["code"], registry=registry
        )
        self.encode_seconds = Histogram(
            "sightline_edge_encode_seconds",
            "Stages of encoding: image, queue, analyse (transforms; of a whole batch), pack (entropy coding).",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.batch_frames = Histogram(
            "sightline_edge_batch_frames", "For each frame: how many passed the transforms with it, itself included.",
            buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry,
        )  # fmt: skip
        self.frame_bytes = Histogram(
            "sightline_edge_frame_bytes", "Coded size of a frame.", buckets=BYTES_BUCKETS, registry=registry
        )
        self.bits_per_pixel = Histogram(
            "sightline_edge_bits_per_pixel", "Coded size of a frame.", buckets=BPP_BUCKETS, registry=registry
        )
        self.in_flight_bytes = Gauge("sightline_edge_in_flight_bytes", "Pictures in work, as RGB.", registry=registry)
        self.spool_seconds = Histogram(
            "sightline_edge_spool_seconds", "Until a frame was on the disk.", buckets=SECONDS_BUCKETS, registry=registry
        )
        self.uplink_connected = Gauge(
            "sightline_edge_uplink_connected", "1 while the cloud has welcomed this edge.", registry=registry
        )
        self.uplink_in_flight_frames = Gauge(
            "sightline_edge_uplink_in_flight_frames", "Frames sent and not finally acknowledged.", registry=registry
        )
        self.uplink_sent_bytes = Counter(
            "sightline_edge_uplink_sent_bytes", "Both streams of frames sent, resends included.", registry=registry
        )
        self.uplink_sent_frames = Counter(
            "sightline_edge_uplink_sent_frames", "Frames sent, resends included.", registry=registry
        )
        self.uplink_capacity = Gauge(
            "sightline_edge_uplink_capacity_bits_per_second",
            "What the link to the cloud is taken to carry, at most the budget; 0 without a budget.",
            registry=registry,
        )
        self.paced_quality = Gauge(
            "sightline_edge_paced_quality", "Quality that the last frame got from the budget.", registry=registry
        )
        self.uplink_acks = Counter(
            "sightline_edge_uplink_acks", "Acknowledgements, by kind and reason.", ["kind", "reason"], registry=registry
        )
        self.uplink_connects = Counter(
            "sightline_edge_uplink_connects", "Upload streams opened, by how they ended.", ["end"], registry=registry
        )
        self.uplink_poison_frames = Counter(
            "sightline_edge_uplink_poison_frames", "Frames given up because the cloud fell over each of them.",
            registry=registry,
        )  # fmt: skip
        self._registry = registry
        for name, text, value in (
            ("frames", "Frames without a final acknowledgement.", lambda: spool().frames),
            ("used_bytes", "Pages of the spool in use.", lambda: spool().used_bytes),
            ("writable", "0 while the disk is full or broken.", lambda: spool().writable),
            ("oldest_age_seconds", "Age of the oldest frame in the spool.", lambda: _age_s(spool())),
        ):
            gauge(registry, f"sightline_edge_spool_{name}", text, value)
        registry.register(_SpoolTally(spool))
        self._begin_at_zero()

    def follow_models(self, loaded: Callable[[], Sequence[Loaded]]) -> None:
        """Shows the bundles that are loaded now, which may change."""
        self._registry.register(_ModelInfo(loaded))

    def _begin_at_zero(self) -> None:
        self.uplink_acks.labels("persisted", "")
        for value in ingest_pb2.RejectReason.values()[1:]:
            self.uplink_acks.labels("rejected", ack_label(ingest_pb2.RejectReason, value, "REJECT_REASON_"))
        for retry in ingest_pb2.RetryReason.values()[1:]:
            self.uplink_acks.labels("retry_later", ack_label(ingest_pb2.RetryReason, retry, "RETRY_REASON_"))
        for code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ALREADY_EXISTS", "UNAVAILABLE"):
            self.failed.labels(code)
        for end in ("ok", "unavailable", "stalled", "failed"):
            self.uplink_connects.labels(end)


class _ModelInfo(Collector):
    """One sample a bundle, gone when it is."""

    def __init__(self, loaded: Callable[[], Sequence[Loaded]]) -> None:
        self._loaded = loaded

    def collect(self) -> list[GaugeMetricFamily]:
        info = GaugeMetricFamily("sightline_edge_model_info", "Codec bundles loaded.", labels=["model_id", "name"])
        for each in self._loaded():
            info.add_metric([each.codec.model_id, each.codec.bundle.name], 1)
        return [info]


class _SpoolTally(Collector):
    """The spool's own counts, as counters."""

    def __init__(self, spool: Callable[[], Stats]) -> None:
        self._spool = spool

    def collect(self) -> list[CounterMetricFamily]:
        tally = self._spool().tally
        lost = CounterMetricFamily(
            "sightline_edge_spool_given_up", "Frames that the spool gave up, by how they end.", labels=["outcome"]
        )
        lost.add_metric(["dropped"], tally.dropped)
        lost.add_metric(["expired"], tally.expired)
        lost.add_metric(["damaged"], tally.damaged)
        refused = CounterMetricFamily("sightline_edge_spool_refused", "Frames refused because the spool was full.")
        refused.add_metric([], tally.refused)
        return [lost, refused]


def ack_label(enum: Any, value: int, prefix: str) -> str:
    """An enum value's short name in lower case; a number that is not known here is "other"."""
    try:
        return str(enum.Name(value)).removeprefix(prefix).lower()
    except ValueError:
        return "other"


def _age_s(stats: Stats) -> float:
    return 0.0 if stats.oldest_us is None else max(0.0, time.time() - stats.oldest_us / 1e6)
