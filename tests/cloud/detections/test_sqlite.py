"""What is particular to the SQLite backend: group commit, crash, a full disk, retention by age, one process."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cloud.detections.log import FrameName, Record, Retention
from cloud.detections.sqlite import SqliteLog
from shared.errors import CursorExpired, Unavailable

RETENTION = Retention(max_age_s=100, max_bytes=1 << 30, key_age_s=1000)
SECOND = 1_000_000_000

# Appends without end, from eight cameras at once; prints a sequence only after append returned.
APPENDER = """
import asyncio, sys
from pathlib import Path
from cloud.detections.log import FrameName, Retention
from cloud.detections.sqlite import SqliteLog

async def camera(log, label, epoch):
    for seq in range(10**9):
        await log.append(FrameName(label, epoch, seq), f"{label} {epoch} {seq}".encode())
        print(label, epoch, seq, flush=True)

async def main(path, epoch):
    log = await SqliteLog.open(Path(path), Retention(1e6, 1 << 30, 1e6))
    await asyncio.gather(*(camera(log, label, epoch) for label in "abcdefgh"))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def name(seq: int) -> FrameName:
    return FrameName("gate", 1, seq)


def test_killing_the_appending_process_loses_no_acknowledged_event(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    acknowledged: set[str] = set()

    async def records() -> list[Record]:
        log = await SqliteLog.open(path, Retention(1e6, 1 << 30, 1e6))
        records = await log.read(0, 1_000_000)
        await log.close()
        return records

    for epoch, lines_before_kill in enumerate((1, 40, 333)):
        command = [sys.executable, "-c", APPENDER, path, str(epoch)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(lines_before_kill)]
            os.kill(process.pid, signal.SIGKILL)
            # What was printed before the kill counts; a last line without its newline was cut short by the kill.
            lines += [line for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n"]
        acknowledged.update(line.strip() for line in lines)
        kept = asyncio.run(records())
        events = [record.event.decode() for record in kept]
        assert len(events) == len(set(events))
        assert acknowledged <= set(events)
        assert [record.sequence for record in kept] == list(range(1, len(kept) + 1))
    assert len(acknowledged) >= 374


async def test_a_second_process_cannot_open_the_log(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)
    with pytest.raises(Unavailable, match="in use"):
        await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)
    await log.close()
    await (await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)).close()


async def test_appends_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)
    await asyncio.gather(*(log.append(name(seq), b"") for seq in range(200)))
    times = {record.logged_ns for record in await log.read(0, 1000)}  # one time a transaction
    await log.close()
    assert len(times) < 20


async def test_a_full_disk_is_unavailable_and_recovers_by_itself(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)
    await log.append(name(0), b"before")
    # SQLite's own page limit gives the same SQLITE_FULL as a disk that has no page left.
    pages = log._db.execute("PRAGMA page_count").fetchone()[0]
    log._db.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(Unavailable, match="full"):
        await asyncio.gather(*(log.append(name(seq), bytes(8000)) for seq in range(1, 10)))
    assert await log.find(name(5)) is None
    log._db.execute("PRAGMA max_page_count = 1000000")
    assert (await log.append(name(5), b"after")).new
    assert [record.event for record in await log.read(0, 10)] == [b"before", b"after"]
    await log.close()


async def test_events_go_by_age_keys_later_and_sequences_are_never_reused(tmp_path: Path) -> None:
    now = 1000 * SECOND
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION, clock=lambda: now)
    for seq in range(3):
        await log.append(name(seq), b"old")
    now += 101 * SECOND  # past the record age, within the key age
    assert (await log.append(name(3), b"new")).sequence == 4
    assert (await log.span()).oldest == 4
    with pytest.raises(CursorExpired, match=r"\b4\b"):
        await log.read(2, 10)
    assert not (await log.append(name(0), b"resend")).new
    now += 1001 * SECOND
    assert (await log.append(name(4), b"newer")).sequence == 5
    assert await log.find(name(0)) is None
    assert await log.find(name(4)) == 5
    await log.close()

    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION, clock=lambda: now + 10_000 * SECOND)
    assert (await log.append(name(5), b"newest")).sequence == 6
    await log.close()


async def test_time_in_the_log_never_runs_backwards_though_the_clock_does(tmp_path: Path) -> None:
    now = 1000 * SECOND
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION, clock=lambda: now)
    await log.append(name(0), b"")
    now -= 500 * SECOND
    await log.append(name(1), b"")
    await log.close()
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION, clock=lambda: now)
    await log.append(name(2), b"")
    assert [record.logged_ns for record in await log.read(0, 10)] == [1000 * SECOND] * 3
    await log.close()


async def test_an_old_position_is_read_from_disk_with_the_same_records(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path / "log.sqlite", RETENTION)
    await asyncio.gather(*(log.append(name(seq), b"%d" % seq) for seq in range(6000)))  # more than memory keeps
    assert log._tail.oldest is not None
    assert log._tail.oldest > 1
    position, seen = 0, []
    while records := await log.read(position, 1000):
        seen += [record.sequence for record in records]
        position = seen[-1]
    assert seen == list(range(1, 6001))
    await log.close()


async def test_a_file_with_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    await (await SqliteLog.open(path, RETENTION)).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Unavailable, match="schema 99"):
        await SqliteLog.open(path, RETENTION)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(Unavailable, match="not a database"):
        await SqliteLog.open(path, RETENTION)
