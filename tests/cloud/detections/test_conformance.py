"""What every backend of the detection log must do, said once for all of them (`opener` in conftest.py)."""

import asyncio
import itertools

import pytest

from cloud.detections.log import DetectionLog, FrameName, Retention
from shared.errors import CursorExpired
from tests.cloud.detections.conftest import Opener


def name(seq: int, camera: str = "gate", epoch: int = 7) -> FrameName:
    return FrameName(camera, epoch, seq)


async def read_all(log: DetectionLog, after: int = 0, limit: int = 7) -> list[bytes]:
    events = []
    while records := await log.read(after, limit):
        events += [record.event for record in records]
        after = records[-1].sequence
    return events


async def test_an_appended_event_is_read_back_as_it_was(opener: Opener) -> None:
    log = await opener()
    appended = await log.append(name(3, "tür", (1 << 64) - 1), b"\x00event")
    (record,) = await log.read(0, 10)
    assert (record.sequence, record.name, record.event) == (
        appended.sequence,
        FrameName("tür", (1 << 64) - 1, 3),
        b"\x00event",
    )


async def test_a_resend_makes_no_second_record_and_changes_nothing(opener: Opener) -> None:
    log = await opener()
    first = await log.append(name(1), b"first")
    again = await log.append(name(1), b"other")
    assert (first.new, again.new) == (True, False)
    assert again.sequence == first.sequence
    assert await read_all(log) == [b"first"]


async def test_the_same_key_appended_many_times_at_once_makes_one_record(opener: Opener) -> None:
    log = await opener()
    results = await asyncio.gather(*(log.append(name(1), b"x") for _ in range(50)))
    assert sum(result.new for result in results) == 1
    assert len({result.sequence for result in results}) == 1


async def test_camera_epoch_and_seq_each_make_another_key(opener: Opener) -> None:
    log = await opener()
    names = [FrameName(c, e, s) for c, e, s in itertools.product(("a", "b"), (0, 1 << 63), (0, (1 << 64) - 1))]
    results = [await log.append(n, str(n).encode()) for n in names]
    assert all(result.new for result in results)
    assert [await log.find(n) for n in names] == [result.sequence for result in results]
    assert await log.find(name(99)) is None


async def test_sequences_grow_in_reading_order_under_concurrent_appends(opener: Opener) -> None:
    log = await opener()

    async def camera(label: str) -> list[int]:
        return [(await log.append(name(seq, label), f"{label}{seq}".encode())).sequence for seq in range(20)]

    per_camera = await asyncio.gather(*(camera(label) for label in "abcdefgh"))
    assert all(sequences == sorted(sequences) for sequences in per_camera)
    records = await log.read(0, 1000)
    assert [record.sequence for record in records] == sorted(itertools.chain(*per_camera))
    assert all(a.logged_ns <= b.logged_ns for a, b in itertools.pairwise(records))


async def test_records_of_a_camera_keep_the_order_of_their_appends_though_none_was_waited_for(opener: Opener) -> None:
    log = await opener()
    sizes = [100_000 if seq % 3 else 10 for seq in range(30)]
    appends = [log.append(name(seq, label), bytes(size)) for seq, size in enumerate(sizes) for label in "ab"]
    await asyncio.gather(*appends)
    records = await log.read(0, 1000)
    for label in "ab":
        assert [record.name.seq for record in records if record.name.camera == label] == list(range(30))


async def test_records_keys_and_the_log_id_survive_a_restart_and_sequences_go_on(opener: Opener) -> None:
    log = await opener()
    last = [await log.append(name(seq), b"%d" % seq) for seq in range(5)][-1]
    log_id = log.log_id
    await log.close()
    log = await opener()
    assert log.log_id == log_id
    assert await read_all(log) == [b"0", b"1", b"2", b"3", b"4"]
    assert not (await log.append(name(4), b"again")).new
    assert (await log.append(name(5), b"5")).sequence > last.sequence


async def test_another_log_has_another_id(opener: Opener) -> None:
    assert (await opener(name="one")).log_id != (await opener(name="two")).log_id


async def test_a_reader_that_replays_and_then_waits_meets_every_record_once(opener: Opener) -> None:
    log = await opener()
    for seq in range(30):
        await log.append(name(seq), b"%d" % seq)

    async def read_until(count: int) -> list[bytes]:
        seen: list[bytes] = []
        position = 0
        while len(seen) < count:
            records = await log.read(position, 4)
            if not records:
                await log.wait_beyond(position)
                continue
            seen += [record.event for record in records]
            position = records[-1].sequence
        return seen

    readers = [asyncio.create_task(read_until(60)) for _ in range(3)]
    for seq in range(30, 60):
        await log.append(name(seq), b"%d" % seq)
    for reader in readers:
        assert await reader == [b"%d" % seq for seq in range(60)]


async def test_reading_past_the_end_is_empty_and_waiting_ends_with_the_next_append(opener: Opener) -> None:
    log = await opener()
    newest = (await log.append(name(0), b"")).sequence
    assert await log.read(newest, 10) == []
    waiting = asyncio.create_task(log.wait_beyond(newest))
    await asyncio.sleep(0)
    assert not waiting.done()
    await log.append(name(1), b"")
    await asyncio.wait_for(waiting, 5)


async def test_a_cursor_older_than_what_is_kept_is_refused_naming_the_oldest(opener: Opener) -> None:
    log = await opener(Retention(max_age_s=3600, max_bytes=10_000, key_age_s=7200))
    for seq in range(100):
        await log.append(name(seq), bytes(1000))
    span = await log.span()
    assert 1 < span.oldest <= span.newest
    with pytest.raises(CursorExpired, match=rf"\b{span.oldest}\b"):
        await log.read(0, 10)
    kept = await log.read(span.oldest - 1, 100)
    assert [record.sequence for record in kept] == list(range(span.oldest, span.newest + 1))


async def test_a_resend_of_a_frame_whose_record_is_gone_is_still_known(opener: Opener) -> None:
    log = await opener(Retention(max_age_s=3600, max_bytes=10_000, key_age_s=7200))
    first = await log.append(name(0), bytes(1000))
    for seq in range(1, 100):
        await log.append(name(seq), bytes(1000))
    assert (await log.span()).oldest > first.sequence
    assert await log.find(name(0)) == first.sequence
    assert not (await log.append(name(0), b"")).new


async def test_a_time_is_turned_into_the_position_before_it(opener: Opener) -> None:
    log = await opener()
    for seq in range(20):
        await log.append(name(seq), b"")
    records = await log.read(0, 100)
    for record in records:
        earlier = [r.sequence for r in records if r.logged_ns < record.logged_ns]
        assert await log.position_at(record.logged_ns) == (earlier[-1] if earlier else 0)
    assert await log.position_at(0) == 0
    assert await log.position_at(records[-1].logged_ns + 1) == records[-1].sequence
