"""Every setting of the edge service."""

import os
import re
import socket
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ByteSize, Field, field_validator
from pydantic_settings import SettingsConfigDict

from shared.codec.types import MAX_SIDE
from shared.settings import ServerSettings

NAME_PATTERN = r"[A-Za-z0-9._:-]{1,64}"


def _host_name() -> str:
    """This machine's name, with what no identifier may hold replaced."""
    return re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname())[:64] or "edge"


def _data_home() -> Path:
    try:
        share = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    except RuntimeError:  # a user whom the machine does not know, as in a container that is run by a number
        share = Path("/var/lib")
    return share / "sightline" / "edge"


class EdgeSettings(ServerSettings):
    """Settings of `sightline edge`: environment SIGHTLINE_EDGE_..., table [edge] of a TOML file."""

    model_config = SettingsConfigDict(env_prefix="SIGHTLINE_EDGE_")
    table: ClassVar[str] = "edge"

    listen: str = Field(default="127.0.0.1:7411", description="host:port for cameras; port 0 takes a free one")
    metrics_listen: str = Field(
        default="127.0.0.1:7412",
        description="host:port of the HTTP server with /metrics, /healthz and /readyz; port 0 takes a free one, "
        "empty switches it off",
    )
    edge_id: str = Field(
        default_factory=_host_name,
        pattern=f"^{NAME_PATTERN}$",
        description="this edge's name at the cloud; default: the machine's name",
    )

    # -- encoding
    models: list[str] = Field(
        default=["detection"],
        min_length=1,
        description="codec bundles to encode with: names of bundled ones, or folders; the first is the default",
    )
    quality: float = Field(
        default=4.0, ge=1, le=8, description="quality in [1, 8] for requests that give neither quality nor size"
    )
    uplink_budget_bps: float = Field(
        default=0,
        ge=0,
        description="bits a second that frames to the cloud may use: quality follows it for requests that give neither "
        "quality nor size; 0: no bound, the setting quality holds",
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where transforms run: cpu or cuda[:n]"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="number type of the transforms' bodies; auto: what the device computes fastest"
    )
    lanes: int = Field(
        default=0, ge=0, le=64, description="transforms at once; 0: 1 on a GPU, on a CPU one for each core up to 4"
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="threads of one transform on a CPU; 0: the cores it may use over lanes"
    )
    batch_frames: int = Field(
        default=0,
        ge=0,
        le=256,
        description="frames of one size that may pass the transforms together; 0: 8 on a GPU, 1 on a CPU, where this "
        "saves nothing",
    )
    batch_pixels: int = Field(
        default=4_000_000, ge=1, description="pixels that may pass the transforms together; a larger frame passes alone"
    )
    workers: int = Field(
        default=2, ge=1, le=256, description="threads that decode images and as many that do entropy coding"
    )

    # -- limits
    max_side: int = Field(default=MAX_SIDE, ge=1, le=MAX_SIDE, description="longest side of a picture, pixels")
    max_pixels: int = Field(
        default=40_000_000, ge=1, le=MAX_SIDE * MAX_SIDE, description="width times height of a picture, pixels"
    )
    max_decode_s: float = Field(
        default=10.0, gt=0, le=600, description="longest that the decoding of one picture's file may take, seconds"
    )
    in_flight_max_bytes: ByteSize = Field(
        default=ByteSize(256 << 20),
        ge=1 << 20,
        description="bytes of pictures, as RGB, that may be in work at once; one picture is always let in",
    )
    stream_window: int = Field(
        default=16, ge=1, le=1024, description="pictures of one CompressStream that may be in work at once"
    )
    max_cameras: int = Field(
        default=4096,
        ge=1,
        description="cameras that may send since the start; more are refused, so that memory is bounded",
    )

    # -- spool
    data_dir: Path = Field(
        default_factory=_data_home, description="folder of the spool; on a local disk, made if missing"
    )
    spool_max_bytes: ByteSize = Field(
        default=ByteSize(4 << 30), ge=16 << 20, description="largest size of the spool on disk (file and WAL), bytes"
    )
    spool_max_age_s: float = Field(
        default=259_200, gt=0, description="frames that waited longer end as EXPIRED, seconds (default: 3 days)"
    )
    spool_policy: Literal["reject", "drop-oldest"] = Field(
        default="reject",
        description="when the spool is full: reject new frames, or drop-oldest to make room (they end as DROPPED)",
    )
    frame_max_age_s: float = Field(
        default=0, ge=0, description="frames older than this by capture time end as EXPIRED, seconds; 0: never"
    )
    camera_max_age_s: list[str] = Field(
        default=[],
        description="CAMERA=SECONDS: the same for one camera, instead of frame_max_age_s; give it once a camera",
    )
    token_keep_s: float = Field(
        default=86_400, gt=0, description="how long an idempotency token is remembered, seconds (default: 24 h)"
    )
    token_max: int = Field(default=1_000_000, ge=1, description="idempotency tokens remembered at most")
    quarantine_max_frames: int = Field(default=1000, ge=0, description="rejected frames kept for people to look at")
    quarantine_max_bytes: ByteSize = Field(
        default=ByteSize(64 << 20), ge=0, description="bytes of rejected frames kept for people to look at"
    )
    originals_max_bytes: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="original pictures kept in memory, bytes, so that a consumer can ask for a frame again at a higher "
        "quality; 0: none is kept and none is given",
    )
    originals_max_age_s: float = Field(
        default=600.0, gt=0, description="an original is given out for at most this long, seconds"
    )

    # -- way to the cloud
    cloud: str = Field(
        default="", description="host:port of the cloud; empty: frames are encoded and spooled, nothing is sent"
    )
    cloud_insecure: bool = Field(
        default=False,
        description="allow plaintext to a cloud that is not on loopback; anyone on the network can read it",
    )
    cloud_ca: Path | None = Field(default=None, description="PEM file: authority of the cloud's certificate (TLS)")
    cloud_certificate: Path | None = Field(default=None, description="PEM file: this edge's certificate (mTLS)")
    cloud_key: Path | None = Field(default=None, description="PEM file: private key of cloud_certificate")
    cloud_token: Path | None = Field(
        default=None, description="file with this edge's bearer token, instead of a certificate (TLS only)"
    )
    uplink_backoff_max_s: float = Field(
        default=30.0, ge=0.1, le=3600, description="longest pause between two attempts to reach the cloud, seconds"
    )
    uplink_stall_s: float = Field(
        default=60.0, ge=1, description="a cloud that owes an answer for this many seconds is given up and called again"
    )
    uplink_poison_after: int = Field(
        default=5,
        ge=0,
        description="a frame that the cloud fell over this often is sent alone, and after three more times given up "
        "as REJECTED; 0: never",
    )

    @field_validator("camera_max_age_s")
    @classmethod
    def _are_deadlines(cls, given: list[str]) -> list[str]:
        for one in given:
            _deadline(one)
        return given

    @property
    def lanes_used(self) -> int:
        """`lanes`, with what 0 stands for worked out; likewise below."""
        return self.lanes or (min(4, len(os.sched_getaffinity(0))) if self.device == "cpu" else 1)

    @property
    def threads_used(self) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.lanes_used)

    @property
    def batch_frames_used(self) -> int:
        return self.batch_frames or (1 if self.device == "cpu" else 8)

    @property
    def camera_deadlines_s(self) -> dict[str, float]:
        """`camera_max_age_s` by camera, seconds; 0: never."""
        return dict(_deadline(one) for one in self.camera_max_age_s)


def _deadline(text: str) -> tuple[str, float]:
    camera_id, _, seconds = text.rpartition("=")
    try:
        age_s = float(seconds)
    except ValueError:
        age_s = -1.0
    if not re.fullmatch(NAME_PATTERN, camera_id) or not 0 <= age_s < 315_576_000:
        raise ValueError(f"expected CAMERA=SECONDS with seconds from 0 to ten years, got {text!r}")
    return camera_id, age_s
