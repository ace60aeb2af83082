"""The demo's two connections: a camera's to the edge, a consumer's to the cloud."""

import asyncio
import time
from pathlib import Path

import grpc
from sightline.v1 import common_pb2, detection_pb2, detection_pb2_grpc, edge_pb2, edge_pb2_grpc

from cli.demo.services import Service
from shared.errors import SightlineError, Unavailable
from shared.rpc.status import from_rpc_error
from shared.rpc.tls import open_channel

ANSWER_S = 120.0  # longest wait for one picture's detections
MAX_MESSAGE_BYTES = 64 << 20
FrameKey = tuple[str, int, int]


class Wire:
    """Sends pictures and awaits their events. Made inside a running loop; `close` ends it."""

    def __init__(self, edge: Service, cloud: Service) -> None:
        self._services = (edge, cloud)
        self._edge = open_channel(edge.address, None, max_message_bytes=MAX_MESSAGE_BYTES)
        self._cloud = open_channel(cloud.address, None, max_message_bytes=MAX_MESSAGE_BYTES)
        self._camera = edge_pb2_grpc.EdgeServiceStub(self._edge)
        self._events: dict[FrameKey, asyncio.Future[detection_pb2.DetectionEvent]] = {}
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        self._follower.cancel()
        await asyncio.gather(self._follower, return_exceptions=True)
        await self._edge.close()
        await self._cloud.close()

    async def send(
        self, source: Path, data: bytes, quality: float
    ) -> tuple[edge_pb2.Receipt, detection_pb2.DetectionEvent, float]:
        """One picture there and back: receipt, event, milliseconds from the call to the event's arrival.

        Raises SightlineError: the service's own, or Unavailable with the end of the log of a service that ended.
        """
        request = edge_pb2.CompressRequest(
            camera_id="demo",
            encoded=data,
            options=edge_pb2.CompressOptions(
                quality=quality, return_bitstream=True, delivery=edge_pb2.DELIVERY_SPOOLED
            ),
        )
        start = time.perf_counter()
        try:
            receipt = (await self._camera.Compress(request, timeout=ANSWER_S)).receipt
            event = await self._answer(receipt.frame)
        except grpc.aio.AioRpcError as error:
            self._check_services()
            raise type(failure := from_rpc_error(error))(f"{source}: {failure}") from None
        round_trip_ms = 1000 * (time.perf_counter() - start)
        if event is None:
            self._check_services()
            raise Unavailable(f"{source}: no detections after {ANSWER_S:.0f} s")
        if event.outcome != common_pb2.OUTCOME_DETECTIONS:
            raise SightlineError(f"{source} ended as {common_pb2.Outcome.Name(event.outcome)}: {event.reason}")
        return receipt, event, round_trip_ms

    async def _answer(self, frame: common_pb2.FrameName) -> detection_pb2.DetectionEvent | None:
        """The frame's event; None if it takes too long. Raises what ended the subscription."""
        answer = self._event(frame)
        await asyncio.wait((answer, self._follower), timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if self._follower.done():
            self._follower.result()  # raises
        return None

    def _event(self, frame: common_pb2.FrameName) -> "asyncio.Future[detection_pb2.DetectionEvent]":
        key = (frame.camera_id, frame.epoch, frame.seq)
        if key not in self._events:
            self._events[key] = asyncio.get_running_loop().create_future()
        return self._events[key]

    async def _follow(self) -> None:
        stub = detection_pb2_grpc.DetectionServiceStub(self._cloud)
        request = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
        async for response in stub.Subscribe(request):
            if response.WhichOneof("message") == "event":
                answer = self._event(response.event.frame)
                if not answer.done():  # at least once: an event may come twice
                    answer.set_result(response.event)

    def _check_services(self) -> None:
        for one in self._services:
            one.check()
