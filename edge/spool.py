"""The spool: where frames wait on disk until the cloud has their result on its disk.

Constraints
  * `put` returns only after COMMIT returned, and COMMIT only after fsync (WAL, synchronous=FULL). A receipt is given
    after that and never before. This is the promise that everything else rests on.
  * One thread writes, over one connection, and commits in groups: what arrives during an fsync shares the next one,
    so that one disk flush pays for many cameras. The event loop never waits for the disk.
  * A frame's name is (camera, epoch, seq). The epoch is drawn at random each time the file is opened, so no clock,
    counter or lost state can make a name twice. A seq is never reused, not even after a transaction that failed,
    because a COMMIT that failed may still have reached the disk.
  * A frame leaves by its final acknowledgement only. What the spool gives up itself (too old: EXPIRED; to make room,
    where the policy says so: DROPPED; damaged: REJECTED) stays as an entry without payload until the cloud has that
    end on its disk: one terminal record for each receipt.
  * Bounded by bytes (file and WAL) and by age. Whatever is refused, dropped or expired is counted.

On disk (format 1; tables in `edge.spool_file`)
  * <path>, <path>-wal: SQLite in WAL mode, held exclusively, so that two edges cannot share a file and no shared
    memory file is needed.
  * Every waiting frame has a CRC-32C over its name, times, header and payload, checked when it is taken to be sent.
  * <path>.reserve: 8 MiB that are given up when the disk is full, because even a deletion needs room to be logged.

Recovery
  * After kill -9 or power loss: SQLite replays the WAL up to the last whole COMMIT. Nothing to do here.
  * A damaged row: quarantined, told to the cloud as REJECTED. A damaged file: `edge.salvage` saves what can be read.
  * Disk full: `put` fails with Overloaded, deletions go on out of the reserve; it mends itself when there is space.
  * Any other I/O error: all that was in the transaction fails, and the file is opened anew, because after a failed
    fsync nobody can tell what is on the disk.
"""

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from edge.salvage import salvage
from edge.spool_file import Limits, SpoolFile, Tally
from edge.spool_rows import Draft, Entry, Final, FrameName, Outcome, Placed
from shared.errors import Overloaded, SightlineError, Unavailable
from shared.logs import facts
from shared.quarantine import Quarantined, Replayed

_log = logging.getLogger("sightline.edge.spool")
_T = TypeVar("_T")

GROUP_OPERATIONS = 256
GROUP_BYTES = 2 << 20
RESERVE_BYTES = 8 << 20
SWEEP_S = 1.0


@dataclass(frozen=True, slots=True)
class Stats:
    """The spool at the last commit. `oldest_us`: when the oldest frame was spooled, None if there is none."""

    frames: int = 0
    used_bytes: int = 0
    oldest_us: int | None = None
    writable: bool = True
    tally: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class _Operation(Generic[_T]):
    """`run` inside the transaction, `then` after its COMMIT; both on the writer thread."""

    run: Callable[[SpoolFile, int], _T]
    then: Callable[[_T], None] = lambda _: None
    grows: bool = False
    cost_bytes: int = 0
    future: "Future[_T]" = field(default_factory=Future)


def wall_clock_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


