"""The bitstreams of frames that were looked at, kept beside their events for a bounded time, for people to look at.

    pipeline --keep--> queue (bounded) --> writer thread: BEGIN, all that waits, bounds, COMMIT
    find     --> reader connection, its own thread

A record of detections says what the machine found; with its bitstream, a few kilobytes, the picture that it looked at
can be decoded again. Nothing depends on it: it is written after the fact and without a sync, a frame for which there is
no room in the queue is counted and not kept, and a disk that fails costs pictures, never events. Bounded by age and by
bytes, oldest out first; zero bytes keep nothing at all.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cloud.detections.log import FrameName
from shared.codec.types import Bitstream
from shared.errors import Unavailable

_log = logging.getLogger("sightline.cloud.kept")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS frames (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kept_ns INTEGER NOT NULL, name TEXT NOT NULL UNIQUE,
    model_id TEXT NOT NULL, quality INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    hyper BLOB NOT NULL, latents BLOB NOT NULL, symbols_crc INTEGER NOT NULL
) STRICT
"""
_INSERT = """
INSERT OR IGNORE INTO frames (kept_ns, name, model_id, quality, height, width, hyper, latents, symbols_crc)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_SELECT = "SELECT model_id, quality, height, width, hyper, latents, symbols_crc FROM frames WHERE name = ?"
_OLDEST = "SELECT id, kept_ns, length(hyper) + length(latents) FROM frames ORDER BY id LIMIT 1"
_MAX_WAITING = 1024  # frames
_MAX_BATCH = 256  # frames in one transaction
_IDLE_PRUNE_S = 60.0  # the bound on age holds when nothing comes
_COMPLAIN_S = 60.0  # a disk that fails is said this often


@dataclass(frozen=True, slots=True)
class KeptBounds:
    """Frames leave after `max_age_s`, or earlier where all together would exceed `max_bytes`. 0 bytes: none is kept."""

    max_age_s: float
    max_bytes: int


class KeptFrames:
    """Opens or makes the file. Raises Unavailable if it cannot. `clock`: Unix time in ns."""

    def __init__(self, path: Path, bounds: KeptBounds, clock: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._bounds = bounds
        self._clock = clock
        self._frames: int
        self._bytes: int
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(_SCHEMA)
            self._frames, self._bytes = self._db.execute(
                "SELECT count(*), coalesce(sum(length(hyper) + length(latents)), 0) FROM frames"
            ).fetchone()
            self._reading = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"kept frames {path} cannot be opened: {error}") from error
        self.not_kept = 0  # for want of room in the queue, or because the disk failed
        self._complained_s = float("-inf")
        self._queue: queue.Queue[tuple[FrameName, Bitstream] | None] = queue.Queue(_MAX_WAITING)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kept-reader")
        self._writer = threading.Thread(target=self._write_until_closed, name="kept-writer", daemon=True)
        self._writer.start()

    @property
    def frames(self) -> int:
        """How many are kept."""
        return self._frames

    @property
    def coded_bytes(self) -> int:
        """Coded bytes kept."""
        return self._bytes

    def keep(self, name: FrameName, bitstream: Bitstream) -> None:
        """Returns at once; the frame can be found soon after."""
        if not self._bounds.max_bytes:
            return
        try:
            self._queue.put_nowait((name, bitstream))
        except queue.Full:
            self.not_kept += 1

    async def find(self, name: FrameName) -> Bitstream | None:
        """None if it was not kept or its time is over. Raises Unavailable."""
        row = await asyncio.get_running_loop().run_in_executor(self._reader, self._find, str(name))
        return None if row is None else Bitstream(*row)

    async def close(self) -> None:
        """Writes what waits."""
        await asyncio.to_thread(self._queue.put, None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._reader.shutdown)
        self._reading.close()
        self._db.close()

    def _find(self, name: str) -> tuple[str, int, int, int, bytes, bytes, int] | None:
        try:
            row: tuple[str, int, int, int, bytes, bytes, int] | None = self._reading.execute(
                _SELECT, (name,)
            ).fetchone()
        except sqlite3.Error as error:
            raise Unavailable(f"kept frames {self._path} cannot be read: {error}") from error
        return row

    # In the writer thread.

    def _write_until_closed(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._gather()
            try:
                self._write(batch)
            except Exception as error:  # whatever it is, the thread must live on
                self.not_kept += len(batch)
                if time.monotonic() - self._complained_s > _COMPLAIN_S:
                    self._complained_s = time.monotonic()
                    _log.error("frames could not be kept for review in %s: %s", self._path, error)

    def _gather(self) -> tuple[list[tuple[FrameName, Bitstream]], bool]:
        """What waits, at least one frame or a minute's silence; True with it at the end."""
        batch: list[tuple[FrameName, Bitstream]] = []
        try:
            each = self._queue.get(timeout=_IDLE_PRUNE_S)
            while each is not None:
                batch.append(each)
                if len(batch) == _MAX_BATCH:
                    return batch, False
                each = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _write(self, batch: list[tuple[FrameName, Bitstream]]) -> None:
        now = self._clock()
        frames, size = self._frames, self._bytes
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for name, b in batch:
                sizes = (b.quality, b.height, b.width)
                row = (now, str(name), b.model_id, *sizes, b.hyper, b.latents, b.symbols_crc)
                if self._db.execute(_INSERT, row).rowcount:
                    frames, size = frames + 1, size + len(b.hyper) + len(b.latents)
            oldest_ns = now - int(self._bounds.max_age_s * 1e9)
            while (oldest := self._db.execute(_OLDEST).fetchone()) is not None:
                row_id, kept_ns, length = oldest
                if kept_ns >= oldest_ns and size <= self._bounds.max_bytes:
                    break
                self._db.execute("DELETE FROM frames WHERE id = ?", (row_id,))
                frames, size = frames - 1, size - length
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._frames, self._bytes = frames, size


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    connection.execute("PRAGMA synchronous = OFF")  # a power cut may cost pictures; the events are elsewhere
    return connection
