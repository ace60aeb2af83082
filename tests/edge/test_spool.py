"""The spool keeps what it gave a receipt for, whatever happens, and gives up nothing in silence."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC240, PT012 - these tests may block, and wait for threads they cannot await

import asyncio
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge.spool import Spool
from edge.spool_file import Limits, SpoolFile, Tally
from edge.spool_rows import Draft, Entry, Final, Outcome
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings, Overloaded, TokenConflict, Unavailable

HOUR_US = 3_600_000_000
LIMITS = Limits(
    max_bytes=1 << 30,
    max_age_us=72 * HOUR_US,
    drop_oldest=False,
    token_keep_us=24 * HOUR_US,
    max_tokens=1000,
    quarantine_frames=3,
    quarantine_bytes=1 << 20,
    max_cameras=8,
)


class Clock:
    """Microseconds that move only when told."""

    def __init__(self) -> None:
        self.now_us = 1_800_000_000_000_000

    def __call__(self) -> int:
        return self.now_us


def draft(number: int, *, size: int = 500, camera: str = "door", token: str = "", expires_us: int = 0) -> Draft:
    noise = random.Random(number).randbytes(size)
    return Draft(
        camera_id=camera,
        captured_us=1_700_000_000_000_000 + number,
        expires_us=expires_us,
        token=token,
        content=hashlib.sha256(noise).digest(),
        bitstream=Bitstream("ab" * 32, 1024, 480, 640, noise[: size // 4], noise[size // 4 :], number),
    )


@asynccontextmanager
async def opened(path: Path, limits: Limits = LIMITS, clock: Callable[[], int] | None = None) -> AsyncIterator[Spool]:
    spool = Spool(path, limits, clock_us=clock) if clock else Spool(path, limits)
    try:
        yield spool
    finally:
        await spool.close()


async def everything(spool: Spool, **options: object) -> list[Entry]:
    return await spool.take(0, frames=100_000, max_bytes=1 << 40, **options)  # type: ignore[arg-type]


async def swept(spool: Spool, done: Callable[[], bool]) -> None:
    """Waits for what the writer does in one of its next rounds."""
    async with asyncio.timeout(120):
        while not done():
            await asyncio.sleep(0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


async def test_frames_come_back_as_they_were_and_in_order(path: Path) -> None:
    async with opened(path) as spool:
        placed = [(await spool.put(draft(n, camera=f"camera-{n % 3}")))[0] for n in range(9)]
    async with opened(path) as spool:
        entries = await everything(spool)
    assert [entry.name for entry in entries] == [each.name for each in placed]
    assert [entry.bitstream for entry in entries] == [draft(n).bitstream for n in range(9)]
    assert [entry.name.seq for entry in entries] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


async def test_each_opening_draws_a_new_epoch(path: Path) -> None:
    epochs = set()
    for _ in range(3):
        async with opened(path) as spool:
            placed, _ = await spool.put(draft(1))
            epochs.add(placed.name.epoch)
            assert placed.name.seq == 1
    assert len(epochs) == 3


async def test_what_arrives_during_a_commit_shares_the_next_one(path: Path) -> None:
    async with opened(path) as spool:
        commits: list[str] = []
        spool._file._db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)  # type: ignore[union-attr]
        await asyncio.gather(*(spool.put(draft(n)) for n in range(64)))
        assert len(commits) < 16
        assert len(await everything(spool)) == 64


async def test_a_put_returns_only_after_its_commit(path: Path) -> None:
    async with opened(path) as spool:
        too_early: list[bool] = []

        def hold_the_commit(sql: str) -> None:
            if sql == "COMMIT":
                time.sleep(0.3)  # on the writer thread; the event loop is free to make a mistake
                too_early.append(task.done())

        spool._file._db.set_trace_callback(hold_the_commit)  # type: ignore[union-attr]
        task = asyncio.create_task(spool.put(draft(1)))
        await task
        assert too_early
        assert not any(too_early)


WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_spool import LIMITS, draft
from edge.spool import Spool

async def main():
    spool = Spool(Path({path!r}), LIMITS)
    async def camera(k):
        n = 0
        while True:
            n += 1
            number = {start} + 1000000 * k + n
            placed, _ = await spool.put(draft(number, size=300 + number % 5000, camera=f"camera-{{k}}"))
            print(placed.name.camera_id, placed.name.epoch, placed.name.seq, number, flush=True)
    await asyncio.gather(*(camera(k) for k in range(4)))

asyncio.run(main())
"""


