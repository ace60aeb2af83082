"""Saves what can be read of a damaged spool file into a new one; the damaged one is kept beside it.

A damaged page makes SQLite refuse whatever query touches it, so rows are asked for in ranges of ids that are halved
until what cannot be read is alone. Whatever still has its name but no sound payload is taken over as REJECTED, so that
it too reaches its terminal record.
"""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from edge.spool_file import Limits, SpoolFile, Tally
from edge.spool_rows import COLUMNS, Outcome, from_row
from shared.logs import facts

_log = logging.getLogger("sightline.edge.spool")
_STEP = 512  # ids asked for at once
_MAX_ID = 1 << 40
_MAX_UNREADABLE = 1 << 16  # questions in a row without a readable answer, after which nothing more is asked
_FRAMES = f"SELECT {COLUMNS} FROM frame LEFT JOIN payload ON payload.id = frame.id"  # noqa: S608


def salvage(path: Path, limits: Limits) -> None:
    """Moves the file at `path` (and its WAL) aside and puts a new one with all readable rows in its place."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(aside.with_name(aside.name + suffix))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    saved = damaged = 0
    fresh = SpoolFile(path, limits, Tally())
    try:
        with closing(sqlite3.connect(aside, isolation_level=None)) as old, fresh.transaction():
            for row in _rows(old, _FRAMES, "frame.id"):
                entry, damage = from_row(row)
                if damage:
                    entry = replace(entry, bitstream=None, outcome=Outcome.REJECTED, reason=damage)
                    damaged += 1
                fresh.restore(entry)
                saved += 1
            for row in _rows(old, "SELECT token.* FROM token JOIN frame ON frame.id = token.frame_id", "frame.id"):
                fresh.restore_token(row)
    except sqlite3.Error as error:  # not even a database: all that is left is the file kept aside
        _log.error("nothing could be read of the damaged spool", extra=facts(file=aside, error=error))
    finally:
        fresh.close()
    _log.error(
        "the spool was damaged; what could be read was taken over",
        extra=facts(frames=saved, without_payload=damaged, kept=aside),
    )


def _rows(db: sqlite3.Connection, select: str, key: str) -> Iterator[tuple[object, ...]]:
    start, last = _end(db, "ASC"), _end(db, "DESC")
    unreadable = 0
    while start <= last and unreadable < _MAX_UNREADABLE:
        pending = [(start, start + _STEP - 1)]
        start += _STEP
        while pending:
            low, high = pending.pop()
            try:
                yield from db.execute(f"{select} WHERE {key} BETWEEN ? AND ? ORDER BY {key}", (low, high)).fetchall()
                unreadable = 0
            except sqlite3.DatabaseError:
                unreadable += 1
                if low < high:
                    middle = (low + high) // 2
                    pending += [(middle + 1, high), (low, middle)]
        start = _next_id(db, start)


def _next_id(db: sqlite3.Connection, start: int) -> int:
    """The first id from `start` on; `start` itself where that cannot be told. A damaged id may be far from the rest."""
    try:
        (found,) = db.execute("SELECT min(id) FROM frame WHERE id >= ?", (start,)).fetchone()
    except sqlite3.DatabaseError:
        return start
    return _MAX_ID if found is None else int(found)


def _end(db: sqlite3.Connection, order: str) -> int:
    """The first or last id, from whichever table still tells it."""
    for table in ("frame", "payload"):
        try:
            row = db.execute(f"SELECT id FROM {table} ORDER BY id {order} LIMIT 1").fetchone()  # noqa: S608
            if row is not None and 0 < row[0] < _MAX_ID:
                return int(row[0])
        except sqlite3.DatabaseError:
            continue
    return 1 if order == "ASC" else 0
