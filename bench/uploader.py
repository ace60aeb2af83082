"""An edge's end of Upload without the edge: coded frames go up against credit, and each waits for its final answer."""

import asyncio
import random
import time
from types import TracebackType
from typing import Self

import grpc
from sightline.v1 import ingest_pb2, ingest_pb2_grpc

from shared.codec.types import Bitstream
from shared.errors import Unavailable
from shared.rpc.frames import to_upload


class Uploader:
    """One stream of one camera. Used as an async context manager."""

    def __init__(self, address: str, model_id: str, camera: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._call = ingest_pb2_grpc.IngestServiceStub(self._channel).Upload()
        self._hello = ingest_pb2.Hello(
            protocol_version=1,
            edge_id=f"bench-{camera}",
            boot_id=random.getrandbits(63),
            models=[ingest_pb2.ModelAnnouncement(index=0, model_id=model_id)],
        )
        self._source = ingest_pb2.SourceAnnouncement(index=0, camera_id=camera, epoch=random.getrandbits(63))
        self._seq = 0
        self._credit = asyncio.Semaphore(0)
        self._waiting: dict[int, asyncio.Future[ingest_pb2.FrameAck]] = {}
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        await self._call.write(ingest_pb2.UploadRequest(hello=self._hello))
        await self._call.write(ingest_pb2.UploadRequest(source=self._source))
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: BaseException | type[BaseException] | TracebackType | None) -> None:
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def send(self, coded: Bitstream) -> float:
        """Seconds from being offered to its record in the log. Raises Unavailable for any other end."""
        start = time.perf_counter()
        await self._credit.acquire()
        self._seq += 1
        seq = self._seq
        answered = self._waiting[seq] = asyncio.get_running_loop().create_future()
        frame = to_upload(coded, source_index=0, seq=seq, model_index=0)
        frame.capture_time_unix_us = frame.spooled_time_unix_us = time.time_ns() // 1000
        async with self._writing:
            await self._call.write(ingest_pb2.UploadRequest(frame=frame))
        ack = await answered
        if ack.state != ingest_pb2.ACK_STATE_PERSISTED:
            raise Unavailable(f"expected PERSISTED, got {ingest_pb2.AckState.Name(ack.state)}: {ack.detail}")
        return time.perf_counter() - start

    async def _read(self) -> None:
        try:
            async for message in self._call:
                if message.WhichOneof("message") == "credit":
                    for _ in range(message.credit.frames):
                        self._credit.release()
                for ack in message.acks.acks:
                    if ack.state != ingest_pb2.ACK_STATE_RECEIVED and ack.seq in self._waiting:
                        self._waiting.pop(ack.seq).set_result(ack)
        finally:
            for answered in self._waiting.values():
                answered.cancel()