async def test_every_frame_with_a_receipt_survives_kill_9(path: Path) -> None:
    receipted: dict[tuple[str, int, int], int] = {}
    rng = random.Random(5)
    for life in range(4):
        code = WRITER.format(tests=str(Path(__file__).parent), path=str(path), start=life * 10_000)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        os.set_blocking(process.stdout.fileno(), True)
        for _ in range(rng.randint(20, 120)):
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        for line in lines:
            if line.endswith("\n"):
                camera, epoch, seq, number = line.split()
                receipted[camera, int(epoch), int(seq)] = int(number)
    assert len(receipted) > 100
    async with opened(path) as spool:
        kept = {(e.name.camera_id, e.name.epoch, e.name.seq): e for e in await everything(spool)}
    assert receipted.keys() <= kept.keys()
    for name, number in receipted.items():
        assert kept[name].bitstream == draft(number, size=300 + number % 5000).bitstream
    assert all(entry.outcome is Outcome.NONE for entry in kept.values())


async def test_a_retry_with_its_token_makes_no_second_frame(path: Path) -> None:
    async with opened(path) as spool:
        first, _ = await spool.put(draft(1, token="t"))
        again, _ = await spool.put(draft(1, token="t"))
        other_camera, _ = await spool.put(draft(1, token="t", camera="gate"))
    async with opened(path) as spool:
        after_restart, _ = await spool.put(draft(1, token="t"))
        assert len(await everything(spool)) == 2
    assert not first.duplicate
    assert not other_camera.duplicate
    assert again == after_restart == replace(first, duplicate=True)


async def test_a_token_for_another_picture_is_a_conflict_and_spoils_nothing_else(path: Path) -> None:
    async with opened(path) as spool:
        await spool.put(draft(1, token="t"))
        good, bad = await asyncio.gather(spool.put(draft(3)), spool.put(draft(2, token="t")), return_exceptions=True)
        assert isinstance(bad, TokenConflict)
        assert "'t'" in str(bad)
        assert not isinstance(good, BaseException)
        assert len(await everything(spool)) == 2


async def test_a_token_outlives_its_frame_and_tells_how_it_ended(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock=clock) as spool:
        placed, _ = await spool.put(draft(1, token="t"))
        await spool.finish([Final(placed.id, Outcome.DETECTIONS, "")])
        again, final = await spool.put(draft(1, token="t"), watch=True)
        assert again.outcome is Outcome.DETECTIONS
        assert final is not None
        assert final.result(timeout=0).outcome is Outcome.DETECTIONS
        clock.now_us += 25 * HOUR_US
        later, _ = await spool.put(draft(2, token="t"))
        assert not later.duplicate


async def test_tokens_are_bounded(path: Path) -> None:
    async with opened(path, replace(LIMITS, max_tokens=10)) as spool:
        await asyncio.gather(*(spool.put(draft(n, token=f"t{n}")) for n in range(30)))
        file = spool._file
        assert file is not None
        await swept(spool, lambda: file._tokens <= 10)
        assert (await spool.put(draft(29, token="t29")))[0].duplicate
        assert not (await spool.put(draft(0, token="t0")))[0].duplicate


async def test_a_watcher_hears_the_end_once_it_is_on_disk(path: Path) -> None:
    async with opened(path) as spool:
        placed, final = await spool.put(draft(1), watch=True)
        assert final is not None
        assert not final.done()
        await spool.finish([Final(placed.id, Outcome.REJECTED, "no")])
        assert (await asyncio.wrap_future(final)).reason == "no"
        assert await everything(spool) == []
        await spool.finish([Final(placed.id, Outcome.REJECTED, "no")])  # acknowledged twice


async def test_a_full_spool_refuses_and_counts(path: Path) -> None:
    async with opened(path, replace(LIMITS, max_bytes=16 << 20)) as spool:
        kept = 0
        with pytest.raises(Overloaded, match="expected room for 200600 bytes in the spool, it holds"):
            while True:
                await spool.put(draft(kept, size=200_000))
                kept += 1
        await asyncio.sleep(0)
        assert 20 < kept < 60
        entries = await everything(spool)
        assert len(entries) == kept
        await spool.finish([Final(entries[0].id, Outcome.DETECTIONS, ""), Final(entries[1].id, Outcome.DETECTIONS, "")])
        await spool.put(draft(1000, size=200_000))
        assert spool.stats.tally.refused == 1


