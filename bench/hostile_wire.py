"""Hostile callers of a running edge and cloud: messages whose fields lie, and connections that cost and give nothing.

Messages come from a caller with a good certificate, the worst case: each must be answered, or end its stream, with one
of the statuses that the contract names. The floods come from strangers. See `bench.hostile`, which runs both while a
good client keeps asking.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from sightline.v1 import detection_pb2, edge_pb2, ingest_pb2

from bench.corruption import injure
from shared.codec import bitstream as bits
from shared.codec.types import Bitstream
from shared.rpc import tls
from shared.rpc.frames import from_upload, to_upload

Opener = Callable[[], grpc.aio.Channel]
ALLOWED = frozenset(
    (
        *("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "OUT_OF_RANGE", "ALREADY_EXISTS"),
        *("PERMISSION_DENIED", "UNAUTHENTICATED"),
    )
)
ANSWER_S = 120.0
STREAM_MESSAGES = 48
# What grpc.aio makes of a stream that its server ended under a write; the server's own status is lost to the caller.
_CUT_WHILE_WRITING = "Internal error from Core"
_INTEGERS = (0, 1, 2, 255, 65_535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**31), -(2**63))
_FLOATS = (0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "\0", "../../etc/passwd", "a" * 5000, "\u202egate", "'; DROP TABLE frame;--", "gate-1", "💥" * 20)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def lie(message: Message, rng: np.random.Generator) -> None:
    """Changes one field of a message, somewhere in it, to something its type allows and nobody expects."""
    fields = message.DESCRIPTOR.fields
    field = fields[int(rng.integers(len(fields)))]
    if field.is_repeated:
        message.ClearField(field.name)
        if field.message_type is None:
            getattr(message, field.name).extend(_value(field, rng) for _ in range(int(rng.integers(40))))
        return
    if field.message_type is not None:
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
            lie(inner, rng)
        return
    setattr(message, field.name, _value(field, rng))


def _value(field: Any, rng: np.random.Generator) -> Any:
    def one_of(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.bytes(int(rng.integers(2000)))
    if field.type == FieldDescriptor.TYPE_STRING:
        return one_of(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return bool(rng.integers(2))
    if field.cpp_type in _BOUNDS:
        lowest, highest = _BOUNDS[field.cpp_type]
        return min(max(one_of(_INTEGERS), lowest), highest)
    return one_of(_FLOATS)


class Attack:
    """Messages for one edge and one cloud. `outcomes`: what came of how many; `faults`: what must not have come."""

    def __init__(self, edge: Opener, cloud: Opener, jpeg: bytes, coded: Bitstream) -> None:
        self._edge = edge
        self._cloud = cloud
        self._jpeg = jpeg
        self._coded = coded
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(
        self,
        inputs: int,
        seed: int,
        on_progress: Callable[[int], None],
        lanes: int = 6,
        until_s: float = float("inf"),
    ) -> None:
        """Sends at least `inputs` messages, or as many as go until `until_s` on the monotonic clock."""
        seeds = iter(range(seed, 2**62))

        async def lane() -> None:
            while self.outcomes.total() < inputs and not self.faults and time.monotonic() < until_s:
                before = self.outcomes.total()
                await self._one_stream(next(seeds))
                on_progress(self.outcomes.total() - before)

        await asyncio.gather(*(lane() for _ in range(lanes)))

    async def _one_stream(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        attacks = (self._compress_stream, self._upload, self._detect, self._subscribe, self._compress)
        attack = attacks[int(rng.choice(len(attacks), p=(0.5, 0.3, 0.1, 0.05, 0.05)))]
        name = attack.__name__.strip("_")
        try:
            async with asyncio.timeout(ANSWER_S):
                await attack(rng)
        except grpc.aio.AioRpcError as error:
            self._note(name, error.code().name, f"seed {seed}: {error.details()}")
        except TimeoutError:
            self.faults.append(f"{name} seed {seed}: no answer in {ANSWER_S:g} s")

    def _note(self, name: str, code: str, details: str = "") -> None:
        if _CUT_WHILE_WRITING in details:
            code = "ended"
        self.outcomes[f"{name}: {code}"] += 1
        if code not in ALLOWED | {"OK", "harmless", "ended"}:
            self.faults.append(f"{name}: {code}: {details}")

    async def _compress_stream(self, rng: np.random.Generator) -> None:
        requests = [self._compress_request(rng) for _ in range(STREAM_MESSAGES)]
        sent = [
            edge_pb2.CompressStreamRequest(request_id=i, request=request).SerializeToString()
            for i, request in enumerate(requests)
        ]
        if rng.random() < 0.3:
            sent.append(injure(sent[-1], rng))
        async with self._edge() as channel:
            call = channel.stream_stream(
                "/sightline.v1.EdgeService/CompressStream",
                response_deserializer=edge_pb2.CompressStreamResponse.FromString,
            )(_given(sent))
            async for response in call:
                code = response.error.code if response.HasField("error") else 0
                name = next(each.name for each in grpc.StatusCode if each.value[0] == code)
                self._note("compress_stream", "harmless" if name == "OK" else name, response.error.message)

    def _compress_request(self, rng: np.random.Generator) -> edge_pb2.CompressRequest:
        options = edge_pb2.CompressOptions(quality=2, max_wait={"seconds": 1}, max_age={"seconds": 100})
        request = edge_pb2.CompressRequest(camera_id="gate-1", encoded=self._jpeg, options=options)
        if rng.random() < 0.5:
            request.encoded = injure(self._jpeg, rng)
        for _ in range(int(rng.integers(1, 4))):
            lie(request, rng)
        request.options.ClearField("delivery")  # what waits for the cloud would only make this slow
        return request

    async def _compress(self, rng: np.random.Generator) -> None:
        data = injure(self._compress_request(rng).SerializeToString(), rng)
        await self._unary(self._edge, "/sightline.v1.EdgeService/Compress", data, "compress")

    async def _detect(self, rng: np.random.Generator) -> None:
        request = detection_pb2.DetectRequest(bitstream=injure(bits.to_bytes(self._coded), rng))
        lie(request, rng)
        data = request.SerializeToString()
        await self._unary(
            self._cloud, "/sightline.v1.DetectionService/Detect", injure(data, rng) if rng.random() < 0.2 else data,
            "detect",
        )  # fmt: skip

    async def _unary(self, open_channel: Opener, path: str, data: bytes, name: str) -> None:
        async with open_channel() as channel:
            await channel.unary_unary(path)(data)
        self._note(name, "harmless")

    async def _subscribe(self, rng: np.random.Generator) -> None:
        request = detection_pb2.SubscribeRequest(filter=detection_pb2.EventFilter(camera_ids=["gate-1"]))
        for _ in range(3):
            lie(request, rng)
        async with self._cloud() as channel:
            call = channel.unary_stream("/sightline.v1.DetectionService/Subscribe")(
                injure(request.SerializeToString(), rng) if rng.random() < 0.3 else request.SerializeToString()
            )
            if await call.read() is grpc.aio.EOF:
                self._note("subscribe", (await call.code()).name, str(await call.details()))
            else:
                call.cancel()
                self._note("subscribe", "harmless")

    async def _upload(self, rng: np.random.Generator) -> None:
        """As an edge that keeps the credit it is given, so that what is refused is refused for what it says."""
        model = ingest_pb2.ModelAnnouncement(index=0, model_id=self._coded.model_id)
        hello = ingest_pb2.Hello(protocol_version=1, edge_id="hostile", models=[model])
        if rng.random() < 0.1:
            lie(hello, rng)
        source = ingest_pb2.SourceAnnouncement(index=0, camera_id="gate-1", epoch=int(rng.integers(2**63)))
        async with self._cloud() as channel:
            call = channel.stream_stream(
                "/sightline.v1.IngestService/Upload",
                response_deserializer=ingest_pb2.UploadResponse.FromString,
            )()
            await call.write(ingest_pb2.UploadRequest(hello=hello).SerializeToString())
            if await call.read() is grpc.aio.EOF:
                self._note("upload", (await call.code()).name, str(await call.details()))
                return
            await call.read()  # the credit
            await call.write(ingest_pb2.UploadRequest(source=source).SerializeToString())
            sent = 0
            try:
                for seq in range(STREAM_MESSAGES):
                    request = self._upload_request(seq, rng)
                    await call.write(
                        injure(request.SerializeToString(), rng) if rng.random() < 0.01 else request.SerializeToString()
                    )
                    sent += 1
                await call.done_writing()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # it was ended: the status tells why
            while (response := await call.read()) is not grpc.aio.EOF:
                for ack in response.acks.acks:
                    if ack.state != ingest_pb2.ACK_STATE_RECEIVED:
                        state = ingest_pb2.AckState.Name(ack.state).removeprefix("ACK_STATE_")
                        self.outcomes[f"upload: {state}"] += 1
            code = await call.code()
            if code is not grpc.StatusCode.OK:  # what ended it was an input too
                self._note("upload", code.name, str(await call.details()))

    def _upload_request(self, seq: int, rng: np.random.Generator) -> ingest_pb2.UploadRequest:
        coded = self._coded
        frame = to_upload(coded, source_index=0, seq=seq, model_index=0)
        if rng.random() < 0.3:
            frame.latents = injure(frame.latents, rng)
        if rng.random() < 0.3:
            frame.hyper = injure(frame.hyper, rng)
        if rng.random() < 0.5:
            lie(frame, rng)
        frame.source_index = frame.model_index = 0
        frame.seq = seq
        if rng.random() < 0.7:  # past the first check
            frame.payload_crc = bits.payload_crc(from_upload(frame, coded.model_id))
        return ingest_pb2.UploadRequest(frame=frame)


async def _given(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


# -- strangers ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[socket.socket]]:
    """TCP connections that say nothing."""
    opened: list[socket.socket] = []
    loop = asyncio.get_running_loop()
    try:
        for _ in range(count):
            made = socket.socket()
            made.setblocking(False)
            opened.append(made)
            try:
                await asyncio.wait_for(loop.sock_connect(made, ("127.0.0.1", port)), 10)
            except (OSError, TimeoutError):
                continue
        yield opened
    finally:
        for made in opened:
            made.close()


async def slow_loris(port: int, count: int, patience_s: float) -> int:
    """Connections that send one byte of a TLS greeting at a time. Returns how many the server had closed in time."""
    greeting = bytes.fromhex("160301020001")
    closed = 0

    async def one() -> None:
        nonlocal closed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(patience_s):
                ended = asyncio.create_task(reader.read())
                for byte in greeting:
                    writer.write(bytes([byte]))
                    await asyncio.wait({ended}, timeout=patience_s / 8)
                await ended
                closed += 1
        except ConnectionError:
            closed += 1
        except TimeoutError:
            pass
        finally:
            writer.close()

    await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
    return closed


async def giant_metadata(open_channel: Opener, size: int) -> str:
    """The status of a call whose metadata is `size` bytes."""
    async with open_channel() as channel:
        call = channel.unary_unary("/sightline.v1.EdgeService/Compress")
        try:
            await call(b"", metadata=(("x-giant", "a" * size),), timeout=30)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


async def rapid_reset(open_channel: Opener, count: int) -> None:
    """Calls that are cancelled as soon as they are made (CVE-2023-44487)."""
    async with open_channel() as channel:
        compress = channel.unary_unary("/sightline.v1.EdgeService/Compress")
        for at in range(0, count, 100):
            calls = [compress(b"", timeout=30) for _ in range(min(100, count - at))]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*(call.code() for call in calls), return_exceptions=True)


async def deaf_consumers(open_channel: Opener, count: int) -> list[grpc.aio.Channel]:
    """Subscriptions to the whole log that are never read; the channels are the caller's to close."""
    channels = []
    ask = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING).SerializeToString()
    for _ in range(count):
        channel = open_channel()
        call = channel.unary_stream("/sightline.v1.DetectionService/Subscribe")(ask)
        await call.initial_metadata()
        channels.append(channel)
    return channels


def opener(port: int, credentials: grpc.ChannelCredentials) -> Opener:
    return lambda: tls.open_channel(f"127.0.0.1:{port}", credentials, max_message_bytes=64 << 20)
