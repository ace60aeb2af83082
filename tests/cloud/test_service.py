"""What a consumer may rely on, over gRPC: Subscribe and Detect."""

import asyncio
import dataclasses
import io
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from sightline.v1 import common_pb2, detection_pb2

from cloud.detections.log import FrameName
from cloud.server import end_subscriptions
from shared.codec import bitstream as bits
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from tests.cloud.harness import RunningCloud

StartCloud = Callable[..., Awaitable[RunningCloud]]
FROM_THE_START: dict[str, Any] = {"position": detection_pb2.START_POSITION_BEGINNING}


def request(**fields: Any) -> detection_pb2.SubscribeRequest:
    return detection_pb2.SubscribeRequest(**fields)


async def take(call: Any, count: int) -> list[detection_pb2.DetectionEvent]:
    """The next `count` events of a subscription."""
    events: list[detection_pb2.DetectionEvent] = []
    async with asyncio.timeout(60):
        while len(events) < count:
            message = await call.read()
            assert message is not grpc.aio.EOF
            if message.HasField("event"):
                events.append(message.event)
    return events


async def error_of(awaitable: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    """Status, sentence and kind of the error a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(awaitable, 60)
    kinds = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), caught.value.details() or "", str(kinds.get("sightline-error"))


async def test_a_consumer_sees_what_was_there_and_what_comes(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        call = cloud.consumers().Subscribe(request(**FROM_THE_START))
        (first,) = await take(call, 1)
        await edge.deliver("gate", 2, spot)
        (second,) = await take(call, 1)
    assert [(event.frame.seq, event.cursor.sequence) for event in (first, second)] == [(1, 1), (2, 2)]
    assert first.cursor.log_id == cloud.log.log_id
    assert first.persisted_time.ToMicroseconds() >= first.received_time.ToMicroseconds()
    assert first.results[0].detections[0].label == "kite"
    call.cancel()


async def test_a_consumer_that_resumes_from_its_cursor_misses_nothing_even_over_a_restart(
    start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        for seq in range(6):
            await edge.deliver("gate", seq, spot)
    call = cloud.consumers().Subscribe(request(**FROM_THE_START))
    seen = await take(call, 4)
    call.cancel()
    await cloud.stop()

    cloud = await start_cloud()
    async with cloud.edge() as edge:
        resumed = cloud.consumers().Subscribe(request(after=seen[-1].cursor))
        for seq in range(6, 9):
            await edge.deliver("gate", seq, spot)
        rest = await take(resumed, 5)
    assert [event.frame.seq for event in [*seen, *rest]] == list(range(9))
    resumed.cancel()


async def test_a_consumer_without_a_start_sees_only_what_comes(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        call = cloud.consumers().Subscribe(request())
        message = await call.read()
        assert (message.progress.cursor.sequence, message.progress.caught_up) == (1, True)
        await edge.deliver("gate", 2, spot)
        assert [event.frame.seq for event in await take(call, 1)] == [2]
    call.cancel()


async def test_filters_hide_other_cameras_and_outcomes(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge() as edge:
        await edge.deliver("a", 1, spot)
        await edge.deliver("b", 1, spot, payload_crc=1)
        await edge.deliver("b", 2, spot)
    only_b = detection_pb2.EventFilter(camera_ids=["b"], outcomes=[common_pb2.OUTCOME_DETECTIONS])
    call = cloud.consumers().Subscribe(request(**FROM_THE_START, filter=only_b))
    (event,) = await take(call, 1)
    assert (event.frame.camera_id, event.frame.seq) == ("b", 2)
    call.cancel()


async def test_a_consumer_that_stops_reading_is_cut_off_with_a_typed_error_and_resumes_without_loss(
    start_cloud: StartCloud,
) -> None:
    cloud = await start_cloud(subscriber_buffer_events=8)
    padding = detection_pb2.DetectionEvent(outcome=common_pb2.OUTCOME_DETECTIONS, reason="x" * 50_000)
    event = padding.SerializeToString()
    call = cloud.consumers().Subscribe(request(**FROM_THE_START))
    assert (await call.read()).progress.caught_up
    for count in range(1, 5000):  # the connection's own buffers fill first
        await cloud.log.append(FrameName("gate", 1, count), event)
        if not cloud.detection._subscriptions:
            break
    seen: list[detection_pb2.DetectionEvent] = []

    async def read_on() -> None:
        while True:
            seen.extend(await take(call, 1))

    code, sentence, kind = await error_of(read_on())
    assert (code, kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Overloaded")
    assert "too slow" in sentence
    assert 0 < len(seen) < count
    resumed = cloud.consumers().Subscribe(request(after=seen[-1].cursor))
    rest = await take(resumed, count - len(seen))
    assert [event.cursor.sequence for event in [*seen, *rest]] == list(range(1, count + 1))
    resumed.cancel()


async def test_a_cursor_that_cannot_be_resumed_from_is_refused_by_kind(start_cloud: StartCloud) -> None:
    cloud = await start_cloud(log_max_bytes=1 << 20)
    for seq in range(30):
        await cloud.log.append(FrameName("gate", 1, seq), bytes(100_000))
    oldest = (await cloud.log.span()).oldest
    subscribe = cloud.consumers().Subscribe

    async def refused(**start: Any) -> tuple[grpc.StatusCode, str, str]:
        return await error_of(subscribe(request(**start)).read())

    other = detection_pb2.Cursor(log_id="another", sequence=1)
    code, _, kind = await refused(after=other)
    assert (code, kind) == (grpc.StatusCode.FAILED_PRECONDITION, "CursorMismatch")
    code, sentence, kind = await refused(after=detection_pb2.Cursor(log_id=cloud.log.log_id, sequence=1))
    assert (code, kind) == (grpc.StatusCode.OUT_OF_RANGE, "CursorExpired")
    assert str(oldest) in sentence
    code, sentence, _ = await refused(filter=detection_pb2.EventFilter(min_score=1.5))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "[0, 1]" in sentence


async def test_more_consumers_than_allowed_are_refused(start_cloud: StartCloud) -> None:
    cloud = await start_cloud(max_subscribers=1)
    first = cloud.consumers().Subscribe(request())
    await first.read()
    code, _, kind = await error_of(cloud.consumers().Subscribe(request()).read())
    assert (code, kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Overloaded")
    first.cancel()


async def test_detect_answers_at_once_and_past_the_log(cloud: RunningCloud, codec: Codec, spot: Bitstream) -> None:
    detect = cloud.consumers().Detect
    response = await detect(detection_pb2.DetectRequest(bitstream=bits.to_bytes(spot), return_image=True))
    assert (response.width, response.height, response.quality) == (64, 64, 8.0)
    assert response.model_id == spot.model_id
    (found,) = response.results[0].detections
    assert (found.box.x_min, found.box.x_max) == pytest.approx((16, 48), abs=3)
    assert response.timings.total_ms >= response.timings.task_ms
    picture = np.asarray(Image.open(io.BytesIO(response.image_png)))
    assert np.abs(picture.astype(int) - codec.decode(spot).rgb).max() <= 1
    assert await cloud.events() == []
    nothing = await detect(detection_pb2.DetectRequest(bitstream=bits.to_bytes(spot), min_score=0.8))
    assert not nothing.results[0].detections
    assert nothing.image_png == b""


async def test_detect_refuses_what_it_cannot_use_by_kind_and_serves_the_next(
    start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud(max_frame_bytes=5000)
    detect = cloud.consumers().Detect
    good = bits.to_bytes(spot)
    other_model = bits.to_bytes(dataclasses.replace(spot, model_id="0" * 64))
    wrong_inside = bits.to_bytes(dataclasses.replace(spot, latents=bytes(len(spot.latents))))
    for fields, code, kind in (
        ({"bitstream": b""}, "INVALID_ARGUMENT", "InvalidBitstream"),
        ({"bitstream": good[:-1]}, "INVALID_ARGUMENT", "InvalidBitstream"),
        ({"bitstream": good[:40] + bytes([good[40] ^ 0xFF]) + good[41:]}, "INVALID_ARGUMENT", "InvalidBitstream"),
        ({"bitstream": wrong_inside}, "INVALID_ARGUMENT", "InvalidBitstream"),
        ({"bitstream": b"\x00" * 5001}, "RESOURCE_EXHAUSTED", "TooLarge"),
        ({"bitstream": other_model}, "FAILED_PRECONDITION", "UnknownModel"),
        ({"bitstream": good, "tasks": ["no-such-task"]}, "INVALID_ARGUMENT", "InvalidInput"),
        ({"bitstream": good, "min_score": float("nan")}, "INVALID_ARGUMENT", "InvalidInput"),
    ):
        found_code, sentence, found_kind = await error_of(detect(detection_pb2.DetectRequest(**fields)))
        assert (found_code.name, found_kind) == (code, kind), sentence
        assert sentence
    assert (await detect(detection_pb2.DetectRequest(bitstream=good))).results[0].detections


async def test_a_stopping_cloud_gives_consumers_the_last_events_and_says_unavailable(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    call = cloud.consumers().Subscribe(request(**FROM_THE_START))
    assert (await call.read()).progress.caught_up
    cloud.spot.seconds_a_batch = 0.2
    async with cloud.edge() as edge:
        for seq in range(3):
            await edge.send("gate", seq, spot)
        await asyncio.to_thread(cloud.spot.busy.wait, 30)
        ending = asyncio.create_task(end_subscriptions(cloud.server, cloud.ingest, cloud.pipeline, cloud.detection))
        stopping = asyncio.create_task(cloud.server.drain())
        await edge.until(lambda: edge.drains)
        await edge.call.done_writing()
        assert [event.frame.seq for event in await take(call, 3)] == [0, 1, 2]
        code, sentence, _ = await error_of(take(call, 1))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "3" in sentence
        await asyncio.gather(ending, stopping)
