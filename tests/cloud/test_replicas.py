"""Several clouds over one log: whichever a frame or a consumer comes to, it is as if there were one."""

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest
from sightline.v1 import common_pb2, detection_pb2, ingest_pb2

from bench.broker import Broker
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import RunningCloud, settings

P, L = ingest_pb2.ACK_STATE_PERSISTED, ingest_pb2.ACK_STATE_RETRY_LATER


async def start_two(start_cloud: StartCloud, broker: Broker, folder: Path) -> list[RunningCloud]:
    """Two clouds with folders of their own and one log."""
    shared = {"log": "jetstream", "log_name": f"log-{secrets.token_hex(4)}", "log_replicas": 1}
    return [
        await start_cloud(**shared, nats_servers=broker.servers, data_dir=folder / label, cloud_id=label)
        for label in ("one", "two")
    ]


async def take(call: Any, count: int) -> list[detection_pb2.DetectionEvent]:
    """The next `count` events of a subscription."""
    events: list[detection_pb2.DetectionEvent] = []
    async with asyncio.timeout(60):
        while len(events) < count:
            message = await call.read()
            if message.HasField("event"):
                events.append(message.event)
    return events


async def test_a_frame_that_reaches_two_clouds_at_once_is_one_event(
    start_cloud: StartCloud, broker: Broker, tmp_path: Path, spot: Bitstream
) -> None:
    one, two = await start_two(start_cloud, broker, tmp_path)
    async with one.edge("left") as left, two.edge("right") as right:
        for seq in range(12):
            await asyncio.gather(left.send("gate", seq, spot), right.send("gate", seq, spot))
        answers = [await edge.answer("gate", seq) for seq in range(12) for edge in (left, right)]
    assert {(ack.state, ack.outcome) for ack in answers} == {(P, common_pb2.OUTCOME_DETECTIONS)}
    events = await one.events()
    assert sorted(event.frame.seq for event in events) == list(range(12))
    assert await two.events() == events
    assert sum(c.metric("sightline_cloud_events_total", outcome="detections") for c in (one, two)) == 12


async def test_a_consumer_goes_on_at_another_cloud_where_it_was(
    start_cloud: StartCloud, broker: Broker, tmp_path: Path, spot: Bitstream
) -> None:
    one, two = await start_two(start_cloud, broker, tmp_path)
    async with one.edge() as edge, two.edge() as other:
        for seq in range(4):
            await edge.deliver("gate", seq, spot)
            await other.deliver("yard", seq, spot)
        beginning = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
        first = one.consumers().Subscribe(beginning)
        seen = await take(first, 5)
        first.cancel()
        second = two.consumers().Subscribe(detection_pb2.SubscribeRequest(after=seen[-1].cursor))
        seen += await take(second, 3)
        await edge.deliver("gate", 4, spot)
        seen += await take(second, 1)
        # Straight to a cloud that may not have heard of this event yet: it is waited for, not called a lost log.
        third = one.consumers().Subscribe(detection_pb2.SubscribeRequest(after=seen[-1].cursor))
        await other.deliver("yard", 4, spot)
        seen += await take(third, 1)
    assert [event.cursor.sequence for event in seen] == list(range(1, 11))
    assert len({(event.frame.camera_id, event.frame.seq) for event in seen}) == 10


async def test_while_the_broker_is_down_edges_are_told_to_come_later_and_nothing_is_rejected(
    start_cloud: StartCloud, tmp_path: Path, spot: Bitstream
) -> None:
    with Broker(tmp_path / "nats") as broker:
        one, two = await start_two(start_cloud, broker, tmp_path)
        async with one.edge() as edge, two.edge() as other:
            assert (await edge.deliver("gate", 0, spot)).state == P
            await asyncio.to_thread(broker.nodes[0].kill)
            told = [await side.deliver("gate", seq, spot) for seq in (0, 1) for side in (edge, other)]
            await asyncio.to_thread(broker.nodes[0].start)
            states = {ack.state for ack in told}
            for side in (edge, other):
                async with asyncio.timeout(60):
                    while (ack := await side.deliver("gate", 1, spot)).state == L:
                        states.add(ack.state)
                        await asyncio.sleep(0.05)  # an edge waits too
                assert (ack.state, ack.outcome) == (P, common_pb2.OUTCOME_DETECTIONS)
        assert states == {L}
        assert {ack.retry_reason for ack in told} == {ingest_pb2.RETRY_REASON_LOG_UNAVAILABLE}
        assert [event.frame.seq for event in await two.events()] == [0, 1]


@pytest.mark.parametrize("replicas", [0, 6])
def test_copies_out_of_range_are_refused(replicas: int) -> None:
    with pytest.raises(InvalidSettings, match="log_replicas"):
        settings(Path(), log_replicas=replicas)
