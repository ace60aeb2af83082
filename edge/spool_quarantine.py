"""Rejected frames in the spool's file: kept with their reason for people, bounded, and delivered again when asked for.

The table `quarantine` of `edge.spool_file`, inside its transactions.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any

from edge.spool_rows import Entry, FrameName, signed, unsigned
from shared.codec.types import Bitstream
from shared.quarantine import Quarantined

_COLUMNS = (
    "id, camera_id, epoch, seq, captured_us, quarantined_us, reason, "
    "model_id, quality, height, width, hyper, latents, symbols_crc"
)


def put(db: sqlite3.Connection, entry: Entry, reason: str, now_us: int) -> None:
    """Keeps a frame; one that has no payload (any more) is nothing to look at."""
    bits = entry.bitstream
    if bits is None:
        return
    db.execute(
        "INSERT INTO quarantine (camera_id, epoch, seq, captured_us, quarantined_us, reason, model_id, quality, "
        "width, height, symbols_crc, hyper, latents) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            *(entry.name.camera_id, signed(entry.name.epoch), entry.name.seq, entry.captured_us, now_us, reason),
            *(bits.model_id, bits.quality, bits.width, bits.height, bits.symbols_crc, bits.hyper, bits.latents),
        ),
    )


def bound(db: sqlite3.Connection, max_frames: int, max_bytes: int) -> None:
    """The oldest go where there are too many or they are too large."""
    db.execute(
        "DELETE FROM quarantine WHERE id <= (SELECT id FROM (SELECT id, "
        "row_number() OVER w AS place, sum(length(hyper) + length(latents)) OVER w AS size FROM quarantine "
        "WINDOW w AS (ORDER BY id DESC)) WHERE place > ? OR size > ? ORDER BY id DESC LIMIT 1)",
        (max_frames, max_bytes),
    )


def page(db: sqlite3.Connection, after_id: int, limit: int) -> list[Quarantined]:
    """What is kept, oldest first."""
    rows = db.execute(f"SELECT {_COLUMNS} FROM quarantine WHERE id > ? ORDER BY id LIMIT ?", (after_id, limit))  # noqa: S608
    return [_from_row(row) for row in rows]


def find(db: sqlite3.Connection, name: FrameName) -> Quarantined | None:
    """The frame with this name, None if it is not kept; it was spooled once, so there is one at most."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM quarantine WHERE camera_id = ? AND epoch = ? AND seq = ?",  # noqa: S608
        (name.camera_id, signed(name.epoch), name.seq),
    ).fetchone()
    return None if row is None else _from_row(row)


def remove(db: sqlite3.Connection, id_: int) -> None:
    """No longer keeps a frame."""
    db.execute("DELETE FROM quarantine WHERE id = ?", (id_,))


def _from_row(row: Sequence[Any]) -> Quarantined:
    id_, camera_id, epoch, seq, captured_us, quarantined_us, reason, *bits = row
    coded = Bitstream(*bits)
    return Quarantined(id_, camera_id, unsigned(epoch), seq, captured_us, quarantined_us, reason, "", coded)
