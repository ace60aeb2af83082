"""A subscription's promises, over both kinds of log and a consumer that takes what it is given at its own pace."""

import asyncio
from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from sightline.v1 import common_pb2, detection_pb2

from cloud.detections.log import DetectionLog, FrameName, Retention
from cloud.detections.subscribe import EventFilter, Limits, Subscription, start_position
from shared.errors import CursorExpired, CursorMismatch, InvalidInput, Overloaded, Unavailable
from tests.cloud.detections.conftest import Opener

LIMITS = Limits(buffer_events=16, buffer_bytes=1 << 20, progress_interval_s=0.05)
EVERYTHING = EventFilter.from_proto(detection_pb2.EventFilter())
PERSON, CAT = 1, 17


@pytest.fixture
async def log(opener: Opener) -> DetectionLog:
    return await opener(Retention(3600, 100_000, 7200))


def detections(*found: tuple[int, float]) -> bytes:
    result = detection_pb2.TaskResult(
        task="t", detections=[detection_pb2.Detection(category_id=c, score=s) for c, s in found]
    )
    return detection_pb2.DetectionEvent(outcome=common_pb2.OUTCOME_DETECTIONS, results=[result]).SerializeToString()


async def append(log: DetectionLog, *seqs: int, camera: str = "gate", event: bytes = detections((PERSON, 0.9))) -> None:
    for seq in seqs:
        await log.append(FrameName(camera, 1, seq), event)


class Consumer:
    """Takes messages until it is told to stop reading (`block`), as a full connection would make it."""

    def __init__(self, log: DetectionLog, after: int = 0, shown: EventFilter = EVERYTHING, limits: Limits = LIMITS):
        self.messages: list[detection_pb2.SubscribeResponse] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._news = asyncio.Event()
        self.stop = asyncio.Event()
        self.subscription = Subscription(log, after, shown, limits)
        self.task = asyncio.create_task(self.subscription.run(self._take, self.stop))

    async def _take(self, message: detection_pb2.SubscribeResponse) -> None:
        await self.reads.wait()
        self.messages.append(message)
        self._news.set()

    @property
    def sequences(self) -> list[int]:
        return [m.event.cursor.sequence for m in self.messages if m.HasField("event")]

    @property
    def progress(self) -> list[tuple[int, bool]]:
        found = [m.progress for m in self.messages if m.HasField("progress")]
        return [(p.cursor.sequence, p.caught_up) for p in found]

    async def until(self, sequence: int) -> None:
        """Until this place was shown or told."""
        await self.until_message(lambda m: max(m.event.cursor.sequence, m.progress.cursor.sequence) >= sequence)

    async def until_message(self, wanted: Callable[[detection_pb2.SubscribeResponse], bool]) -> None:
        async with asyncio.timeout(10):
            while not any(wanted(message) for message in self.messages):
                self._news.clear()
                await self._news.wait()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def filtering(**conditions: object) -> EventFilter:
    return EventFilter.from_proto(detection_pb2.EventFilter(**conditions))  # type: ignore[arg-type]


async def test_replay_goes_over_into_following_without_gap_or_repetition(log: DetectionLog) -> None:
    await append(log, *range(100))
    consumer = Consumer(log)
    await asyncio.gather(append(log, *range(100, 200)), consumer.until(200))
    assert consumer.sequences == list(range(1, 201))
    await consumer.leave()


async def test_a_consumer_that_left_and_resumes_from_its_cursor_misses_nothing(log: DetectionLog) -> None:
    await append(log, *range(50))
    first = Consumer(log)
    await first.until(30)
    await first.leave()
    last = first.sequences[-1]
    await append(log, *range(50, 70))
    second = Consumer(log, after=last)
    await second.until(70)
    assert first.sequences + second.sequences == list(range(1, 71))
    await second.leave()


async def test_the_end_of_the_log_is_told_once_it_is_reached(log: DetectionLog) -> None:
    await append(log, *range(5))
    consumer = Consumer(log)
    await consumer.until_message(lambda message: message.HasField("progress"))
    assert consumer.progress == [(5, True)]
    assert consumer.sequences == [1, 2, 3, 4, 5]
    await consumer.leave()


async def test_a_consumer_that_followed_and_stops_reading_is_cut_off_and_resumes_without_loss(
    log: DetectionLog,
) -> None:
    consumer = Consumer(log)
    await append(log, 0)
    await consumer.until(1)
    consumer.reads.clear()
    await append(log, *range(1, 40))
    with pytest.raises(Overloaded, match="too slow"):
        await asyncio.wait_for(consumer.task, 5)
    seen = consumer.sequences
    resumed = Consumer(log, after=seen[-1])
    await resumed.until(40)
    assert seen + resumed.sequences == list(range(1, 41))
    await resumed.leave()


async def test_a_consumer_that_replays_slowly_is_waited_for(log: DetectionLog) -> None:
    await append(log, *range(200))
    consumer = Consumer(log)
    consumer.reads.clear()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not consumer.task.done()
    consumer.reads.set()
    await consumer.until(200)
    assert consumer.sequences == list(range(1, 201))
    await consumer.leave()


async def test_the_buffer_is_bounded_in_bytes_too(log: DetectionLog) -> None:
    consumer = Consumer(log, limits=Limits(buffer_events=10_000, buffer_bytes=5_000, progress_interval_s=1))
    await append(log, 0)
    await consumer.until(1)
    consumer.reads.clear()
    big = detections(*[(PERSON, 0.5)] * 100)
    await append(log, *range(1, 20), event=big)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(consumer.task, 5)
    assert len(big) * 19 > 5_000