class Spool:
    """See the head of this module. Belongs to the event loop that opened it."""

    def __init__(self, path: Path, limits: Limits, *, clock_us: Callable[[], int] = wall_clock_us) -> None:
        """Opens or makes the file. Raises InvalidSettings, Unavailable. Blocks for as long as recovery takes."""
        self._path = path
        self._limits = limits
        self._tally = Tally()
        self._clock_us = clock_us
        self._loop = asyncio.get_running_loop()
        self._operations: SimpleQueue[_Operation[Any] | None] = SimpleQueue()
        self._watchers: dict[int, list[Future[Final]]] = {}
        self._reserve = path.with_name(path.name + ".reserve")
        self._disk_full = False
        self.arrived = asyncio.Event()
        self._file: SpoolFile | None = self._open()
        self.stats = Stats()
        self._tell_stats()
        self._thread = threading.Thread(target=self._write, name="spool-writer", daemon=True)
        self._thread.start()

    async def put(self, draft: Draft, *, watch: bool = False) -> tuple[Placed, "Future[Final] | None"]:
        """Keeps a frame: when this returns, it is on the disk. Raises TokenConflict, Overloaded, Unavailable.

        With `watch`, the future gives the frame's final acknowledgement once that is on the disk.
        """
        final: Future[Final] | None = Future() if watch else None

        def then(placed: Placed) -> None:
            if final is None:
                return
            if placed.outcome is not Outcome.NONE:
                final.set_result(Final(placed.id, placed.outcome, placed.reason))
            else:
                self._watchers.setdefault(placed.id, []).append(final)

        operation = _Operation(
            lambda file, now_us: file.put(draft, now_us), then, grows=True, cost_bytes=draft.cost_bytes
        )
        return await self._do(operation), final

    async def take(
        self, after_id: int, *, frames: int, max_bytes: int, without_models: Sequence[str] = ()
    ) -> list[Entry]:
        """The next entries to send after an id, in the order of spooling. Raises Unavailable."""
        return await self._do(
            _Operation(
                lambda file, now_us: file.take(
                    after_id, frames=frames, max_bytes=max_bytes, without_models=without_models, now_us=now_us
                )
            )
        )

    async def finish(self, finals: Sequence[Final]) -> None:
        """Forgets frames that have their final acknowledgement. Raises Unavailable."""

        def run(file: SpoolFile, now_us: int) -> None:
            for final in finals:
                file.finish(final, now_us)

        def then(_: None) -> None:
            for final in finals:
                for watcher in self._watchers.pop(final.id, ()):
                    if watcher.set_running_or_notify_cancel():
                        watcher.set_result(final)

        await self._do(_Operation(run, then))

    async def holds_model(self, model_id: str) -> bool:
        """Whether a frame of this bundle still waits for the cloud. Raises Unavailable."""
        return await self._do(_Operation(lambda file, _: file.holds_model(model_id)))

    async def quarantined(self, after_id: int, limit: int) -> list[Quarantined]:
        """Rejected frames that are kept, oldest first. Raises Unavailable."""
        return await self._do(_Operation(lambda file, _: file.quarantined(after_id, limit)))

    async def find_quarantined(self, camera_id: str, epoch: int, seq: int) -> Quarantined | None:
        """A rejected frame by its name, None if it is not kept. Raises Unavailable."""
        return await self._do(_Operation(lambda file, _: file.find_quarantined(FrameName(camera_id, epoch, seq))))

    async def replay(self, frame: Quarantined) -> Replayed:
        """Takes a rejected frame back to be sent, under its new name. Raises Unavailable."""
        await self._do(_Operation(lambda file, now_us: file.replay(frame, now_us)))
        self.arrived.set()
        return Replayed()

    async def close(self) -> None:
        """Does what was asked for, folds the WAL into the file and lets go of it."""
        self._operations.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- the writer thread ---------------------------------------------------------------------------------------

    async def _do(self, operation: _Operation[_T]) -> _T:
        if not self._thread.is_alive():
            raise Unavailable("the spool is closed")
        self._operations.put(operation)
        return await asyncio.wrap_future(operation.future)

    def _write(self) -> None:
        swept = 0.0
        closing = False
        while not closing:
            batch, closing = self._next_batch()
            try:
                self._commit(batch)
            except Exception as error:  # a fault of this program must not leave callers waiting for ever
                _log.exception("the spool's writer failed")
                _fail([each for each in batch if not each.future.done()], Unavailable(f"the spool failed: {error!r}"))
            if time.monotonic() - swept >= SWEEP_S:
                self._sweep()
                swept = time.monotonic()
        if self._file is not None:
            self._file.close()
        while not self._operations.empty():  # what was asked for while it closed
            operation = self._operations.get()
            if operation is not None and operation.future.set_running_or_notify_cancel():
                operation.future.set_exception(Unavailable("the spool is closed"))

    def _next_batch(self) -> tuple[list[_Operation[Any]], bool]:
        """Waits for an operation and takes all that came with it; True once the spool is to close."""
        batch: list[_Operation[Any]] = []
        size = 0
        try:
            operation = self._operations.get(timeout=SWEEP_S)
            while operation is not None:
                if operation.future.set_running_or_notify_cancel():
                    batch.append(operation)
                    size += operation.cost_bytes
                if len(batch) >= GROUP_OPERATIONS or size >= GROUP_BYTES:
                    return batch, False
                operation = self._operations.get_nowait()
        except Empty:
            return batch, False
        return batch, True

    def _commit(self, batch: list[_Operation[Any]]) -> None:
        if not batch:
            return
        if self._disk_full:
            refused = [operation for operation in batch if operation.grows]
            _fail(refused, Overloaded("the spool's disk is full; try again when there is space"))
            batch = [operation for operation in batch if not operation.grows]
        try:
            outcomes = self._attempt(batch)
        except (sqlite3.Error, OSError) as error:
            self._recover(error, batch)
            return
        self._tell_stats()
        grown = False
        for operation, result, fault in outcomes:
            if fault is not None:
                operation.future.set_exception(fault)
                continue
            operation.then(result)
            operation.future.set_result(result)
            grown = grown or operation.grows
        if grown:
            self._call_loop(self.arrived.set)

    def _attempt(self, batch: list[_Operation[Any]]) -> list[tuple[_Operation[Any], Any, SightlineError | None]]:
        if self._file is None:
            self._file = self._open()
        outcomes: list[tuple[_Operation[Any], Any, SightlineError | None]] = []
        with self._file.transaction():
            for operation in batch:
                try:
                    outcomes.append((operation, operation.run(self._file, self._clock_us()), None))
                except SightlineError as fault:
                    outcomes.append((operation, None, fault))
        return outcomes

    def _recover(self, error: sqlite3.Error | OSError, batch: list[_Operation[Any]]) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        _log.error("the spool could not be written", extra=facts(file=self._path, error=error))
        if code == sqlite3.SQLITE_FULL and not self._disk_full:
            self._disk_full = True
            self._reserve.unlink(missing_ok=True)
            self._commit(batch)  # what grows is refused, what deletes is done out of the reserve
            return
        _fail(batch, Unavailable(f"the spool could not be written: {error}; nothing was kept, try again"))
        if code != sqlite3.SQLITE_FULL:
            self._reopen(damaged=code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))

    def _reopen(self, *, damaged: bool) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except sqlite3.Error as error:
                _log.warning("the spool did not close cleanly", extra=facts(error=error))
            self._file = None
        try:
            if damaged:
                salvage(self._path, self._limits)
            self._file = self._open()
        except (SightlineError, sqlite3.Error, OSError) as error:
            _log.error("the spool could not be opened again; trying later", extra=facts(error=error))
        self._tell_stats()
        # Everything may be somewhere else now; the uplink looks again from the start.
        self._call_loop(self.arrived.set)

    def _open(self) -> SpoolFile:
        path = self._path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_reserve()
            try:
                file = SpoolFile(path, self._limits, self._tally)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    raise
                salvage(path, self._limits)
                file = SpoolFile(path, self._limits, self._tally)
            folder = os.open(path.parent, os.O_RDONLY)  # a new file is there for good only when its folder says so
            os.fsync(folder)
            os.close(folder)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise Unavailable(f"spool {path} is in use by another process") from None
            raise Unavailable(f"spool {path} cannot be opened: {error}") from error
        except OSError as error:
            raise Unavailable(f"spool {path} cannot be opened: {error}") from error
        return file

    def _keep_reserve(self) -> None:
        """Makes the reserve file if it is not there and the disk has room for it twice over."""
        if self._reserve.exists():
            return
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize < 2 * RESERVE_BYTES:
            return
        with self._reserve.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, RESERVE_BYTES)

    def _sweep(self) -> None:
        try:
            self._keep_reserve()
            self._disk_full = self._disk_full and not self._reserve.exists()
            if self._file is None:
                self._file = self._open()
            with self._file.transaction():
                self._file.sweep(self._clock_us())
            self._file.shrink(tight=self._disk_full)
            for frame_id, watchers in list(self._watchers.items()):
                self._watchers[frame_id] = [watcher for watcher in watchers if not watcher.cancelled()]
                if not self._watchers[frame_id]:
                    del self._watchers[frame_id]
            self._tell_stats()
        except (SightlineError, sqlite3.Error, OSError) as error:
            if isinstance(error, SightlineError):
                _log.error("the spool cannot be used", extra=facts(error=error))
            else:
                self._recover(error, [])

    def _tell_stats(self) -> None:
        file = self._file
        if file is None:
            self.stats = replace(self.stats, writable=False)
            return
        self.stats = Stats(
            frames=file.frames,
            used_bytes=file.used_bytes,
            oldest_us=file.oldest_us(),
            writable=not self._disk_full,
            tally=replace(self._tally),
        )

    def _call_loop(self, callback: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _fail(batch: list[_Operation[Any]], error: SightlineError) -> None:
    for operation in batch:
        operation.future.set_exception(error)
