"""Where the JetStream log keeps its events: many to a block, one block a message, retired by the broker.

A block is stored before any entry of the index names it, and an event larger than a block goes over several. What is
read is checked against the entry's CRC-32C.
"""

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence

import crc32c
from nats.aio.client import Client

from cloud.detections.broker import ANSWER_S, Streams, broker_errors, message_or_none
from cloud.detections.index import Entry, Place
from cloud.detections.log import Record, Retention
from shared.logs import facts

_log = logging.getLogger("sightline.cloud.log")
_BLOCK_BYTES = 256 << 10
_BLOCKS_KEPT = 8  # at least, of the bound on bytes: a block is retired as a whole
_OVERHEAD_BYTES = 1024  # of a message beside its content, amply
_CACHE_BYTES = 32 << 20
_AGAIN_S = 0.25


class Blocks:
    """The block stream, and a cache of what was written or read last. `size`: bytes of a full block."""

    def __init__(self, client: Client, streams: Streams, retention: Retention) -> None:
        self._js = client.jetstream(timeout=ANSWER_S)
        self._streams = streams
        room = client.max_payload - _OVERHEAD_BYTES
        self.size = max(1, min(_BLOCK_BYTES, room, retention.max_bytes // _BLOCKS_KEPT))
        self._cache = _Cache()

    async def store(self, events: Sequence[bytes]) -> list[Place]:
        """Makes the events durable in blocks; nobody knows of them yet."""
        content = b"".join(events)
        size = self.size
        parts = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
        with broker_errors("events cannot be written"):
            acks = await asyncio.gather(*(self._js.publish(self._streams.blocks_subject, part) for part in parts))
        blocks = [ack.seq for ack in acks]
        for block, part in zip(blocks, parts, strict=True):
            self._cache.put(block, part)
        places = []
        starts = itertools.accumulate((len(event) for event in events), initial=0)
        for event, start in zip(events, starts, strict=False):
            first, last = min(start // size, len(parts) - 1), max(start, start + len(event) - 1) // size
            used = tuple(blocks[first : last + 1])
            places.append(Place(crc32c.crc32c(event), start - first * size, len(event), used))
        return places

    async def load(self, entries: Sequence[Entry]) -> list[Record | None]:
        """The entries' records, None where the content is gone. Raises Unavailable."""
        needed = sorted({block for entry in entries for block in entry.place.blocks})
        contents = dict(zip(needed, await asyncio.gather(*(self._block(block) for block in needed)), strict=True))
        return [_record(entry, [contents[block] for block in entry.place.blocks]) for entry in entries]

    async def _block(self, sequence: int) -> bytes | None:
        """A block's content, None if retention took it. Raises Unavailable."""
        content = self._cache.get(sequence)
        if content is not None:
            return content
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ANSWER_S
        with broker_errors(f"block {sequence} cannot be read"):
            while True:
                # Any copy may answer, and one that lags does not have it; then the leader is asked.
                for direct in (True, False):
                    message = await message_or_none(self._js.get_msg(self._streams.blocks, seq=sequence, direct=direct))
                    if message is not None:
                        self._cache.put(sequence, message.data or b"")
                        return message.data or b""
                info = await self._js.stream_info(self._streams.blocks)
                if sequence < info.state.first_seq:
                    return None
                if loop.time() > deadline:  # a leader that is new may still be finding what was agreed on
                    _log.error("the broker has lost a block it acknowledged", extra=facts(block=sequence))
                    return None
                await asyncio.sleep(_AGAIN_S)


class _Cache:
    """The blocks used last, bounded in bytes."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, sequence: int) -> bytes | None:
        content = self._blocks.get(sequence)
        if content is not None:
            self._blocks.move_to_end(sequence)
        return content

    def put(self, sequence: int, content: bytes) -> None:
        if sequence not in self._blocks:
            self._blocks[sequence] = content
            self._bytes += len(content)
        while self._bytes > _CACHE_BYTES and len(self._blocks) > 1:
            self._bytes -= len(self._blocks.popitem(last=False)[1])


def _record(entry: Entry, contents: Sequence[bytes | None]) -> Record | None:
    """The entry's record if all its content is there and is what was written."""
    whole = b"".join(content for content in contents if content is not None)
    if None in contents:
        return None
    event = whole[entry.place.offset : entry.place.offset + entry.place.length]
    if crc32c.crc32c(event) != entry.place.crc:
        _log.error("an event in the log is damaged", extra=facts(sequence=entry.sequence, frame=entry.name))
        return None
    return Record(entry.sequence, entry.logged_ns, entry.name, event)