async def test_drop_oldest_tells_what_it_dropped_and_stays_within_its_bound(path: Path) -> None:
    bound = 16 << 20
    async with opened(path, replace(LIMITS, max_bytes=bound, drop_oldest=True)) as spool:
        for number in range(120):
            await spool.put(draft(number, size=200_000))
            used = sum(part.stat().st_size for part in path.parent.glob("spool.sqlite*") if part.suffix != ".reserve")
            assert used <= bound
        entries = await everything(spool)
        assert [entry.name.seq for entry in entries] == list(range(1, 121))
        dropped = [entry for entry in entries if entry.outcome is Outcome.DROPPED]
        assert dropped == entries[: len(dropped)]
        assert 60 < len(dropped) < 100
        assert spool.stats.tally.dropped == len(dropped)


async def test_frames_past_their_own_time_or_the_spools_are_told_as_expired(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock=clock) as spool:
        await spool.put(draft(1, expires_us=clock.now_us + 5_000_000))
        await spool.put(draft(2))
        clock.now_us += 5_000_001
        first, second = await everything(spool)
        assert (first.outcome, first.bitstream) == (Outcome.EXPIRED, None)
        assert second.outcome is Outcome.NONE
        clock.now_us += 73 * HOUR_US
        await swept(spool, lambda: spool.stats.tally.expired == 2)
        assert [entry.outcome for entry in await everything(spool)] == [Outcome.EXPIRED] * 2


async def test_take_goes_on_after_an_id_and_is_bounded_but_never_stuck(path: Path) -> None:
    async with opened(path) as spool:
        for number in range(6):
            await spool.put(draft(number, size=100_000))
        two = await spool.take(0, frames=10, max_bytes=250_000)
        assert [entry.name.seq for entry in two] == [1, 2]
        one = await spool.take(two[-1].id, frames=10, max_bytes=1)
        assert [entry.name.seq for entry in one] == [3]
        assert await spool.take(0, frames=10, max_bytes=1 << 30, without_models=["ab" * 32]) == []


async def test_a_damaged_row_is_told_as_rejected_and_kept_for_people(path: Path) -> None:
    async with opened(path) as spool:
        for number in range(5):
            await spool.put(draft(number))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE payload SET latents = zeroblob(length(latents)) WHERE id = 2")
        db.execute("DELETE FROM payload WHERE id = 3")
        db.execute("UPDATE frame SET captured_us = captured_us + 1 WHERE id = 4")
        db.execute("UPDATE frame SET outcome = 77 WHERE id = 5")
    db.close()
    async with opened(path) as spool:
        entries = await everything(spool)
        assert [entry.outcome.name for entry in entries] == ["NONE"] + ["REJECTED"] * 4
        assert "row CRC-32C" in entries[1].reason
        assert "missing" in entries[2].reason
        assert spool.stats.tally.damaged == 4
        for entry in entries:
            await spool.finish([Final(entry.id, entry.outcome, entry.reason)])
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM frame").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM quarantine").fetchone() == (3,)
    db.close()


async def test_the_quarantine_keeps_the_newest(path: Path) -> None:
    async with opened(path) as spool:
        for number in range(6):
            placed, _ = await spool.put(draft(number))
            await spool.finish([Final(placed.id, Outcome.REJECTED, f"reason {number}")])
        counted = spool._file._db.execute("SELECT count(*) FROM quarantine")  # type: ignore[union-attr]
        assert counted.fetchone() == (6,)
        await asyncio.sleep(1.5)
    with sqlite3.connect(path) as db:
        reasons = [row[0] for row in db.execute("SELECT reason FROM quarantine ORDER BY id")]
    db.close()
    assert reasons == ["reason 3", "reason 4", "reason 5"]


