"""The cloud's own Prometheus metrics. No label takes a value that a peer can choose."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from sightline.v1 import common_pb2, ingest_pb2

from shared.metrics import BYTES_BUCKETS, SECONDS_BUCKETS

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class CloudMetrics:
    """One set a server, in that server's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.batch_size = Histogram(
            "sightline_cloud_batch_size", "Frames in a batch.", buckets=_BATCH_BUCKETS, registry=registry
        )
        self.queue_seconds = Histogram(
            "sightline_cloud_queue_seconds",
            "How long a frame waited for its batch.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.decode_seconds = Histogram(
            "sightline_cloud_decode_seconds",
            "Decoding: entropy decoding of one frame (unpack), transform g_s of one batch (synthesise).",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.task_seconds = Histogram(
            "sightline_cloud_task_seconds",
            "A task model's time for one batch.",
            ["task"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.frame_bytes = Histogram(
            "sightline_cloud_frame_bytes",
            "Coded size of frames received, both streams.",
            buckets=BYTES_BUCKETS,
            registry=registry,
        )
        self.events = Counter(
            "sightline_cloud_events", "Terminal records written to the log.", ["outcome"], registry=registry
        )
        self.duplicates = Counter(
            "sightline_cloud_duplicates", "Frames that came again after their record.", registry=registry
        )
        self.rejected = Counter("sightline_cloud_rejected", "Frames rejected.", ["reason"], registry=registry)
        self.retried = Counter(
            "sightline_cloud_retry_later", "Frames sent away for now.", ["reason"], registry=registry
        )
        self.in_flight_frames = Gauge("sightline_cloud_in_flight_frames", "Frames held.", registry=registry)
        self.in_flight_bytes = Gauge("sightline_cloud_in_flight_bytes", "Coded bytes held.", registry=registry)
        self.upload_streams = Gauge("sightline_cloud_upload_streams", "Upload streams open.", registry=registry)
        self.subscribers = Gauge("sightline_cloud_subscribers", "Subscriptions open.", registry=registry)
        self.subscriber_lag = Gauge(
            "sightline_cloud_subscriber_lag_events",
            "Events that the consumer furthest behind has still to be given.",
            registry=registry,
        )
        self.capture_to_detection_seconds = Histogram(
            "sightline_cloud_capture_to_detection_seconds",
            "From the picture's capture time, by the edge's clock, to its record on disk.",
            buckets=(*SECONDS_BUCKETS, 60.0, 300.0, 3600.0, 86400.0),
            registry=registry,
        )
        self.log_append_seconds = Histogram(
            "sightline_cloud_log_append_seconds",
            "From handing a record to the log until it is durable.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.model_info = Gauge(
            "sightline_cloud_model_info", "Models loaded.", ["kind", "name", "model_id"], registry=registry
        )
        self.waiting_frames = Gauge(
            "sightline_cloud_waiting_frames", "Frames that wait for a batch.", registry=registry
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        for outcome in common_pb2.Outcome.keys()[1:]:
            self.events.labels(outcome.removeprefix("OUTCOME_").lower())
        for reject in ingest_pb2.RejectReason.keys()[1:]:
            self.rejected.labels(reject.removeprefix("REJECT_REASON_").lower())
        for retry in ingest_pb2.RetryReason.keys()[1:]:
            self.retried.labels(retry.removeprefix("RETRY_REASON_").lower())
