"""Rejected frames, kept for people: what came, from whom and why it could not be used. Bounded, oldest out first.

One SQLite file with one table, written by one thread. A frame is put here before its REJECTED record is logged, so
that a record of a rejection always has its frame beside it until the bound takes it, or until it is delivered again
(`cloud.replay`).
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cloud.detections.log import FrameName
from shared.codec.types import Bitstream
from shared.errors import Unavailable
from shared.quarantine import Quarantined

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS frames (
    id INTEGER PRIMARY KEY AUTOINCREMENT, rejected_ns INTEGER NOT NULL, name TEXT NOT NULL UNIQUE,
    reason TEXT NOT NULL, detail TEXT NOT NULL, edge_id TEXT NOT NULL,
    model_id TEXT NOT NULL, quality INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    hyper BLOB NOT NULL, latents BLOB NOT NULL, symbols_crc INTEGER NOT NULL,
    captured_us INTEGER NOT NULL DEFAULT 0
) STRICT
"""
_ADD_CAPTURED = "ALTER TABLE frames ADD COLUMN captured_us INTEGER NOT NULL DEFAULT 0"  # files made before it was kept
_INSERT = """
INSERT INTO frames (rejected_ns, name, reason, detail, edge_id,
                    model_id, quality, height, width, hyper, latents, symbols_crc, captured_us)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_SELECT = """
SELECT id, rejected_ns, captured_us, name, reason, detail, edge_id,
       model_id, quality, height, width, hyper, latents, symbols_crc
FROM frames
"""
_DELETE_NAMED = "DELETE FROM frames WHERE name = ? RETURNING length(hyper) + length(latents)"
_DELETE_OLDEST = """
DELETE FROM frames WHERE id = (SELECT min(id) FROM frames) RETURNING length(hyper) + length(latents)
"""


class Quarantine:
    """Opens or makes the file. Raises Unavailable if it cannot."""

    def __init__(self, path: Path, *, max_frames: int, max_bytes: int, clock: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(_SCHEMA)
            if "captured_us" not in {column[1] for column in self._db.execute("PRAGMA table_info(frames)")}:
                self._db.execute(_ADD_CAPTURED)
            self._frames, self._bytes = self._db.execute(
                "SELECT count(*), coalesce(sum(length(hyper) + length(latents)), 0) FROM frames"
            ).fetchone()
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"quarantine {path} cannot be opened: {error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quarantine")

    async def put(
        self, name: FrameName, reason: str, detail: str, edge_id: str, bitstream: Bitstream, captured_us: int = 0
    ) -> None:
        """Keeps a frame, makes room for it; a frame that is already here is replaced. Raises Unavailable.

        `reason`: a RejectReason in small letters. `captured_us`: since 1970, 0 where it is not known.
        """
        b = bitstream
        coded = (b.model_id, b.quality, b.height, b.width, b.hyper, b.latents, b.symbols_crc)
        row = (self._clock(), str(name), reason, detail, edge_id, *coded, captured_us)
        await self._on_thread(lambda: self._put(row))

    async def frames(self, after_id: int = 0, limit: int = 1 << 40) -> list[Quarantined]:
        """What is kept, oldest first. Raises Unavailable."""
        sql = f"{_SELECT} WHERE id > ? ORDER BY id LIMIT ?"
        rows = await self._on_thread(lambda: self._db.execute(sql, (after_id, limit)).fetchall())
        return [_from_row(row) for row in rows]

    async def find(self, name: FrameName) -> Quarantined | None:
        """One frame, None if it is not kept. Raises Unavailable."""
        sql = f"{_SELECT} WHERE name = ?"
        rows = await self._on_thread(lambda: self._db.execute(sql, (str(name),)).fetchall())
        return _from_row(rows[0]) if rows else None

    async def remove(self, name: FrameName) -> None:
        """No longer keeps a frame. Raises Unavailable."""
        await self._on_thread(lambda: self._remove(str(name)))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._db.close()

    async def _on_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise Unavailable(f"quarantine {self._path} cannot be used: {error}") from error

    def _put(self, row: tuple[Any, ...]) -> None:
        frames, size = self._frames + 1, self._bytes + len(row[9]) + len(row[10])
        self._db.execute("BEGIN IMMEDIATE")
        try:
            gone = self._db.execute(_DELETE_NAMED, (row[1],)).fetchall()
            self._db.execute(_INSERT, row)
            frames, size = frames - len(gone), size - sum(length for (length,) in gone)
            while frames > self._max_frames or size > self._max_bytes:
                frames, size = frames - 1, size - self._db.execute(_DELETE_OLDEST).fetchone()[0]
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._frames, self._bytes = frames, size

    def _remove(self, name: str) -> None:
        for (size,) in self._db.execute(_DELETE_NAMED, (name,)).fetchall():
            self._frames, self._bytes = self._frames - 1, self._bytes - size


def _from_row(row: tuple[Any, ...]) -> Quarantined:
    id_, rejected_ns, captured_us, name, reason, detail, edge_id, *coded = row
    camera, epoch, seq = name.split("/")
    return Quarantined(
        id=id_,
        camera_id=camera,
        epoch=int(epoch, 16),
        seq=int(seq),
        captured_us=captured_us,
        quarantined_us=rejected_ns // 1000,
        reason=f"{reason}: {detail}",
        edge_id=edge_id,
        bitstream=Bitstream(*coded),
    )