async def test_a_damaged_file_is_salvaged_and_kept_aside(path: Path) -> None:
    async with opened(path) as spool:
        placed = [(await spool.put(draft(n, size=20_000, token=f"t{n}")))[0] for n in range(200)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = b"\xa5" * 4096
    content[-8192:-4096] = b"\xa5" * 4096
    path.write_bytes(content)
    async with opened(path) as spool:
        deadline = time.monotonic() + 20
        entries: list[Entry] = []
        while not entries and time.monotonic() < deadline:
            try:
                entries = await everything(spool)
            except Unavailable:
                continue
        sound = [entry for entry in entries if entry.outcome is Outcome.NONE]
        assert len(sound) >= 190
        by_name = {each.name: number for number, each in enumerate(placed)}
        assert all(entry.bitstream == draft(by_name[entry.name], size=20_000).bitstream for entry in sound)
        await spool.put(draft(1000))
    assert len(list(path.parent.glob("spool.sqlite.damaged-*"))) >= 1


async def test_a_file_that_is_no_database_is_kept_aside_and_begun_anew(path: Path) -> None:
    path.write_bytes(b"this is not a database at all" * 1000)
    async with opened(path) as spool:
        await spool.put(draft(1))
        assert len(await everything(spool)) == 1
    (aside,) = path.parent.glob("spool.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"this is not")


async def test_somebody_elses_database_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    with pytest.raises(InvalidSettings, match="no spool"):
        Spool(path, LIMITS)


async def test_a_full_disk_refuses_puts_lets_deletes_through_and_mends_itself(path: Path) -> None:
    async with opened(path) as spool:
        first, _ = await spool.put(draft(0))
        db = spool._file._db  # type: ignore[union-attr]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 4}")  # SQLite then answers SQLITE_FULL as on a full disk
        with pytest.raises(Overloaded, match=r"disk is full|Unavailable"):
            for number in range(100):
                await spool.put(draft(number, size=20_000))
        await spool.finish([Final(first.id, Outcome.DETECTIONS, "")])
        assert all(entry.id != first.id for entry in await everything(spool))
        db.execute("PRAGMA max_page_count = 1000000")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                placed, _ = await spool.put(draft(500))
                break
            except Overloaded:
                await asyncio.sleep(0.1)
        assert placed.name.seq > 1
        assert (path.parent / "spool.sqlite.reserve").exists()


def test_a_file_that_was_emptied_becomes_short_again(path: Path) -> None:
    file = SpoolFile(path, LIMITS, Tally())
    with file.transaction():
        kept = [file.put(draft(number, size=60_000), 1).id for number in range(300)]
    with file.transaction():
        for frame_id in kept:
            file.finish(Final(frame_id, Outcome.DETECTIONS, ""), 1)
    for _ in range(20):
        file.shrink(tight=False)
    file.close()
    assert path.stat().st_size < 6 << 20, "of 18 MiB, but for the room that is kept for the next frames"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_disk_that_really_fills_up_keeps_every_receipt_and_mends_itself(small_disk: Path) -> None:
    path = small_disk / "spool.sqlite"
    kept: dict[int, int] = {}
    async with opened(path) as spool:
        with pytest.raises(Overloaded, match="disk is full"):
            for number in range(1000):
                placed, _ = await spool.put(draft(number, size=60_000))
                kept[placed.id] = number
        await swept(spool, lambda: not spool.stats.writable)
        entries = await everything(spool)
        assert {entry.id: entry.bitstream for entry in entries} == {
            id_: draft(number, size=60_000).bitstream for id_, number in kept.items()
        }
        gone = list(kept)[len(kept) // 4 :]
        for first in range(0, len(gone), 16):  # as acknowledgements come
            await spool.finish([Final(id_, Outcome.DETECTIONS, "") for id_ in gone[first : first + 16]])
        await swept(spool, lambda: spool.stats.writable)
        placed, _ = await spool.put(draft(5000, size=60_000))
    async with opened(path) as spool:
        left = {entry.id for entry in await everything(spool)}
    assert left == {placed.id, *list(kept)[: len(kept) // 4]}


async def test_two_edges_cannot_share_a_file(path: Path) -> None:
    code = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_spool import LIMITS\nfrom edge.spool import Spool\n"
        f"async def main():\n    Spool(Path({str(path)!r}), LIMITS)\nasyncio.run(main())\n"
    )
    async with opened(path) as spool:
        await spool.put(draft(1))
        result = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "in use by another process" in result.stderr


async def test_cameras_are_bounded(path: Path) -> None:
    async with opened(path) as spool:
        for number in range(8):
            await spool.put(draft(number, camera=f"camera-{number}"))
        with pytest.raises(Overloaded, match="expected at most 8 cameras since the edge started, 'one-more'"):
            await spool.put(draft(9, camera="one-more"))
        await spool.put(draft(10, camera="camera-3"))


async def test_a_closed_spool_says_so(path: Path) -> None:
    async with opened(path) as spool:
        pass
    with pytest.raises(Unavailable, match="closed"):
        await spool.put(draft(1))
