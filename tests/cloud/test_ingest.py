"""What an edge may rely on when it uploads."""

import asyncio
import dataclasses
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from sightline.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc

from cloud.detections.log import FrameName
from cloud.ingest import IngestService, StreamLimits
from shared.codec import bitstream as bits
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.errors import Unavailable
from tests.cloud.harness import EPOCH, Edge, RunningCloud, spot_frame

StartCloud = Callable[..., Awaitable[RunningCloud]]
P, R, L = ingest_pb2.ACK_STATE_PERSISTED, ingest_pb2.ACK_STATE_REJECTED, ingest_pb2.ACK_STATE_RETRY_LATER


def damaged(coded: Bitstream) -> Bitstream:
    """The same frame with one bit of the latents flipped."""
    latents = bytearray(coded.latents)
    latents[len(latents) // 2] ^= 0x10
    return dataclasses.replace(coded, latents=bytes(latents))


async def test_a_frame_ends_as_one_event_with_what_was_found_in_it(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge("edge-7") as edge:
        ack = await edge.deliver("gate", 5, spot)
    assert (ack.state, ack.outcome) == (P, common_pb2.OUTCOME_DETECTIONS)
    (event,) = await cloud.events()
    assert event.frame == common_pb2.FrameName(camera_id="gate", epoch=EPOCH, seq=5)
    assert (event.edge_id, event.outcome) == ("edge-7", common_pb2.OUTCOME_DETECTIONS)
    assert (event.width, event.height, event.quality) == (64, 64, 8.0)
    assert event.model_id == spot.model_id
    assert event.payload_bytes == len(spot.hyper) + len(spot.latents)
    assert event.capture_time.ToMicroseconds() == 1_700_000_000_000_000
    assert abs(event.received_time.ToMicroseconds() / 1e6 - time.time()) < 60
    assert event.timings.total_ms >= event.timings.task_ms + event.timings.synthesise_ms + event.timings.unpack_ms > 0
    (result,) = event.results
    assert (result.task, result.kind, result.batch_size) == ("bright-spot", "instance_segmentation", 1)
    (found,) = result.detections
    assert (found.category_id, found.label, found.score) == (38, "kite", 0.75)
    corners = (found.box.x_min, found.box.y_min, found.box.x_max, found.box.y_max)
    assert corners == pytest.approx((16, 16, 48, 48), abs=3)
    assert (found.mask.height, found.mask.width) == (64, 64)
    assert cloud.metric("sightline_cloud_events_total", outcome="detections") == 1


async def test_detections_below_the_set_score_are_not_logged(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(min_score=0.8)
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
    (event,) = await cloud.events()
    assert event.outcome == common_pb2.OUTCOME_DETECTIONS
    assert not event.results[0].detections


async def test_welcome_says_who_answers_what_it_decodes_and_how_much_it_takes(cloud: RunningCloud) -> None:
    async with cloud.edge() as edge:
        assert edge.welcome is not None
        assert edge.welcome.cloud_id == "test-cloud"
        assert list(edge.welcome.model_ids) == list(cloud.inference.codecs)
        assert edge.welcome.max_frame_bytes == cloud.settings.max_frame_bytes
        assert (edge.frames, edge.bytes) == (cloud.settings.stream_credit_frames, cloud.settings.stream_credit_bytes)


async def test_a_cameras_records_keep_the_order_of_its_frames_whichever_is_done_first(
    start_cloud: StartCloud, spot: Bitstream, red: Bitstream
) -> None:
    cloud = await start_cloud(max_batch=4)
    cloud.spot.seconds_a_batch = 0.2
    async with cloud.edge() as edge:
        await edge.send("gate", 1, spot)
        await asyncio.to_thread(cloud.spot.busy.wait, 30)
        await edge.send("gate", 2, red)  # fails, with its batch, then alone, and is tried once more
        for seq in (3, 4):
            await edge.send("gate", seq, spot)
        await edge.tombstone("gate", 5, common_pb2.OUTCOME_EXPIRED)  # needs no work
        await edge.tombstone("door", 1, common_pb2.OUTCOME_EXPIRED)
        for seq in range(1, 6):
            await edge.answer("gate", seq)
    assert max(cloud.spot.batches) > 1
    found = [(event.frame.camera_id, event.frame.seq, event.outcome) for event in await cloud.events()]
    assert found[0] == ("door", 1, common_pb2.OUTCOME_EXPIRED)
    assert [seq for _, seq, _ in found[1:]] == [1, 2, 3, 4, 5]
    assert found[2][2] == common_pb2.OUTCOME_REJECTED


async def test_a_frame_that_was_sent_away_holds_up_none_behind_it(
    cloud: RunningCloud, spot: Bitstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, held = cloud.log.find, asyncio.Event()

    async def find(name: FrameName) -> int | None:
        if name == FrameName("gate", EPOCH, 1):
            await held.wait()
            raise Unavailable("the log's disk failed")
        return await stuck(name)

    monkeypatch.setattr(cloud.log, "find", find)
    async with cloud.edge() as edge:
        await edge.send("gate", 1, spot)
        await edge.send("gate", 2, spot)
        await edge.deliver("door", 1, spot)  # of another camera, so not held up
        early = edge.final("gate", 2)
        held.set()
        assert not early
        assert (await edge.answer("gate", 1)).state == L
        assert (await edge.answer("gate", 2)).state == P


async def test_a_resend_is_persisted_again_without_work_or_a_second_event(
    start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        again = await edge.deliver("gate", 1, spot)
    async with cloud.edge("another") as edge:
        third = await edge.deliver("gate", 1, spot)
    await cloud.stop()
    restarted = await start_cloud()
    async with restarted.edge() as edge:
        fourth = await edge.deliver("gate", 1, spot)
    for ack in (again, third, fourth):
        assert (ack.state, ack.outcome) == (P, common_pb2.OUTCOME_DETECTIONS)
    assert len(await restarted.events()) == 1
    assert cloud.spot.batches == [1]
    assert restarted.spot.batches == []


async def test_the_same_frame_over_two_streams_at_once_is_worked_on_once(cloud: RunningCloud, spot: Bitstream) -> None:
    cloud.spot.seconds_a_batch = 0.2
    async with cloud.edge() as one, cloud.edge() as other:
        acks = await asyncio.gather(one.deliver("gate", 1, spot), other.deliver("gate", 1, spot))
    assert [ack.state for ack in acks] == [P, P]
    assert len(await cloud.events()) == 1
    assert cloud.spot.batches == [1]


async def test_work_goes_on_when_the_stream_breaks_and_the_resend_finds_its_result(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    cloud.spot.seconds_a_batch = 0.3
    async with cloud.edge() as edge:
        await edge.send("gate", 1, spot)
        await edge.until(lambda: edge.acks)  # RECEIVED
    async with cloud.edge() as edge:
        assert (await edge.deliver("gate", 1, spot)).state == P
    assert cloud.spot.batches == [1]
    assert len(await cloud.events()) == 1


async def test_a_corrupt_frame_is_rejected_logged_and_kept_and_the_next_one_is_served(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    bad = damaged(spot)
    async with cloud.edge() as edge:
        torn = await edge.deliver("gate", 1, bad, payload_crc=bits.payload_crc(spot))
        wrong = await edge.deliver("gate", 2, bad)  # a sound payload CRC over a bitstream that is not
        good = await edge.deliver("gate", 3, spot)
        again = await edge.deliver("gate", 1, bad, payload_crc=bits.payload_crc(spot))
    assert (torn.state, torn.outcome) == (R, common_pb2.OUTCOME_REJECTED)
    assert torn.reject_reason == ingest_pb2.REJECT_REASON_PAYLOAD_CRC
    assert "CRC" in torn.detail
    assert wrong.state == R
    assert wrong.reject_reason in (ingest_pb2.REJECT_REASON_INVALID_BITSTREAM, ingest_pb2.REJECT_REASON_SYMBOLS_CRC)
    assert good.outcome == common_pb2.OUTCOME_DETECTIONS
    assert (again.state, again.outcome) == (P, common_pb2.OUTCOME_REJECTED)
    first, second, third = await cloud.events()
    assert (first.outcome, first.reason) == (common_pb2.OUTCOME_REJECTED, torn.detail)
    assert (second.outcome, third.outcome) == (common_pb2.OUTCOME_REJECTED, common_pb2.OUTCOME_DETECTIONS)
    kept = await cloud.quarantine.frames()
    assert [(frame.camera_id, frame.epoch, frame.seq) for frame in kept] == [("gate", EPOCH, 1), ("gate", EPOCH, 2)]
    assert [frame.bitstream for frame in kept] == [bad, bad]
    assert cloud.metric("sightline_cloud_rejected_total", reason="payload_crc") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quality": 255}, "INVALID_BITSTREAM"),
        ({"quality": 2049}, "INVALID_BITSTREAM"),
        ({"width": 0}, "INVALID_BITSTREAM"),
        ({"height": 0}, "INVALID_BITSTREAM"),
        ({"width": 4_294_967_295, "height": 4_294_967_295}, "TOO_LARGE"),
        ({"width": 128, "height": 129}, "TOO_LARGE"),  # over max_pixels
        ({"latents": bytes(5000)}, "TOO_LARGE"),  # over max_frame_bytes
        ({"hyper": b""}, "INVALID_BITSTREAM"),
        ({"latents": b"\xff" * 3000}, "INVALID_BITSTREAM"),
        ({"width": 128, "height": 128}, "INVALID_BITSTREAM"),  # the streams are those of another size
        ({"symbols_crc": 7}, "SYMBOLS_CRC"),
    ],
)
async def test_what_no_encoder_writes_is_rejected_with_its_reason(
    start_cloud: StartCloud, spot: Bitstream, changes: dict[str, Any], reason: str
) -> None:
    cloud = await start_cloud(max_pixels=128 * 128, max_frame_bytes=4999)
    assert len(spot.hyper) + len(spot.latents) < 4999
    async with cloud.edge() as edge:
        ack = await edge.deliver("gate", 1, dataclasses.replace(spot, **changes))
        assert (await edge.deliver("gate", 2, spot)).state == P
    assert ack.state == R
    assert ingest_pb2.RejectReason.Name(ack.reject_reason) == f"REJECT_REASON_{reason}"
    assert [event.outcome for event in await cloud.events()] == [
        common_pb2.OUTCOME_REJECTED,
        common_pb2.OUTCOME_DETECTIONS,
    ]


async def test_a_huge_size_over_tiny_streams_is_rejected_before_anything_of_that_size_is_made(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    forged = dataclasses.replace(spot, width=8192, height=8192)
    async with cloud.edge() as edge:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seq in range(20):
            ack = await edge.deliver("gate", seq, forged)
            assert (ack.state, ack.reject_reason) == (R, ingest_pb2.REJECT_REASON_INVALID_BITSTREAM)
        grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 64 << 20  # the symbols alone would take 400 MB


async def test_a_frame_that_breaks_a_task_model_is_rejected_alone(
    cloud: RunningCloud, spot: Bitstream, red: Bitstream
) -> None:
    async with cloud.edge() as edge:
        cloud.spot.seconds_a_batch = 0.1
        await edge.send("gate", 1, spot)
        await edge.send("gate", 2, red)  # shares a batch with the next two
        await edge.send("gate", 3, spot)
        await edge.send("lane", 1, spot)
        broken = await edge.answer("gate", 2)
        others = [await edge.answer("gate", 1), await edge.answer("gate", 3), await edge.answer("lane", 1)]
    assert (broken.state, broken.reject_reason) == (R, ingest_pb2.REJECT_REASON_TASK_FAILED)
    assert "cannot look at red" in broken.detail
    assert [ack.state for ack in others] == [P, P, P]


async def test_a_frame_for_a_model_that_is_not_here_comes_again_later(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge() as edge:
        other = ingest_pb2.ModelAnnouncement(index=9, model_id="0" * 64)
        await edge.call.write(ingest_pb2.UploadRequest(model=other))
        ack = await edge.deliver("gate", 1, spot, model_index=9)
        assert (ack.state, ack.retry_reason) == (L, ingest_pb2.RETRY_REASON_UNKNOWN_MODEL)
        assert spot.model_id in ack.detail
        assert await cloud.events() == []
        assert (await edge.deliver("gate", 1, spot)).state == P


async def test_a_full_log_sends_frames_away_and_takes_them_once_there_is_room(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    pages = cloud.log._db.execute("PRAGMA page_count").fetchone()[0]
    cloud.log._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL as on a full disk
    async with cloud.edge() as edge:
        seq = 0
        while (ack := await edge.deliver("gate", seq, spot)).state == P:  # fills the last page
            seq += 1
        assert (ack.state, ack.retry_reason) == (L, ingest_pb2.RETRY_REASON_LOG_UNAVAILABLE)
        assert ack.retry_after_ms > 0
        cloud.log._db.execute("PRAGMA max_page_count = 1000000")
        for _ in range(100):
            await asyncio.sleep(ack.retry_after_ms / 10_000)  # a tenth of what it was told, so that it is told again
            ack = await edge.deliver("gate", seq, spot)
            if ack.state == P:
                break
        assert ack.state == P
    assert [event.frame.seq for event in await cloud.events()] == list(range(seq + 1))


async def test_more_than_may_be_held_is_told_to_come_later(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(max_in_flight_frames=3)
    cloud.spot.seconds_a_batch = 0.2
    async with cloud.edge() as edge:
        for seq in range(8):
            await edge.send("gate", seq, spot)
        acks = [await edge.answer("gate", seq) for seq in range(8)]
        away = [ack for ack in acks if ack.state == L]
        assert away
        assert {ack.retry_reason for ack in away} == {ingest_pb2.RETRY_REASON_OVERLOADED}
        assert {ack.retry_after_ms for ack in away} == {cloud.settings.retry_after_ms}
        assert len(await cloud.events()) == 8 - len(away)
        for ack in away:
            assert (await edge.deliver("gate", ack.seq, spot)).state == P
    assert len(await cloud.events()) == 8


async def test_a_frame_past_its_time_ends_as_expired_without_work(cloud: RunningCloud, spot: Bitstream) -> None:
    now_us = time.time_ns() // 1000
    async with cloud.edge() as edge:
        late = await edge.deliver("gate", 1, spot, expires_time_unix_us=now_us - 5_000_000)
        in_time = await edge.deliver("gate", 2, spot, expires_time_unix_us=now_us + 60_000_000)
        forgotten_us = now_us - int((cloud.settings.key_age_s + 10) * 1e6)
        forgotten = await edge.deliver("gate", 3, spot, spooled_time_unix_us=forgotten_us)
    assert [ack.outcome for ack in (late, in_time, forgotten)] == [
        common_pb2.OUTCOME_EXPIRED,
        common_pb2.OUTCOME_DETECTIONS,
        common_pb2.OUTCOME_EXPIRED,
    ]
    assert {ack.state for ack in (late, in_time, forgotten)} == {P}
    reasons = [event.reason for event in await cloud.events()]
    assert "5." in reasons[0]
    assert reasons[1] == ""
    assert "remembered" in reasons[2]
    assert cloud.spot.batches == [1]


async def test_a_frame_whose_time_runs_out_while_it_waits_is_expired(cloud: RunningCloud, spot: Bitstream) -> None:
    cloud.spot.seconds_a_batch = 0.5
    async with cloud.edge() as edge:
        await edge.send("gate", 1, spot)
        await asyncio.to_thread(cloud.spot.busy.wait, 10)
        expires_us = time.time_ns() // 1000 + 100_000
        await edge.send("gate", 2, spot, expires_time_unix_us=expires_us)
        assert (await edge.answer("gate", 2)).outcome == common_pb2.OUTCOME_EXPIRED
    assert cloud.spot.batches == [1]


async def test_a_tombstone_is_the_record_of_a_frame_that_never_comes(cloud: RunningCloud, spot: Bitstream) -> None:
    async with cloud.edge() as edge:
        index = await edge.camera("gate")
        for seq, outcome in ((1, common_pb2.OUTCOME_DROPPED), (2, common_pb2.OUTCOME_EXPIRED)):
            buried = ingest_pb2.FrameTombstone(source_index=index, seq=seq, outcome=outcome, reason="no room")
            await edge.call.write(ingest_pb2.UploadRequest(tombstone=buried))
            ack = await edge.answer("gate", seq)
            assert (ack.state, ack.outcome) == (P, outcome)
        await edge.deliver("gate", 3, spot)
        late = ingest_pb2.FrameTombstone(source_index=index, seq=3, outcome=common_pb2.OUTCOME_DROPPED)
        await edge.call.write(ingest_pb2.UploadRequest(tombstone=late))
        assert (await edge.answer("gate", 3, count=2)).outcome == common_pb2.OUTCOME_DETECTIONS
    events = await cloud.events()
    assert [(event.frame.seq, event.outcome, event.reason) for event in events] == [
        (1, common_pb2.OUTCOME_DROPPED, "no room"),
        (2, common_pb2.OUTCOME_EXPIRED, "no room"),
        (3, common_pb2.OUTCOME_DETECTIONS, ""),
    ]


async def test_credit_comes_back_and_never_exceeds_the_window(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(stream_credit_frames=4, stream_credit_bytes=3 * (len(spot.hyper) + len(spot.latents)))
    async with cloud.edge() as edge:
        for seq in range(30):
            await edge.send("gate", seq, spot)
            unanswered = sum(not edge.final("gate", s) for s in range(seq + 1))
            assert edge.frames + unanswered <= 4
        for seq in range(30):
            assert (await edge.answer("gate", seq)).state == P


async def test_eight_cameras_share_the_cloud_though_one_sends_ten_times_as_much(
    start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud(max_batch=4, stream_credit_frames=1000)
    cloud.spot.seconds_a_batch = 0.01
    async with cloud.edge("flood") as flood, cloud.edge("others") as others:
        for seq in range(100):
            await flood.send("flood", seq, spot)
        cameras = [f"camera-{n}" for n in range(7)]
        for seq in range(10):
            for camera in cameras:
                await others.send(camera, seq, spot)
        for camera in cameras:
            for seq in range(10):
                assert (await others.answer(camera, seq)).state == P
        assert (await flood.answer("flood", 99)).state == P
    order = [event.frame.camera_id for event in await cloud.events()]
    assert len(order) == 170
    places = {camera: [i for i, each in enumerate(order) if each == camera] for camera in [*cameras, "flood"]}
    start = min(places[camera][0] for camera in cameras)
    of_flood_meanwhile = sum(start < place < max(places[camera][-1] for camera in cameras) for place in places["flood"])
    assert of_flood_meanwhile <= 20  # a fair share is 10, of 80 that waited
    ends = [places[camera][-1] for camera in cameras]
    assert max(ends) - min(ends) <= 12


async def drained(edge: Edge) -> None:
    await edge.until(lambda: edge.drains)
    await edge.call.done_writing()
    await edge.reading


async def test_a_drain_is_said_and_what_is_held_is_answered_before_ok(cloud: RunningCloud, spot: Bitstream) -> None:
    cloud.spot.seconds_a_batch = 0.2
    async with cloud.edge() as edge:
        for seq in range(5):
            await edge.send("gate", seq, spot)
        await edge.until(lambda: len(edge.acks) > 0)
        stopping = asyncio.create_task(cloud.server.drain())
        await drained(edge)
        assert await edge.call.code() == grpc.StatusCode.OK
        assert [edge.final("gate", seq)[0].state for seq in range(5)] == [P] * 5
        await stopping
    assert len(await cloud.events()) == 5


async def test_a_drain_ends_a_stream_that_is_never_half_closed_after_the_grace(
    start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud(stream_grace_s=0.2)
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        stopping = asyncio.create_task(cloud.server.drain())
        await edge.reading
        assert await edge.call.code() == grpc.StatusCode.OK
        await stopping


async def test_an_old_stream_is_asked_to_reopen(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(max_stream_age_s=0.2)
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        await drained(edge)
        assert await edge.call.code() == grpc.StatusCode.OK
        async with cloud.edge() as following:
            assert (await following.deliver("gate", 2, spot)).state == P


async def test_models_and_tasks_are_listed(cloud: RunningCloud, codec: Codec) -> None:
    models = await ingest_pb2_grpc.IngestServiceStub(cloud.channel()).ListModels(ingest_pb2.ListModelsRequest())
    assert [(each.name, each.model_id) for each in models.codecs] == [(codec.bundle.name, codec.model_id)]
    (task,) = models.tasks
    assert (task.name, task.kind, task.runs_on_upload) == ("bright-spot", "instance_segmentation", True)
    assert task.categories[1] == "person"


async def test_until_the_models_are_loaded_edges_are_told_unavailable(start_cloud: StartCloud) -> None:
    cloud = await start_cloud()
    fresh = IngestService("id", StreamLimits(1, 1, 0, 1), asyncio.Event(), cloud.pipeline._metrics)
    cloud.ingest._pipeline = fresh._pipeline  # as before `open`
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ingest_pb2_grpc.IngestServiceStub(cloud.channel()).ListModels(ingest_pb2.ListModelsRequest())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_frames_of_many_sizes_are_served_side_by_side(cloud: RunningCloud, codec: Codec) -> None:
    coded = {side: codec.encode(spot_frame(side=side), 8) for side in (64, 96, 128)}
    async with cloud.edge() as edge:
        for seq in range(4):
            for side, bitstream in coded.items():
                await edge.send(f"camera-{side}", seq, bitstream)
        for seq in range(4):
            for side in coded:
                assert (await edge.answer(f"camera-{side}", seq)).outcome == common_pb2.OUTCOME_DETECTIONS
    for event in await cloud.events():
        assert event.frame.camera_id == f"camera-{event.width}"
        (found,) = event.results[0].detections
        assert (found.box.x_min, found.box.x_max) == pytest.approx((16, 48), abs=4)
