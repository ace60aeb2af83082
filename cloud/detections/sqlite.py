"""The detection log in one SQLite file: the default backend, embedded, no server beside it.

    append --queue--> writer thread: BEGIN, all that waits, retention, COMMIT (fsync) --> futures resolved, tail, news
    find   --> key connection     read --> tail in memory, else reader connection

Durability: WAL with synchronous=FULL syncs the write-ahead log at every COMMIT, and an append returns only after its
COMMIT did. One writer thread takes everything that waits into one transaction, so that the cost of a sync is shared
by all cameras (group commit) and nobody waits for a timer.

On disk (schema version in PRAGMA user_version):

* `events(sequence, logged_ns, event)`: AUTOINCREMENT, so a sequence is never reused, not even after retention.
* `keys(sequence, logged_ns, camera, epoch, seq)`: unique key; outlives its event. 64-bit unsigned numbers are stored
  as the signed number with the same bits.
* `log`: one row: random id, how far retention has removed, payload bytes kept, the last time given out.

A lock file beside the database keeps a second process out: sequences are handed to readers from memory in commit
order, which holds for one writer only. The lock dies with the process.
"""

import asyncio
import fcntl
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.detections.log import Appended, FrameName, Record, Retention, Span
from cloud.detections.tail import Tail
from shared.errors import CursorExpired, Unavailable

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE log (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    log_id TEXT NOT NULL, removed_through INTEGER NOT NULL, payload_bytes INTEGER NOT NULL, last_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, logged_ns INTEGER NOT NULL, event BLOB NOT NULL
) STRICT;
CREATE TABLE keys (
    sequence INTEGER PRIMARY KEY, logged_ns INTEGER NOT NULL,
    camera TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, UNIQUE (camera, epoch, seq)
) STRICT;
"""
# One statement, hence one snapshot: retention cannot slip between the check of removed_through and the rows.
_SELECT_RECORDS = """
SELECT removed_through, r.* FROM log LEFT JOIN (
    SELECT sequence, events.logged_ns, camera, epoch, seq, event FROM events JOIN keys USING (sequence)
    WHERE sequence > ? ORDER BY sequence LIMIT ?
) AS r ORDER BY r.sequence
"""

_MAX_BATCH = 1024  # appends in one transaction
_PRUNE_ROWS = 1024  # rows retention looks at in one transaction, so that no append waits long for it
_IDLE_PRUNE_S = 60.0  # retention by age goes on when nothing is appended


@dataclass(slots=True, eq=False)
class _Append:
    name: FrameName
    event: bytes
    done: "asyncio.Future[Appended]"


@dataclass(frozen=True, slots=True)
class _Committed:
    """What a transaction changed, carried from the writer thread to the event loop."""

    results: list[Appended]
    records: list[Record]
    removed_through: int


class SqliteLog:
    """See the module's head. Made by `open`; belongs to the event loop it was opened in."""

    def __init__(self, path: Path, retention: Retention, clock: Callable[[], int]) -> None:
        self._path = path
        self._retention = retention
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._lock_fd = _lock(path)
        try:
            self._db = _connect(path)
            self._log_id, self._removed_through, self._last_ns = _prepare(self._db, path, clock)
        except sqlite3.Error as error:
            os.close(self._lock_fd)
            raise Unavailable(f"detection log {path} cannot be opened: {error}") from error
        except BaseException:
            os.close(self._lock_fd)
            raise
        newest = self._db.execute("SELECT max(sequence) FROM events").fetchone()[0]
        self._newest: int = newest if newest is not None else self._removed_through
        self._tail = Tail()
        self._news = asyncio.Event()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._closed = False
        # Finding keys (ingest) has its own connection, so that a consumer's long replay never delays it.
        self._key_reader = _Reader(path, "log-keys")
        self._record_reader = _Reader(path, "log-records")
        self._writer = threading.Thread(target=self._write_until_closed, name="log-writer", daemon=True)
        self._writer.start()

    @classmethod
    async def open(cls, path: Path, retention: Retention, clock: Callable[[], int] = time.time_ns) -> "SqliteLog":
        """Opens or creates the log at `path`. `clock`: Unix time in ns.

        Raises Unavailable if the file is held by another process, cannot be read or has a newer schema.
        """
        return cls(path, retention, clock)

    @property
    def log_id(self) -> str:
        return self._log_id

    @property
    def newest(self) -> int:
        return self._newest

    async def append(self, name: FrameName, event: bytes) -> Appended:
        if self._closed:
            raise Unavailable("the detection log is closed")
        request = _Append(name, event, self._loop.create_future())
        self._queue.put(request)
        return await request.done

    async def find(self, name: FrameName) -> int | None:
        key = (name.camera, _signed(name.epoch), _signed(name.seq))
        rows = await self._key_reader.rows("SELECT sequence FROM keys WHERE camera = ? AND epoch = ? AND seq = ?", key)
        return rows[0][0] if rows else None

    async def span(self) -> Span:
        return Span(self._removed_through + 1, self._newest)

    async def read(self, after: int, limit: int) -> list[Record]:
        self._check_kept(after, self._removed_through)
        if after >= self._newest:
            return []
        held = self._tail.read(after, limit)
        if held is not None:
            return held
        rows = await self._record_reader.rows(_SELECT_RECORDS, (after, limit))
        self._check_kept(after, rows[0][0])
        return [
            Record(sequence, ns, FrameName(camera, _unsigned(epoch), _unsigned(seq)), event)
            for _, sequence, ns, camera, epoch, seq, event in rows
            if sequence is not None
        ]

    async def wait_beyond(self, sequence: int) -> None:
        while self._newest <= sequence:
            await self._news.wait()

    async def position_at(self, unix_ns: int) -> int:
        low, high = self._removed_through, self._newest  # times never decrease along the log: bisect by sequence
        while low < high:
            middle = (low + high) // 2
            rows = await self._record_reader.rows(
                "SELECT sequence, logged_ns FROM events WHERE sequence > ? ORDER BY sequence LIMIT 1", (middle,)
            )
            if rows and rows[0][1] < unix_ns:
                low = rows[0][0]
            else:
                high = middle
        return max(low, self._removed_through)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._key_reader.close()
        self._record_reader.close()
        self._db.close()
        os.close(self._lock_fd)

    def _check_kept(self, after: int, removed_through: int) -> None:
        if after < removed_through:
            raise CursorExpired(
                f"the log keeps records from sequence {removed_through + 1} on, "
                f"asked for what follows {after}: resume from {removed_through} or later"
            )

    # In the writer thread.

    def _write_until_closed(self) -> None:
        while True:
            try:
                first = self._queue.get(timeout=_IDLE_PRUNE_S)
                batch, closing = self._gather(first)
            except queue.Empty:
                batch, closing = [], False
            if batch or not closing:
                self._write(batch)
            if closing:
                return

    def _write(self, batch: list[_Append]) -> None:
        try:
            committed = self._commit(batch)
        except Exception as error:  # whatever it is, those who wait must hear of it and the thread must live on
            failure = Unavailable(f"detection log {self._path} cannot be written: {error}")
            self._loop.call_soon_threadsafe(_fail, batch, failure)
            if batch:
                self._make_room()
        else:
            self._loop.call_soon_threadsafe(self._publish, batch, committed)

    def _make_room(self) -> None:
        """After a failed write, most likely a full disk: gives the WAL's space back and lets retention go on."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._write([])

    def _gather(self, first: _Append | None) -> tuple[list[_Append], bool]:
        batch: list[_Append] = []
        request = first
        while request is not None:
            batch.append(request)
            if len(batch) == _MAX_BATCH:
                return batch, False
            try:
                request = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit(self, batch: list[_Append]) -> _Committed:
        now = max(self._clock(), self._last_ns)
        results: list[Appended] = []
        records: list[Record] = []
        with _transaction(self._db):
            for request in batch:
                result = self._insert(request, now)
                results.append(result)
                if result.new:
                    records.append(Record(result.sequence, now, request.name, request.event))
            added = sum(len(record.event) for record in records)
            removed_through = self._prune(now, added)
            self._db.execute("UPDATE log SET last_ns = ?", (now,))
        self._last_ns = now
        return _Committed(results, records, removed_through)

    def _insert(self, request: _Append, now: int) -> Appended:
        key = (request.name.camera, _signed(request.name.epoch), _signed(request.name.seq))
        row = self._db.execute("SELECT sequence FROM keys WHERE camera = ? AND epoch = ? AND seq = ?", key).fetchone()
        if row is not None:
            return Appended(row[0], new=False)
        cursor = self._db.execute("INSERT INTO events (logged_ns, event) VALUES (?, ?)", (now, request.event))
        sequence = cursor.lastrowid
        if sequence is None:
            raise sqlite3.InternalError("an insert gave no row id")
        self._db.execute(
            "INSERT INTO keys (sequence, logged_ns, camera, epoch, seq) VALUES (?, ?, ?, ?, ?)", (sequence, now, *key)
        )
        return Appended(sequence, new=True)

    def _prune(self, now: int, added: int) -> int:
        """Removes the oldest events and keys past their bounds, at most some rows a call; returns removed_through."""
        removed_through, kept_bytes = self._db.execute("SELECT removed_through, payload_bytes FROM log").fetchone()
        kept_bytes += added
        oldest_allowed = now - int(self._retention.max_age_s * 1e9)
        rows = self._db.execute(
            "SELECT sequence, logged_ns, length(event) FROM events ORDER BY sequence LIMIT ?", (_PRUNE_ROWS,)
        )
        for sequence, logged_ns, length in rows:
            if logged_ns >= oldest_allowed and kept_bytes <= self._retention.max_bytes:
                break
            removed_through = sequence
            kept_bytes -= length
        rows.close()
        self._db.execute("DELETE FROM events WHERE sequence <= ?", (removed_through,))
        self._db.execute("UPDATE log SET removed_through = ?, payload_bytes = ?", (removed_through, kept_bytes))

        oldest_key = now - int(self._retention.key_age_s * 1e9)
        last_key = 0
        rows = self._db.execute("SELECT sequence, logged_ns FROM keys ORDER BY sequence LIMIT ?", (_PRUNE_ROWS,))
        for sequence, logged_ns in rows:
            if logged_ns >= oldest_key or sequence > removed_through:
                break
            last_key = sequence
        rows.close()
        self._db.execute("DELETE FROM keys WHERE sequence <= ?", (last_key,))
        return int(removed_through)

    # Back in the event loop.

    def _publish(self, batch: list[_Append], committed: _Committed) -> None:
        if committed.records:
            self._tail.extend(committed.records)
            self._newest = committed.records[-1].sequence
        self._removed_through = committed.removed_through
        for request, result in zip(batch, committed.results, strict=True):
            if not request.done.done():
                request.done.set_result(result)
        if committed.records:
            self._news.set()
            self._news = asyncio.Event()


class _Reader:
    """One read-only connection on a thread of its own."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._db = _connect(path)
        self._db.execute("PRAGMA query_only = ON")

    async def rows(self, sql: str, parameters: tuple[int | str, ...]) -> list[tuple[Any, ...]]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, lambda: self._db.execute(sql, parameters).fetchall())
        except sqlite3.Error as error:
            raise Unavailable(f"detection log {self._path} cannot be read: {error}") from error

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._db.close()


def _fail(batch: list[_Append], failure: Unavailable) -> None:
    for request in batch:
        if not request.done.done():
            request.done.set_exception(failure)


def _lock(path: Path) -> int:
    """Takes the lock file beside `path`; the kernel gives it back when the process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"detection log {path} cannot be opened: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"detection log {path} is in use by another process") from error
    return fd


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    return db


def _prepare(db: sqlite3.Connection, path: Path, clock: Callable[[], int]) -> tuple[str, int, int]:
    """Creates the schema in an empty file, checks it otherwise. Returns log id, removed_through and last_ns."""
    with _transaction(db):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _SCHEMA.split(";")[:-1]:
                db.execute(statement)
            db.execute("INSERT INTO log VALUES (1, ?, 0, 0, ?)", (secrets.token_hex(16), clock()))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise Unavailable(f"detection log {path} has schema {version}, this program knows {SCHEMA_VERSION}")
    log_id, removed_through, last_ns = db.execute("SELECT log_id, removed_through, last_ns FROM log").fetchone()
    return log_id, removed_through, last_ns


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _unsigned(value: int) -> int:
    return value + (1 << 64) if value < 0 else value
