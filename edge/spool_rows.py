"""What the spool keeps of a frame, as typed objects and as a row with a check over it."""

import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from crc32c import crc32c

from shared.codec.types import Bitstream

ROW_OVERHEAD_BYTES = 600  # a frame's and a token's row with their share of the trees above them, generously

_NAMES = (
    *("id", "camera_id", "epoch", "seq", "captured_us", "spooled_us", "expires_us", "token", "model_id", "quality"),
    *("width", "height", "symbols_crc", "row_crc", "outcome", "reason", "hyper", "latents"),
)
COLUMNS = ", ".join(f"frame.{name}" if name == "id" else name for name in _NAMES)

_T = TypeVar("_T")


class Outcome(IntEnum):
    """How a frame ended; numbers as on the wire (`sightline.v1.Outcome`)."""

    NONE = 0
    DETECTIONS = 1
    REJECTED = 2
    EXPIRED = 3
    DROPPED = 4


_OUTCOMES = frozenset(Outcome)


@dataclass(frozen=True, slots=True)
class FrameName:
    """(camera, epoch, seq); `epoch` is unsigned 64 bit."""

    camera_id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A coded frame before it has a name. Times in microseconds since 1970 UTC; `expires_us` 0: never.

    `token`: the camera's idempotency token, "" for none. `content`: digest of the picture that the token stands for.
    """

    camera_id: str
    captured_us: int
    expires_us: int
    token: str
    content: bytes
    bitstream: Bitstream

    @property
    def cost_bytes(self) -> int:
        return len(self.bitstream.hyper) + len(self.bitstream.latents) + ROW_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """A frame in the spool. `bitstream` is None where only its `outcome` and `reason` are to be told."""

    id: int
    name: FrameName
    captured_us: int
    spooled_us: int
    expires_us: int
    token: str
    bitstream: Bitstream | None
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a draft went. `duplicate`: the token was known, and this is the earlier frame; it may have ended."""

    id: int
    name: FrameName
    duplicate: bool
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Final:
    """A frame's final acknowledgement."""

    id: int
    outcome: Outcome
    reason: str


def row_crc(entry: Entry) -> int:
    """CRC-32C over everything of a frame that must not change while it waits."""
    bits = entry.bitstream
    if bits is None:
        return 0
    numbers = struct.pack(
        "<QQqqqIIII",
        *(entry.name.epoch, entry.name.seq, entry.captured_us, entry.spooled_us, entry.expires_us),
        *(bits.quality, bits.width, bits.height, bits.symbols_crc),
    )
    crc = crc32c(numbers)
    for part in (entry.name.camera_id.encode(), entry.token.encode(), bits.model_id.encode(), bits.hyper, bits.latents):
        crc = crc32c(part, crc32c(struct.pack("<I", len(part)), crc))
    return int(crc)


def from_row(row: Sequence[Any]) -> tuple[Entry, str]:
    """A row of `COLUMNS` and what is wrong with it, "" if nothing is. Raises sqlite3.DatabaseError for wrong types."""
    columns = dict(zip(_NAMES, row, strict=True))
    texts = {name: _typed(columns[name], str) for name in ("camera_id", "token", "model_id", "reason")}
    numbers = {name: _typed(columns[name], int) for name in _NAMES if name not in (*texts, "hyper", "latents")}
    hyper, latents = columns["hyper"], columns["latents"]
    damage = "" if numbers["outcome"] in _OUTCOMES else f"damaged in the spool: outcome {numbers['outcome']}"
    ended = Outcome.NONE if damage else Outcome(numbers["outcome"])
    bits = None
    if ended is Outcome.NONE and hyper is not None and latents is not None:
        bits = Bitstream(
            model_id=texts["model_id"],
            quality=numbers["quality"],
            height=numbers["height"],
            width=numbers["width"],
            hyper=hyper,
            latents=latents,
            symbols_crc=numbers["symbols_crc"],
        )
    entry = Entry(
        id=numbers["id"],
        name=FrameName(texts["camera_id"], unsigned(numbers["epoch"]), numbers["seq"]),
        captured_us=numbers["captured_us"],
        spooled_us=numbers["spooled_us"],
        expires_us=numbers["expires_us"],
        token=texts["token"],
        bitstream=bits,
        outcome=ended,
        reason=texts["reason"],
    )
    if damage or ended is not Outcome.NONE:
        return entry, damage
    if bits is None:
        return entry, "its payload is missing in the spool"
    found, expected = row_crc(entry), numbers["row_crc"]
    return entry, "" if found == expected else f"damaged in the spool: row CRC-32C {found:08x}, expected {expected:08x}"


def signed(number: int) -> int:
    """Unsigned 64 bit as SQLite keeps it."""
    return number - (1 << 64) if number >= 1 << 63 else number


def unsigned(number: int) -> int:
    """What `signed` was given."""
    return number + (1 << 64) if number < 0 else number


def _typed(value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise sqlite3.DatabaseError(f"expected {kind.__name__} in the spool, got {type(value).__name__}")
    return value
