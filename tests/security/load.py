"""A camera that keeps sending while something is changed under it, and the count of what became of its frames."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from sightline.v1 import common_pb2, edge_pb2, edge_pb2_grpc

from tests.cloud.harness import RunningCloud

WAIT_S = 120
Name = tuple[str, int, int]


class Camera:
    """Sends one picture after the other for as long as it is `sending`, each over the channel that `open_channel` gives
    for its turn. `receipts`: frames that the edge answered for, and the bundle each was coded with."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel], jpeg: bytes) -> None:
        self.receipts: dict[Name, str] = {}
        self._open_channel = open_channel
        options = edge_pb2.CompressOptions(delivery=edge_pb2.DELIVERY_SPOOLED, quality=2)
        self._request = edge_pb2.CompressRequest(camera_id="gate-1", encoded=jpeg, options=options)
        self._news = asyncio.Condition()

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """A frame that the edge refuses, for whatever reason, fails the test."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._send(stop))
        try:
            yield
        finally:
            stop.set()
            await task

    async def more(self, frames: int = 3) -> None:
        """Waits until so many more pictures were answered for."""
        goal = len(self.receipts) + frames
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: len(self.receipts) >= goal)

    async def _send(self, stop: asyncio.Event) -> None:
        long_lived = self._open_channel()
        try:
            while not stop.is_set():
                # Every other picture comes over a connection that has lived from the beginning.
                if len(self.receipts) % 2:
                    await self.one(long_lived)
                else:
                    async with self._open_channel() as fresh:
                        await self.one(fresh)
        finally:
            await long_lived.close()

    async def one(self, channel: grpc.aio.Channel) -> None:
        """Sends one picture and notes its receipt."""
        answer = await edge_pb2_grpc.EdgeServiceStub(channel).Compress(self._request, timeout=WAIT_S)
        frame = answer.receipt.frame
        async with self._news:
            self.receipts[frame.camera_id, frame.epoch, frame.seq] = answer.receipt.model_id
            self._news.notify_all()


async def outcomes(cloud: RunningCloud, camera: Camera) -> dict[Name, tuple[int, str]]:
    """Outcome and bundle of every frame in the cloud's log, once all that the camera has receipts for are there.

    Fails for a frame with two records."""
    async with asyncio.timeout(WAIT_S):
        while True:
            newest = cloud.log.newest
            events = await cloud.events()
            names = [(event.frame.camera_id, event.frame.epoch, event.frame.seq) for event in events]
            assert len(names) == len(set(names)), "a frame has two terminal records"
            if camera.receipts.keys() <= set(names):
                break
            await cloud.log.wait_beyond(newest)
    return {name: (event.outcome, event.model_id) for name, event in zip(names, events, strict=True)}


async def require_nothing_lost(cloud: RunningCloud, camera: Camera) -> None:
    """Every receipt ended as one DETECTIONS record, of the bundle that the receipt names."""
    found = await outcomes(cloud, camera)
    expected = {name: (common_pb2.OUTCOME_DETECTIONS, model_id) for name, model_id in camera.receipts.items()}
    assert {name: found[name] for name in expected} == expected
