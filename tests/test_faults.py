"""Edge and cloud through what goes wrong between and around them: every frame still ends as one DETECTIONS event."""

# ruff: noqa: ASYNC110 - the spool's tally tells nobody when it changes

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sightline.v1 import common_pb2, edge_pb2, ingest_pb2, ingest_pb2_grpc

from edge.server import Edge
from shared.codec.codec import Codec
from tests.cloud.harness import RunningCloud, spot_frame
from tests.house import house, send, until_empty

DAY_S = 86_400


class BadMessenger(ingest_pb2_grpc.IngestServiceServicer):
    """Between edge and cloud: loses acknowledgements, says them twice, in another order, and breaks streams."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.lost = self.doubled = self.swapped = self.broken = 0

    async def open(self, cloud_port: int) -> int:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{cloud_port}")
        self._server = grpc.aio.server()
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def close(self) -> None:
        await self._server.stop(0)
        await self._channel.close()

    async def Upload(self, requests: Any, context: Any) -> AsyncIterator[ingest_pb2.UploadResponse]:
        call = ingest_pb2_grpc.IngestServiceStub(self._channel).Upload(requests)
        late: list[ingest_pb2.FrameAck] = []
        async for response in call:
            if response.WhichOneof("message") != "acks":
                yield response
                continue
            acks = [ack for ack in response.acks.acks if not self._loses()]
            twice = [ack for ack in acks if self._rng.random() < 0.3]
            self.doubled += len(twice)
            acks = [*acks, *twice, *late]
            late = [acks.pop() for _ in range(len(acks) // 3)]
            before = [ack.seq for ack in acks]
            self._rng.shuffle(acks)
            self.swapped += before != [ack.seq for ack in acks]
            yield ingest_pb2.UploadResponse(acks=ingest_pb2.Acks(acks=acks))
            if self._rng.random() < 0.15:
                self.broken += 1
                call.cancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")

    def _loses(self) -> bool:
        loses = self._rng.random() < 0.3
        self.lost += loses
        return loses


async def assert_each_once(cloud: RunningCloud, receipts: list[edge_pb2.Receipt]) -> None:
    """Every receipt's frame has one record, and nothing else has."""
    events = await cloud.events()
    names = [(e.frame.camera_id, e.frame.epoch, e.frame.seq) for e in events]
    assert sorted(names) == sorted((r.frame.camera_id, r.frame.epoch, r.frame.seq) for r in receipts)
    assert {event.outcome for event in events} == {common_pb2.OUTCOME_DETECTIONS}


async def spool(edge: Edge, count: int, cameras: int = 2) -> list[edge_pb2.Receipt]:
    return list(
        await asyncio.gather(
            *(
                send(edge, spot_frame(left=i % 32), edge_pb2.DELIVERY_SPOOLED, camera=f"camera-{i % cameras}")
                for i in range(count)
            )
        )
    )


async def test_lost_doubled_and_reordered_acks_lose_and_double_nothing(tmp_path: Path, codec: Codec) -> None:
    messenger = BadMessenger(random.Random(5))
    async with house(tmp_path, codec, between=messenger.open, edge_flags={"uplink_stall_s": 1}) as (edge, cloud):
        receipts = [receipt for _ in range(5) for receipt in await spool(edge, 12)]
        await until_empty(edge)
        await assert_each_once(cloud, receipts)
        await messenger.close()
    assert min(messenger.lost, messenger.doubled, messenger.swapped, messenger.broken) > 0


async def test_clocks_that_jump_a_day_either_way_lose_and_double_nothing(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of both jumps while frames wait, are under way and come; tokens and names hold."""
    true_ns = time.time_ns
    jump_s = 0
    monkeypatch.setattr(time, "time_ns", lambda: true_ns() + jump_s * 10**9)
    receipts: list[edge_pb2.Receipt] = []
    async with house(tmp_path, codec) as (edge, cloud):
        for number, jump_s in enumerate((0, DAY_S, 0, -DAY_S, DAY_S, 0)):
            receipts += await spool(edge, 4)
            token = f"token {number}"
            first = await send(edge, spot_frame(), edge_pb2.DELIVERY_SPOOLED, token=token)
            jump_s -= DAY_S // 2
            again = await send(edge, spot_frame(), edge_pb2.DELIVERY_SPOOLED, token=token)
            assert (again.duplicate, again.frame) == (True, first.frame)
            receipts.append(first)
        await until_empty(edge)
        await assert_each_once(cloud, receipts)
        times = [record.logged_ns for record in await cloud.log.read(0, 1000)]
    assert times == sorted(times)


class PoorLine:
    """A relay of bytes at 256 kbit/s each way, dark for 30 % of the time, that swallows its first connection."""

    RATE_BYTES_S = 32_000
    PERIOD_S, DARK_S = 1.0, 0.3

    def __init__(self) -> None:
        self.carried = self.swallowed = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, cloud_port: int, port: int = 0) -> int:
        self._cloud_port = cloud_port
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.swallowed == 0:  # the first connection is taken and never answered: a black hole
            self.swallowed += 1
            self._tasks.add(asyncio.create_task(self._swallow(reader)))
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._cloud_port)
        for pair in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._carry(*pair)))

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        while await reader.read(4096):
            pass

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1600):
            await asyncio.sleep(len(data) / self.RATE_BYTES_S)
            phase_s = time.monotonic() % self.PERIOD_S
            if phase_s < self.DARK_S:
                await asyncio.sleep(self.DARK_S - phase_s)
            writer.write(data)
            await writer.drain()
            self.carried += len(data)
        writer.close()


async def test_a_slow_line_with_dark_windows_and_a_black_hole_delivers_everything(tmp_path: Path, codec: Codec) -> None:
    line = PoorLine()
    async with house(tmp_path, codec, between=line.open, edge_flags={"uplink_stall_s": 2}) as (edge, cloud):
        receipts = await spool(edge, 40)
        await until_empty(edge)
        await assert_each_once(cloud, receipts)
        await line.close()
    assert line.swallowed == 1
    assert line.carried > 10_000


async def test_a_cameras_deadline_ends_its_old_frames_as_expired_and_no_other_cameras(
    tmp_path: Path, codec: Codec
) -> None:
    """The uplink is away for longer than one camera's frames may wait: they are counted and told, not dropped."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = int(nobody.getsockname()[1])

    async def nowhere(_: int) -> int:
        return port

    flags = {"camera_max_age_s": ["hasty=0.5"], "uplink_stall_s": 2}
    async with house(tmp_path, codec, between=nowhere, edge_flags=flags) as (edge, cloud):
        for camera in ("hasty", "patient"):
            await send(edge, spot_frame(), edge_pb2.DELIVERY_SPOOLED, camera=camera)
        async with asyncio.timeout(30):
            while edge.spool.stats.tally.expired < 1:
                await asyncio.sleep(0.05)
        assert edge.spool.stats.frames == 2  # its end is still to be told
        line = PoorLine()
        await line.open(cloud.server.port, port)
        await until_empty(edge)
        ends = {event.frame.camera_id: event.outcome for event in await cloud.events()}
        assert ends == {"hasty": common_pb2.OUTCOME_EXPIRED, "patient": common_pb2.OUTCOME_DETECTIONS}
        told = await send(edge, spot_frame(), edge_pb2.DELIVERY_PERSISTED, camera="hasty", max_age_s=1e-3)
        assert told.outcome == common_pb2.OUTCOME_EXPIRED
        await line.close()
