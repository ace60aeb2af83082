"""The index of the JetStream log: one small message a frame, and how it is read in order.

    subject   NAME.LOG_ID.frame.CAMERA.EPOCH.SEQ     one subject a frame, so that the broker can hold it to one message
    body      version, CRC-32C of the event, offset, length, sequences of the blocks that hold the event

The sequence of this message in its stream is the record's sequence in the log, and its time the record's time. A camera
is written percent-encoded, dots too, so that it is one token of the subject whatever it is called.
"""

import asyncio
import json
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from cloud.detections.broker import broker_errors
from cloud.detections.log import FrameName
from shared.errors import Unavailable

_BODY = struct.Struct("!BIII")
_BLOCK = struct.Struct("!Q")
_VERSION = 1
_HEARTBEAT_S = 1.0
_SILENCE_S = 3.5  # without even a heartbeat, the reader is given up
_ASK_S = 30.0  # how long the broker holds a request for more
_IDLE_S = 60.0  # a reader that nobody uses is forgotten by the broker
_LATEST_NS = 1 << 62  # the year 2116; the broker's times end not much later
_HEARTBEAT = "100"
_OVER = ("404", "408")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an event is: `length` bytes from `offset` on in its `blocks` joined, which are named by sequence."""

    crc: int
    offset: int
    length: int
    blocks: tuple[int, ...]

    def to_bytes(self) -> bytes:
        head = _BODY.pack(_VERSION, self.crc, self.offset, self.length)
        return head + b"".join(_BLOCK.pack(block) for block in self.blocks)

    @classmethod
    def from_bytes(cls, body: bytes) -> "Place":
        """Raises Unavailable if the body is of a version that this program does not know, or damaged."""
        if len(body) < _BODY.size + _BLOCK.size or (len(body) - _BODY.size) % _BLOCK.size or body[0] != _VERSION:
            raise Unavailable(f"detection log: expected an index entry of version {_VERSION}, got {body[:16].hex()}")
        _, crc, offset, length = _BODY.unpack_from(body)
        return cls(crc, offset, length, tuple(block for (block,) in _BLOCK.iter_unpack(body[_BODY.size :])))


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of the index. `logged_ns`: Unix time by the broker's clock."""

    sequence: int
    logged_ns: int
    name: FrameName
    place: Place


def subject_of(prefix: str, name: FrameName) -> str:
    """The frame's own subject. `prefix` ends with the token before the camera."""
    camera = quote(name.camera, safe="").replace(".", "%2E").replace("~", "%7E")
    return f"{prefix}.{camera}.{name.epoch:016x}.{name.seq}"


def name_of(subject: str) -> FrameName:
    camera, epoch, seq = subject.split(".")[-3:]
    return FrameName(unquote(camera), int(epoch, 16), int(seq))


class IndexReader:
    """The index in order from one place on, by a pull consumer that the broker keeps in memory.

    Nothing is skipped unseen: messages of one consumer are numbered, and a number that is missing (they can be lost
    with a connection) ends the reader with Unavailable, as does a broker that has fallen silent. Whoever reads opens
    another one after the last entry taken.
    """

    def __init__(self, client: Client, stream: str) -> None:
        self._client = client
        self._js = client.jetstream()
        self._stream = stream
        self._consumer = ""
        self._inbox = client.new_inbox()
        self._subscription: Subscription | None = None
        self._delivered = 0  # messages of this consumer that came
        self._asked = 0  # messages asked for that have not come
        self._arrived: deque[Entry] = deque()
        self._failure = ""
        self._news = asyncio.Event()
        self.pending = 0  # entries there were to read when it was opened

    @classmethod
    async def after(cls, client: Client, stream: str, sequence: int) -> "IndexReader":
        """Begins with the first entry after `sequence`. Raises Unavailable."""
        config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=sequence + 1)
        return await cls(client, stream)._open(config)

    @classmethod
    async def at(cls, client: Client, stream: str, unix_ns: int) -> "IndexReader":
        """Begins with the first entry logged at `unix_ns` (whole microseconds of it) or after. Raises Unavailable."""
        start = _EPOCH + timedelta(microseconds=min(max(unix_ns, 0), _LATEST_NS) // 1000)
        config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_TIME, opt_start_time=start)
        return await cls(client, stream)._open(config)

    async def _open(self, config: ConsumerConfig) -> "IndexReader":
        config = config.evolve(ack_policy=AckPolicy.NONE, mem_storage=True, num_replicas=1, inactive_threshold=_IDLE_S)
        with broker_errors("the index cannot be read"):
            self._subscription = await self._client.subscribe(self._inbox, cb=self._receive)
            try:
                info = await self._js.add_consumer(self._stream, config)
            except BaseException:
                await self._subscription.unsubscribe()
                raise
        self._consumer = info.name
        self.pending = info.num_pending or 0
        return self

    async def take(self, limit: int) -> list[Entry]:
        """At least one entry, at most `limit`; waits for the first. Raises Unavailable."""
        while not self._arrived:
            if self._failure:
                raise Unavailable(f"detection log: the index cannot be read: {self._failure}")
            if self._asked <= 0:
                with broker_errors("the index cannot be read"):
                    await self._ask(limit)
            self._news.clear()
            try:
                async with asyncio.timeout(_SILENCE_S):
                    await self._news.wait()
            except TimeoutError:
                self.fail(f"the broker has been silent for {_SILENCE_S} s")
        return [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]

    def fail(self, reason: str) -> None:
        """Ends the reader: `take` raises once it has given what came."""
        self._failure = self._failure or reason
        self._news.set()

    async def close(self) -> None:
        """Tells the broker if it can be reached; else the broker finds out by itself."""
        self.fail("it is closed")
        with suppress(NatsError, OSError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            if self._client.is_connected:
                await self._js.delete_consumer(self._stream, self._consumer)

    async def _ask(self, count: int) -> None:
        self._asked = count
        request = {"batch": count, "expires": int(_ASK_S * 1e9), "idle_heartbeat": int(_HEARTBEAT_S * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await self._client.publish(subject, json.dumps(request).encode(), self._inbox)

    async def _receive(self, message: Msg) -> None:
        status = message.headers.get("Status") if message.headers else None
        try:
            if status is None:
                self._add(message)
            elif status != _HEARTBEAT:
                self._end_request(status, (message.headers or {}).get("Description", ""))
        except Exception as error:  # whoever reads must hear of it; the client would only log it
            self.fail(str(error))
        self._news.set()

    def _add(self, message: Msg) -> None:
        sequence, number, logged_ns = _delivery(message.reply)
        if number != self._delivered + 1:
            self.fail(f"message {self._delivered + 1} was lost on the way, {number} came")
        if self._failure:
            return
        self._delivered = number
        self._asked -= 1
        self._arrived.append(Entry(sequence, logged_ns, name_of(message.subject), Place.from_bytes(message.data)))

    def _end_request(self, status: str, description: str) -> None:
        """The broker gave up a request: because its time was over, or for good."""
        if status in _OVER or description.startswith("Batch Completed"):
            self._asked = 0
        else:
            self.fail(f"{status} {description}".strip())


def _delivery(reply: str) -> tuple[int, int, int]:
    """Stream sequence, number at this consumer and time (Unix ns), from the subject a delivery is acknowledged at."""
    tokens = reply.split(".")  # $JS.ACK.[domain.account.]stream.consumer.count.sequence.number.time.pending[.token]
    start = 5 if len(tokens) < 11 else 7
    sequence, number, logged_ns = (int(token) for token in tokens[start : start + 3])
    return sequence, number, logged_ns