async def test_one_event_larger_than_the_buffer_still_passes(log: DetectionLog) -> None:
    consumer = Consumer(log, limits=Limits(buffer_events=4, buffer_bytes=10, progress_interval_s=1))
    await append(log, 0, 1, event=detections(*[(PERSON, 0.5)] * 100))
    await consumer.until(1)
    assert consumer.sequences[0] == 1
    await consumer.leave()


async def test_one_slow_consumer_does_not_hold_up_another(log: DetectionLog) -> None:
    slow, quick = Consumer(log), Consumer(log)
    slow.reads.clear()
    await append(log, *range(100))
    await quick.until(100)
    assert quick.sequences == list(range(1, 101))
    await slow.leave()
    await quick.leave()


async def test_a_stop_gives_the_consumer_all_there_is_and_then_ends(log: DetectionLog) -> None:
    await append(log, *range(100))
    consumer = Consumer(log)
    consumer.reads.clear()
    await append(log, *range(100, 110))
    consumer.stop.set()
    await asyncio.sleep(0.01)
    assert not consumer.task.done()
    assert consumer.subscription.lag == 110
    consumer.reads.set()
    with pytest.raises(Unavailable, match="110"):
        await asyncio.wait_for(consumer.task, 5)
    assert consumer.sequences == list(range(1, 111))
    assert consumer.subscription.lag == 0


async def test_filters_show_only_what_matches(log: DetectionLog) -> None:
    rejected = detection_pb2.DetectionEvent(outcome=common_pb2.OUTCOME_REJECTED).SerializeToString()
    await append(log, 0, camera="a", event=detections((PERSON, 0.9), (CAT, 0.3)))
    await append(log, 1, camera="b", event=detections((PERSON, 0.4)))
    await append(log, 2, camera="a", event=rejected)
    await append(log, 3, camera="b", event=detections())
    for conditions, expected in (
        ({"camera_ids": ["b"]}, {2: [PERSON], 4: []}),
        ({"category_ids": [CAT]}, {1: [CAT], 3: []}),
        ({"min_score": 0.5}, {1: [PERSON], 3: []}),
        ({"min_score": 0.35, "category_ids": [CAT]}, {3: []}),
        ({"outcomes": [common_pb2.OUTCOME_REJECTED]}, {3: []}),
        ({"outcomes": [common_pb2.OUTCOME_DETECTIONS], "camera_ids": ["a"]}, {1: [PERSON, CAT]}),
    ):
        consumer = Consumer(log, shown=filtering(**conditions))
        await consumer.until(4)
        events = [m.event for m in consumer.messages if m.HasField("event")]
        shown = {e.cursor.sequence: [d.category_id for r in e.results for d in r.detections] for e in events}
        assert shown == expected
        await consumer.leave()


async def test_progress_tells_the_cursor_when_a_filter_hides_everything(log: DetectionLog) -> None:
    consumer = Consumer(log, shown=filtering(camera_ids=["none"]))
    await append(log, *range(10))
    await consumer.until(10)
    assert consumer.sequences == []
    places = [place for place, _ in consumer.progress]
    assert places == sorted(places)
    assert consumer.progress[-1] == (10, True)
    await consumer.leave()


async def test_a_start_is_turned_into_a_place_or_refused(log: DetectionLog) -> None:
    await append(log, *range(5))
    records = await log.read(0, 10)
    request = detection_pb2.SubscribeRequest
    cursor = detection_pb2.Cursor
    assert await start_position(log, request(after=cursor(log_id=log.log_id, sequence=3))) == 3
    assert await start_position(log, request(position=detection_pb2.START_POSITION_BEGINNING)) == 0
    assert await start_position(log, request(position=detection_pb2.START_POSITION_END)) == 5
    assert await start_position(log, request()) == 5
    start = Timestamp()
    start.FromNanoseconds(records[2].logged_ns)
    assert await start_position(log, request(start_time=start)) <= 2
    with pytest.raises(CursorMismatch, match="other"):
        await start_position(log, request(after=cursor(log_id="other", sequence=3)))
    with pytest.raises(CursorMismatch, match="ends at sequence 5"):
        await start_position(log, request(after=cursor(log_id=log.log_id, sequence=6)))
    with pytest.raises(InvalidInput):
        await start_position(log, request(start_time=Timestamp(seconds=1 << 60)))


async def test_a_cursor_older_than_what_is_kept_is_refused_naming_the_oldest(log: DetectionLog) -> None:
    await append(log, *range(30), event=bytes(10_000))
    oldest = (await log.span()).oldest
    assert oldest > 2
    with pytest.raises(CursorExpired, match=rf"\b{oldest}\b"):
        await start_position(
            log, detection_pb2.SubscribeRequest(after=detection_pb2.Cursor(log_id=log.log_id, sequence=1))
        )
    consumer = Consumer(log, after=1)
    with pytest.raises(CursorExpired, match=rf"\b{oldest}\b"):
        await asyncio.wait_for(consumer.task, 5)


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_outside_0_to_1_is_refused(score: float) -> None:
    with pytest.raises(InvalidInput, match="min_score"):
        filtering(min_score=score)
