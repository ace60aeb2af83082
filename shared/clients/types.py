"""What callers of the two services hold in their hands: frozen dataclasses without protobuf.

    camera side      CompressOptions -> Receipt
    consumer side    Start, Cursor, EventFilter -> DetectionEvent, Progress; Detected; Reviewed

Units as in the wire contract (proto/sightline/v1): sizes and coordinates in pixels, x to the right, y down, (0, 0) the
outer corner of the top left pixel; times are aware datetimes in UTC; `_ms` is milliseconds.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidInput
from shared.logs import frame_id


class Delivery(StrEnum):
    """How far a picture must have come before its receipt is given."""

    NONE = "none"  # coded; the edge keeps nothing and sends nothing
    SPOOLED = "spooled"  # on the edge's disk, fsynced
    PERSISTED = "persisted"  # the cloud has the result on its disk


class ReceiptState(StrEnum):
    """How far a picture has come."""

    ENCODED = "encoded"
    SPOOLED = "spooled"
    PERSISTED = "persisted"


class Outcome(StrEnum):
    """The one terminal record that every spooled frame ends in."""

    DETECTIONS = "detections"
    REJECTED = "rejected"
    EXPIRED = "expired"
    DROPPED = "dropped"


class Start(StrEnum):
    """A place in the log without a number."""

    BEGINNING = "beginning"  # the oldest event kept
    END = "end"  # only what comes after the call


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """How to code a picture, and what to do with the result.

    `quality` in [1, 8], or `target_bytes`: the highest quality whose file form fits in it; neither: the edge's setting.
    `model_id`: hex SHA-256 of the weights bundle or its name at the edge, empty: the edge's default. `max_wait_s`: with
    PERSISTED, answer with state SPOOLED after this many seconds. `max_age_s`: an older frame, by capture time, ends as
    EXPIRED; None: the edge's setting.
    """

    quality: float | None = None
    target_bytes: int | None = None
    delivery: Delivery = Delivery.SPOOLED
    return_bitstream: bool = False
    model_id: str = ""
    max_wait_s: float | None = None
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.target_bytes is not None:
            raise InvalidInput("expected quality or target_bytes, got both")


@dataclass(frozen=True, slots=True)
class FrameName:
    """A spooled frame's name, unique for ever. `epoch`: random 64 bits; `seq`: from 1."""

    camera_id: str
    epoch: int
    seq: int

    def __str__(self) -> str:
        return frame_id(self.camera_id, self.epoch, self.seq)


@dataclass(frozen=True, slots=True)
class EdgeTimings:
    """Where the edge's time went, milliseconds of wall clock; 0 for a stage that did not run."""

    image_decode_ms: float
    queue_ms: float
    analyse_ms: float
    pack_ms: float
    spool_ms: float
    deliver_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a picture.

    `frame` is None when nothing was spooled. `quality` in [1, 8]. `bitstream` is the file form (.slc) where it was
    asked for, else empty. `outcome` is None until the cloud has the frame's record. `duplicate`: the idempotency token
    had been seen before, and the receipt is the earlier frame's.
    """

    state: ReceiptState
    frame: FrameName | None
    model_id: str
    width: int
    height: int
    quality: float
    coded_bytes: int
    bits_per_pixel: float
    timings: EdgeTimings
    bitstream: bytes = field(repr=False)
    outcome: Outcome | None
    outcome_reason: str
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a detection log. `sequence`: that of the last event dealt with; 0: before the first."""

    log_id: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.log_id}:{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The cursor that ``str`` wrote. Raises InvalidInput."""
        log_id, colon, sequence = text.strip().rpartition(":")
        if not colon or not log_id or not sequence.isdecimal():
            raise InvalidInput(f"expected a cursor as LOG:SEQUENCE, got {text!r}")
        return cls(log_id, int(sequence))


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What to see; empty means all. Conditions on category and score apply to detections: an event of which none is
    left is hidden. `min_score` in [0, 1]."""

    camera_ids: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    min_score: float = 0.0
    outcomes: tuple[Outcome, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """Corners in pixels of the original picture, 0 <= x_min <= x_max <= width."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True)
class Mask:
    """A binary mask of the original picture's size. `counts`: COCO's compressed run-length encoding, ASCII, as
    pycocotools takes it in ``{"size": [height, width], "counts": counts}``."""

    height: int
    width: int
    counts: bytes = field(repr=False)

    def to_array(self) -> NDArray[np.bool_]:
        """bool [height, width]. Raises InvalidInput if the runs do not fill the picture."""
        runs = _runs(self.counts)
        if any(run < 0 for run in runs) or sum(runs) != self.height * self.width:
            raise InvalidInput(f"expected runs over {self.height * self.width} pixels, got {sum(runs)}")
        values = np.arange(len(runs)) % 2 == 1  # runs alternate between 0 and 1, beginning with 0
        return np.repeat(values, runs).reshape((self.height, self.width), order="F")


@dataclass(frozen=True, slots=True)
class Detection:
    """One object. `score` in [0, 1]; `category_id` is COCO's (person is 1); `mask` from tasks that make one."""

    box: Box
    score: float
    category_id: int
    label: str
    mask: Mask | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one task model found, by falling score. `kind`: "detection", "instance_segmentation", ..."""

    task: str
    kind: str
    model_id: str
    detections: tuple[Detection, ...]
    task_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class CloudTimings:
    """Where the cloud's time went, milliseconds of wall clock."""

    queue_ms: float
    unpack_ms: float
    synthesise_ms: float
    task_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class DetectionEvent:
    """One frame's terminal record.

    `capture_time` is by the camera's or edge's clock, the other two by the cloud's; None where the frame never came.
    `reason`: for an outcome other than DETECTIONS, why. `width` and `height` are 0 for a frame that never came.
    """

    cursor: Cursor
    frame: FrameName
    edge_id: str
    capture_time: datetime | None
    received_time: datetime | None
    persisted_time: datetime | None
    outcome: Outcome
    reason: str
    width: int
    height: int
    model_id: str
    quality: float
    payload_bytes: int
    results: tuple[TaskResult, ...]
    timings: CloudTimings

    @property
    def detections(self) -> tuple[Detection, ...]:
        """Those of all tasks, in the tasks' order."""
        return tuple(one for result in self.results for one in result.detections)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a subscription is when filters hide everything or nothing comes. `caught_up`: everything in the log at
    this moment has been shown or hidden."""

    cursor: Cursor
    caught_up: bool


@dataclass(frozen=True, slots=True)
class Detected:
    """What Detect found in one bitstream. `image_png`: the decoded picture where it was asked for, else empty."""

    results: tuple[TaskResult, ...]
    width: int
    height: int
    model_id: str
    quality: float
    image_png: bytes = field(repr=False)
    timings: CloudTimings

    @property
    def detections(self) -> tuple[Detection, ...]:
        """Those of all tasks, in the tasks' order."""
        return tuple(one for result in self.results for one in result.detections)


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A frame's picture, for a person: `image_png` of `width` x `height` pixels, coded at `quality` in [1, 8] with the
    bundle `model_id`. `bitstream` is the file form (.slc) where it was asked for, else empty."""

    image_png: bytes = field(repr=False)
    width: int
    height: int
    model_id: str
    quality: float
    bitstream: bytes = field(repr=False)


def _runs(counts: bytes) -> list[int]:
    """Run lengths down the columns; the format is described where it is written, in cloud/masks.py."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = character - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs
