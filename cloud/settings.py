"""Every setting of the cloud service, with its unit. Values come from flags, environment and file (shared.settings)."""

import os
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ByteSize, Field, model_validator
from pydantic_settings import SettingsConfigDict

from cloud.batching import BatchLimits
from cloud.detections.log import Retention
from cloud.detections.subscribe import Limits
from cloud.ingest import StreamLimits
from cloud.kept import KeptBounds
from cloud.pipeline import PipelineLimits
from shared.codec.types import MAX_SIDE
from shared.settings import ServerSettings

_MIB = 1 << 20
_DAY_S = 86_400.0
_MESSAGE_OVERHEAD_BYTES = 4096  # of a FrameUpload beside its two streams, amply


class CloudSettings(ServerSettings):
    """What `sightline cloud` can be told."""

    table: ClassVar[str] = "cloud"
    model_config = SettingsConfigDict(env_prefix="SIGHTLINE_CLOUD_")

    listen: str = Field(
        default="127.0.0.1:7421", description="host:port for edges and consumers; port 0 takes a free one"
    )
    metrics_listen: str = Field(
        default="127.0.0.1:7422",
        description="host:port of the HTTP server with /metrics, /healthz and /readyz; port 0 takes a free one, "
        "empty switches it off",
    )
    cloud_id: str = Field(
        default_factory=lambda: os.uname().nodename[:64] or "cloud",
        min_length=1,
        max_length=64,
        description="name of this process in logs and in its welcome to edges; default: the machine's name",
    )
    data_dir: Path = Field(
        default=Path("~/.local/state/sightline/cloud"),
        description="folder of the detection log and the quarantine, on a local disk; made if missing",
    )

    # -- what runs
    models: str = Field(
        default="detection",
        min_length=1,
        description="codec bundles to decode with, by name or folder, separated by commas",
    )
    tasks: str = Field(
        default="faster-rcnn-mobilenetv2",
        min_length=1,
        description="task models that run on every uploaded frame, separated by commas: names, folders or .onnx files",
    )
    extra_tasks: str = Field(
        default="", description="task models that run only when Detect asks for them, separated by commas"
    )
    min_score: float = Field(
        default=0.1, ge=0, le=1, description="detections of uploaded frames below this score are not logged"
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where networks run: cpu or cuda[:n]"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="number type of the codec's transforms; auto: what the device computes fastest"
    )
    threads: int = Field(default=0, ge=0, le=1024, description="threads of the networks on CPU; 0: the cores available")
    unpack_threads: int = Field(
        default=0, ge=0, le=1024, description="threads that undo the entropy coding; 0: the cores available"
    )

    # -- batching
    max_batch: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="most frames in one batch; 0: 8 on a GPU, 1 on a CPU, where a batch saves nothing and others wait",
    )
    max_batch_pixels: int = Field(
        default=16_000_000, ge=1, description="most pixels in one batch; a larger frame passes alone"
    )
    max_delay_ms: float = Field(
        default=5.0,
        ge=0,
        le=10_000,
        description="longest that a batch is held for more frames while busy, milliseconds",
    )
    lanes: int = Field(
        default=0, ge=0, le=8, description="batches under way at once; 0: 2 on a GPU (decoding overlaps), 1 on a CPU"
    )

    # -- bounds of intake
    max_pixels: int = Field(
        default=MAX_SIDE * MAX_SIDE, ge=1, le=MAX_SIDE * MAX_SIDE, description="largest frame decoded, pixels"
    )
    max_frame_bytes: ByteSize = Field(
        default=ByteSize(16 * _MIB), ge=1, description="longest coded frame taken, bytes of both streams"
    )
    stream_credit_frames: int = Field(
        default=64, ge=1, le=1_000_000, description="frames that one upload stream may have unanswered"
    )
    stream_credit_bytes: ByteSize = Field(
        default=ByteSize(16 * _MIB), ge=1, description="coded bytes that one upload stream may have unanswered"
    )
    max_in_flight_frames: int = Field(default=4096, ge=1, description="frames held in all; more are told to come later")
    max_in_flight_bytes: ByteSize = Field(
        default=ByteSize(512 * _MIB), ge=1, description="coded bytes held in all; more are told to come later"
    )
    max_waiting_camera: int = Field(default=256, ge=1, description="frames of one camera that may wait for a batch")
    retry_after_ms: int = Field(
        default=500, ge=0, le=600_000, description="how long edges are told to wait when there is no room, milliseconds"
    )
    max_stream_age_s: float = Field(
        default=3600.0,
        ge=0,
        description="upload streams are asked to reopen, perhaps elsewhere, at this age (give or take 20 %), seconds; "
        "0: never",
    )
    stream_grace_s: float = Field(
        default=5.0, ge=0, le=600, description="how long an upload stream that was asked to end may go on, seconds"
    )

    # -- what is kept
    log: Literal["sqlite", "jetstream"] = Field(
        default="sqlite",
        description="where events are kept: sqlite, a file in data_dir, for one cloud process; jetstream, in NATS, "
        "for several that share one log",
    )
    log_name: str = Field(
        default="sightline", pattern=r"^[A-Za-z0-9_-]{1,32}$", description="name of the log in NATS (jetstream)"
    )
    log_replicas: int = Field(
        default=3,
        ge=1,
        le=5,
        description="copies of every event in the NATS cluster (jetstream); 1 loses events with its server",
    )
    nats_servers: str = Field(
        default="nats://127.0.0.1:4222",
        description="nats:// or tls:// addresses of the NATS servers, with user:password@ where needed, separated by "
        "commas (jetstream)",
    )
    nats_monitoring: str = Field(
        default="",
        description="http:// addresses of the NATS servers' monitoring pages, separated by commas: the start is "
        "refused unless they say that every write is synced (sync_interval: always); empty: not checked",
    )
    nats_ca: Path | None = Field(
        default=None, description="PEM file: authority of the NATS servers' certificates (TLS)"
    )
    nats_certificate: Path | None = Field(default=None, description="PEM file: this cloud's certificate (mTLS to NATS)")
    nats_key: Path | None = Field(default=None, description="PEM file: private key of nats_certificate")
    nats_insecure: bool = Field(
        default=False,
        description="allow plaintext to NATS servers that are not on loopback; anyone on the network can read it",
    )
    log_max_age_s: float = Field(default=7 * _DAY_S, gt=0, description="events are kept this long, seconds")
    log_max_bytes: ByteSize = Field(default=ByteSize(8 << 30), ge=_MIB, description="events are kept up to this, bytes")
    key_age_s: float = Field(
        default=14 * _DAY_S,
        gt=0,
        description="frame names are kept this long so that a resend makes no second event, seconds; must exceed the "
        "longest that any edge keeps a frame; a frame spooled longer ago ends as EXPIRED",
    )
    quarantine_max_frames: int = Field(default=10_000, ge=0, description="rejected frames kept at most")
    quarantine_max_bytes: ByteSize = Field(
        default=ByteSize(256 * _MIB), ge=0, description="rejected frames kept at most, coded bytes"
    )
    review_max_age_s: float = Field(
        default=_DAY_S,
        gt=0,
        description="bitstreams of frames are kept this long, so that a person can look at them again, seconds",
    )
    review_max_bytes: ByteSize = Field(
        default=ByteSize(1 << 30), ge=0, description="bitstreams kept for review, bytes in all; 0: none is kept"
    )

    # -- console
    console_listen: str = Field(
        default="",
        description="host:port of the web console, for example 127.0.0.1:7423; port 0 takes a free one, empty "
        "switches it off",
    )

    # -- consumers
    max_subscribers: int = Field(default=1024, ge=1, description="subscriptions at once")
    subscriber_buffer_events: int = Field(
        default=4096, ge=1, description="events that may wait for a consumer before it is cut off as too slow"
    )
    subscriber_buffer_bytes: ByteSize = Field(
        default=ByteSize(16 * _MIB), ge=1, description="bytes of events that may wait for a consumer"
    )
    progress_interval_s: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="a consumer whose filter hides events hears its cursor this often, seconds",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.key_age_s < self.log_max_age_s:
            raise ValueError(
                f"key_age_s ({self.key_age_s:g}) must be at least log_max_age_s ({self.log_max_age_s:g}): "
                "names outlive their events"
            )
        if self.max_frame_bytes + _MESSAGE_OVERHEAD_BYTES > self.max_message_bytes:
            raise ValueError(
                f"max_frame_bytes ({int(self.max_frame_bytes)}) must leave {_MESSAGE_OVERHEAD_BYTES} bytes of "
                f"max_message_bytes ({int(self.max_message_bytes)})"
            )
        return self

    @property
    def model_references(self) -> list[str]:
        """`models` as a list."""
        return _listed(self.models)

    @property
    def task_names(self) -> list[str]:
        """`tasks` as a list."""
        return _listed(self.tasks)

    @property
    def all_task_names(self) -> list[str]:
        """`tasks`, then what `extra_tasks` adds."""
        return list(dict.fromkeys([*self.task_names, *_listed(self.extra_tasks)]))

    @property
    def nats_server_list(self) -> list[str]:
        """`nats_servers` as a list."""
        return _listed(self.nats_servers)

    @property
    def nats_monitoring_list(self) -> list[str]:
        """`nats_monitoring` as a list, without a slash at the end."""
        return [address.rstrip("/") for address in _listed(self.nats_monitoring)]

    @property
    def batch_limits(self) -> BatchLimits:
        return BatchLimits(
            max_batch=self.max_batch or (1 if self.device == "cpu" else 8),
            max_delay_s=self.max_delay_ms / 1e3,
            max_cost=self.max_batch_pixels,
            max_waiting=self.max_in_flight_frames,
            max_waiting_camera=self.max_waiting_camera,
            lanes=self.lanes or (1 if self.device == "cpu" else 2),
        )

    @property
    def retention(self) -> Retention:
        return Retention(self.log_max_age_s, int(self.log_max_bytes), self.key_age_s)

    @property
    def pipeline_limits(self) -> PipelineLimits:
        return PipelineLimits(
            max_pixels=self.max_pixels,
            max_frame_bytes=int(self.max_frame_bytes),
            max_frames=self.max_in_flight_frames,
            max_bytes=int(self.max_in_flight_bytes),
            max_age_s=self.key_age_s,
            retry_after_ms=self.retry_after_ms,
        )

    @property
    def stream_limits(self) -> StreamLimits:
        return StreamLimits(
            credit_frames=self.stream_credit_frames,
            credit_bytes=int(self.stream_credit_bytes),
            max_age_s=self.max_stream_age_s,
            grace_s=min(self.stream_grace_s, self.drain_s),
        )

    @property
    def review_bounds(self) -> KeptBounds:
        return KeptBounds(self.review_max_age_s, int(self.review_max_bytes))

    @property
    def subscription_limits(self) -> Limits:
        return Limits(self.subscriber_buffer_events, int(self.subscriber_buffer_bytes), self.progress_interval_s)


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]
