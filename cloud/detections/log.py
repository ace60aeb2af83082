"""The detection log: what a cloud replica must not lose, behind one small interface.

Every frame that an edge spooled ends as exactly one record here (detections, a rejection, an expiry). The edge
forgets a frame only when its record is on disk, and consumers resume from a position in it, so the log is the only
state of the cloud that matters.

Invariants every backend keeps, held by tests/cloud/detections/test_conformance.py:

* `append` returns after the record is durable, never before.
* One record per key (camera, epoch, seq). A second append of a key changes nothing and says where the first went.
  Keys outlive the records' payload (`Retention.key_age_s`), so a late resend still finds its key.
* Records of one camera become readable in the order in which `append` was called for them, but for those whose append
  failed; calls need not wait for each other.
* Sequences are positive, strictly increasing in the order records become readable, and never reused.
* A reader that goes on from the last sequence it saw meets every later record once. If retention took some of them
  it gets CursorExpired instead, never a silent gap.
* `log_id` is random and made with the log: a position means nothing in another log.
"""

from dataclasses import dataclass
from typing import Protocol

_UINT64 = 1 << 64


@dataclass(frozen=True, slots=True)
class FrameName:
    """A frame's name across edge and cloud.

    `epoch`: random 64-bit number drawn by the edge for each spool and boot. `seq`: counted up by the spool.
    Both in [0, 2^64).
    """

    camera: str
    epoch: int
    seq: int

    def __post_init__(self) -> None:
        if not (0 <= self.epoch < _UINT64 and 0 <= self.seq < _UINT64):
            raise ValueError(f"epoch and seq must be in [0, 2^64), got {self.epoch} and {self.seq}")

    def __str__(self) -> str:
        return f"{self.camera}/{self.epoch:016x}/{self.seq}"


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a key's record is. `new` is False when the key was there before, whatever payload came this time."""

    sequence: int
    new: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One readable record. `event`: a serialised DetectionEvent.

    `logged_ns`: Unix time, never decreasing; where several brokers keep the log, but for what their clocks differ by
    when another of them takes over.
    """

    sequence: int
    logged_ns: int
    name: FrameName
    event: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """What can be read: sequences in [oldest, newest]; an empty log has newest == oldest - 1."""

    oldest: int
    newest: int


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept: records until either bound is passed, keys longer (so that resends stay harmless)."""

    max_age_s: float
    max_bytes: int
    key_age_s: float

    def __post_init__(self) -> None:
        if self.key_age_s < self.max_age_s:
            raise ValueError(f"keys must outlive records: key age {self.key_age_s} s < record age {self.max_age_s} s")


class DetectionLog(Protocol):
    """What ingest and Subscribe need of a log. All methods may raise Unavailable when the disk or broker fails."""

    @property
    def log_id(self) -> str:
        """Random name of this log, drawn when it was created."""
        ...

    @property
    def newest(self) -> int:
        """The newest sequence this process knows of; for measuring how far behind a reader is."""
        ...

    async def append(self, name: FrameName, event: bytes) -> Appended:
        """Makes `event` durable under `name` if the key is new; either way says where the key's record is."""
        ...

    async def find(self, name: FrameName) -> int | None:
        """The sequence of `name`'s record, or None if the key was never appended (or is older than the key age)."""
        ...

    async def span(self) -> Span:
        """What can be read now."""
        ...

    async def read(self, after: int, limit: int) -> list[Record]:
        """At most `limit` records with sequence > `after`, in order; empty if there are none yet.

        Raises CursorExpired, naming the oldest sequence kept, if retention took a record after `after`.
        """
        ...

    async def wait_beyond(self, sequence: int) -> None:
        """Returns once a record with a larger sequence can be read."""
        ...

    async def position_at(self, unix_ns: int) -> int:
        """The position after which every kept record logged at or after `unix_ns` follows, and none logged before."""
        ...

    async def close(self) -> None:
        """Finishes appends under way and releases the log."""
        ...
