"""The detection log in NATS JetStream: for several cloud processes that share one log.

    append --queue--> writers: events of all cameras that wait, one block --> block stream   (1: the content is safe)
                      then one entry a frame, "only if this subject is empty" --> index stream (2: the frame is decided)
    follower: index in order, with its blocks --> tail in memory, news
    read   --> tail in memory, else index and blocks from the broker

Exactly one record a frame. Every frame has a subject of its own in the index, and an entry is published with
Nats-Expected-Last-Subject-Sequence 0: whichever cloud comes second is refused by the broker and told so, for as long as
the entry is kept, which is the key age. The broker's window of message ids is not used. What a loser, a crash or an
answer that came too late leaves behind is a block that no entry names; it goes with its time.

Why two streams: names must outlive content. Were the event itself the message that makes its frame unique, the broker's
retention would take both together, or somebody would have to move names elsewhere without letting a resend slip in
between. So the broker retires blocks by age and bytes, entries by age alone, and nothing has to be moved.

Blocks are written side by side, entries of one camera in the order in which their events came: each is sent after the
one before it, without waiting for the broker's answer.

Cost: two acknowledged writes one after the other, and the first is shared by all that wait (group commit).

An event larger than a block goes over several. A block that is gone makes its records unreadable: readers are told with
CursorExpired. `append` and `find` return once what they tell of can be read in this process too.

The broker's times are the clock of whichever server leads: when another takes over, they can step back by as much as
their clocks differ.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nats.aio.client import Client
from nats.js.api import Header
from nats.js.errors import APIError

from cloud.detections.blocks import Blocks
from cloud.detections.broker import (
    ANSWER_S,
    BrokerOptions,
    Streams,
    broker_errors,
    connect,
    disconnect,
    end,
    message_or_none,
    open_streams,
)
from cloud.detections.index import Entry, IndexReader, Place, subject_of
from cloud.detections.log import Appended, FrameName, Record, Retention, Span
from cloud.detections.tail import Tail
from shared.errors import CursorExpired, Unavailable
from shared.logs import facts
from shared.turns import Turn, Turns

_log = logging.getLogger("sightline.cloud.log")
_WRITERS = 4  # blocks under way at once
_FOLLOW_ENTRIES = 128
_REPLAYS = 64  # readers of older parts that are kept open for their consumers
_PAUSE_S = 0.02  # while another cloud's entry for the same frame is being agreed on
_REOPEN_S = 0.25
# The broker's codes for "this subject is not empty" (and for "someone is filling it right now").
_NOT_EMPTY = (10071, 10164)


@dataclass(slots=True, eq=False)
class _Append:
    name: FrameName
    event: bytes
    turn: Turn
    done: "asyncio.Future[Appended]"


class JetStreamLog:
    """See the module's head. Made by `open`; belongs to the event loop it was opened in."""

    def __init__(self, client: Client, streams: Streams, retention: Retention) -> None:
        self._client = client
        self._js = client.jetstream(timeout=ANSWER_S)
        self._streams = streams
        self._newest = streams.newest
        self._removed_through = 0
        self._first_block = 0  # of those the broker keeps, when it was last asked
        self._tail = Tail()
        self._blocks = Blocks(client, streams, retention)
        self._news = asyncio.Event()
        self._trouble = ""  # why the follower is not following, empty if it is
        self._following: IndexReader | None = None
        self._replays: OrderedDict[int, IndexReader] = OrderedDict()  # by the sequence they go on after
        self._turns = Turns(ANSWER_S)
        self._queue: asyncio.Queue[_Append | None] = asyncio.Queue()
        self._closed = False
        self._under_way: set[asyncio.Task[None]] = set()  # batches that are being written
        self._writers = [asyncio.create_task(self._write_until_closed()) for _ in range(_WRITERS)]
        self._follower = asyncio.create_task(self._follow())
        self._chores: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, options: BrokerOptions, retention: Retention) -> "JetStreamLog":
        """Opens or creates the log.

        Raises InvalidSettings, also for a broker that will not do, and Unavailable if none is there.
        """
        opened: list[JetStreamLog] = []

        def lost() -> None:
            for log in opened:
                log._lost_connection()

        client = await connect(options, lost)
        try:
            streams = await open_streams(client, options, retention)
            opened.append(cls(client, streams, retention))
        except BaseException:
            await disconnect(client)
            raise
        return opened[0]

    @property
    def log_id(self) -> str:
        return self._streams.log_id

    @property
    def newest(self) -> int:
        return self._newest

    async def append(self, name: FrameName, event: bytes) -> Appended:
        self._require_connection()
        turn = self._turns.take(name.camera)
        request = _Append(name, event, turn, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(request)
        try:
            appended = await request.done
        finally:
            turn.end()
        await self._until_readable(appended.sequence)
        return appended

    async def find(self, name: FrameName) -> int | None:
        self._require_connection()
        with broker_errors(f"{name} cannot be looked up"):
            # The leader answers, from what is agreed on; its followers may lag.
            entry = await message_or_none(self._js.get_msg(self._streams.index, subject=self._subject(name)))
        if entry is None or entry.seq is None:
            return None
        await self._until_readable(entry.seq)
        return entry.seq

    async def span(self) -> Span:
        self._require_connection()
        with broker_errors("what is kept cannot be asked"):
            index, blocks = await asyncio.gather(
                self._js.stream_info(self._streams.index), self._js.stream_info(self._streams.blocks)
            )
        await self._until_readable(index.state.last_seq)
        await self._find_oldest(index.state.first_seq, blocks.state.first_seq)
        return Span(self._removed_through + 1, max(self._newest, self._removed_through))

    async def read(self, after: int, limit: int) -> list[Record]:
        self._check_kept(after)
        if after >= self._newest:
            return []
        held = self._tail.read(after, limit)
        return held if held is not None else await self._replay(after, limit)

    async def wait_beyond(self, sequence: int) -> None:
        while self._newest <= sequence:
            await self._news.wait()

    async def position_at(self, unix_ns: int) -> int:
        position = (await self.span()).newest
        reader = await IndexReader.at(self._client, self._streams.index, unix_ns)
        try:
            left = reader.pending
            while left > 0:  # the broker looks up whole microseconds: the first few may be older
                for entry in await reader.take(min(left, _FOLLOW_ENTRIES)):
                    if entry.logged_ns >= unix_ns:
                        return max(entry.sequence - 1, self._removed_through)
                    position = entry.sequence
                    left -= 1
            return position
        finally:
            self._discard(reader)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for _ in self._writers:
            self._queue.put_nowait(None)
        await asyncio.gather(*self._writers)
        await end(self._follower)
        for reader in self._replays.values():
            self._discard(reader)
        await asyncio.gather(*self._chores, return_exceptions=True)
        await disconnect(self._client)

    # Writing.

    async def _write_until_closed(self) -> None:
        while (first := await self._queue.get()) is not None:
            batch = [first, *self._take_waiting(self._blocks.size - len(first.event))]
            work = asyncio.create_task(self._write(batch))
            self._under_way.add(work)
            await asyncio.wait({work})
            self._under_way.discard(work)
            if work.cancelled():
                _fail(batch, Unavailable("detection log: the connection was lost before the broker had answered"))

    async def _write(self, batch: list[_Append]) -> None:
        """Carries a batch to its end; whatever that is, those who wait hear of it."""
        try:
            places = await self._blocks.store([request.event for request in batch])
        except Exception as error:
            _fail(batch, error)
        else:
            await asyncio.gather(*(self._decide(request, place) for request, place in zip(batch, places, strict=True)))

    def _take_waiting(self, room: int) -> list[_Append]:
        """What waits too and fits into the same block."""
        batch: list[_Append] = []
        while room > 0 and not self._queue.empty():
            request = self._queue.get_nowait()
            if request is None:
                self._queue.put_nowait(None)  # the end is for the next turn
                break
            batch.append(request)
            room -= len(request.event)
        return batch

    async def _decide(self, request: _Append, place: Place) -> None:
        try:
            await request.turn.come()
            appended = await self._claim(request, place)
        except Exception as error:
            _fail([request], error)
        else:
            if not request.done.done():
                request.done.set_result(appended)

    async def _claim(self, request: _Append, place: Place) -> Appended:
        """Publishes the frame's entry if it has none."""
        name = request.name
        headers = {str(Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value): "0"}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ANSWER_S
        while True:
            try:
                with broker_errors(f"{name} cannot be written"):
                    publishing = asyncio.create_task(
                        self._js.publish(self._subject(name), place.to_bytes(), headers=headers)
                    )
                    request.turn.end()  # whoever wakes by this publishes after what was just made
                    ack = await publishing
                return Appended(ack.seq, new=True)
            except Unavailable as error:
                if not (isinstance(error.__cause__, APIError) and error.__cause__.err_code in _NOT_EMPTY):
                    raise
            known = await self.find(name)
            if known is not None:
                return Appended(known, new=False)
            if loop.time() > deadline:
                raise Unavailable(f"detection log: {name} is being written by another, without end")
            await asyncio.sleep(_PAUSE_S)

    # Following.

    async def _follow(self) -> None:
        """Keeps the tail at the log's end, over every loss of the broker."""
        while True:
            try:
                reader = await self._open_following()
                try:
                    while True:
                        entries = await reader.take(_FOLLOW_ENTRIES)
                        self._publish(entries, await self._blocks.load(entries))
                finally:
                    self._following = None
                    self._discard(reader)
            except Unavailable as error:
                if not self._trouble:
                    _log.warning("the detection log cannot be followed", extra=facts(error=str(error)))
                self._trouble = str(error)
            await asyncio.sleep(_REOPEN_S)

    async def _open_following(self) -> IndexReader:
        """Goes on after the newest record. Raises Unavailable, also if the log is another or has lost its end."""
        with broker_errors("the broker does not answer"):
            info = await self._js.stream_info(self._streams.index)
        log_id = (info.config.metadata or {}).get("sightline.log_id")
        if log_id != self.log_id:
            raise Unavailable(
                f"detection log {self.log_id} was replaced by {log_id}: start this process again to use it"
            )
        if info.state.last_seq < self._newest:
            raise Unavailable(
                f"detection log {self.log_id} ends at sequence {info.state.last_seq}, it was at {self._newest}: "
                "the broker has lost what it acknowledged, or is still finding it"
            )
        reader = await IndexReader.after(self._client, self._streams.index, self._newest)
        self._following = reader
        if self._trouble:
            _log.info("the detection log is followed again", extra=facts(newest=self._newest))
            self._trouble = ""
        return reader

    def _publish(self, entries: Sequence[Entry], records: Iterable[Record | None]) -> None:
        run: list[Record] = []
        for entry, record in zip(entries, records, strict=True):
            if record is None or entry.sequence != self._newest + 1:
                self._forget_through(entry.sequence if record is None else entry.sequence - 1)
                run.clear()
            if record is not None:
                run.append(record)
            self._newest = entry.sequence
        self._tail.extend(run)
        self._news.set()
        self._news = asyncio.Event()

    def _lost_connection(self) -> None:
        """Answers to what was asked will not come any more, and what was being read may have gaps."""
        for work in self._under_way:
            work.cancel()
        for reader in (self._following, *self._replays.values()):
            if reader is not None:
                reader.fail("the connection was lost")

    async def _until_readable(self, sequence: int) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self.wait_beyond(sequence - 1)
        except TimeoutError:
            reason = self._trouble or f"the follower is at {self._newest}"
            raise Unavailable(f"detection log: sequence {sequence} cannot be read yet: {reason}") from None

    # Reading what is older.

    async def _replay(self, after: int, limit: int) -> list[Record]:
        reader, entries = await self._entries(after, min(limit, self._newest - after))
        try:
            records: list[Record] = []
            for entry, record in zip(entries, await self._blocks.load(entries), strict=True):
                if record is None or entry.sequence != after + 1 + len(records):
                    if not records:
                        self._forget_through(entry.sequence if record is None else entry.sequence - 1)
                        await self.span()
                        self._check_kept(after)
                    break
                records.append(record)
        except BaseException:
            self._discard(reader)
            raise
        if len(records) == len(entries):
            self._keep(reader, records[-1].sequence)
        else:
            self._discard(reader)
        return records

    async def _entries(self, after: int, limit: int) -> tuple[IndexReader, list[Entry]]:
        """Index entries from the first one after `after`, and the reader that gave them."""
        kept = self._replays.pop(after, None)
        if kept is not None:
            try:
                return kept, await kept.take(limit)
            except Unavailable:  # the broker has forgotten this reader, or lost it
                self._discard(kept)
            except BaseException:
                self._discard(kept)
                raise
        reader = await IndexReader.after(self._client, self._streams.index, after)
        try:
            return reader, await reader.take(limit)
        except BaseException:
            self._discard(reader)
            raise

    def _keep(self, reader: IndexReader, position: int) -> None:
        """Keeps a reader for whoever goes on after `position`, unless memory has what follows."""
        oldest = self._tail.oldest
        if position in self._replays or (oldest is not None and position >= oldest - 1):
            self._discard(reader)
            return
        self._replays[position] = reader
        if len(self._replays) > _REPLAYS:
            self._discard(self._replays.popitem(last=False)[1])

    def _discard(self, reader: IndexReader) -> None:
        chore = asyncio.create_task(reader.close())
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _find_oldest(self, first_index: int, first_block: int) -> None:
        """Moves `_removed_through` to the last record whose entry or content is gone."""
        low = max(self._removed_through, first_index - 1)
        if first_block > self._first_block:
            high, step = self._newest, 1
            while low < high:  # gallop from what was known, then bisect
                probe = min(low + step, high)
                if await self._content_is_kept(probe, first_block):
                    high, step = probe - 1, max(1, (probe - low) // 2)
                else:
                    low, step = probe, step * 2
            self._first_block = first_block
        self._forget_through(low)

    async def _content_is_kept(self, sequence: int, first_block: int) -> bool:
        with broker_errors(f"entry {sequence} cannot be read"):
            message = await message_or_none(self._js.get_msg(self._streams.index, seq=sequence))
        return message is not None and min(Place.from_bytes(message.data or b"").blocks) >= first_block

    def _forget_through(self, sequence: int) -> None:
        self._removed_through = max(self._removed_through, sequence)
        self._tail.forget_through(self._removed_through)

    def _check_kept(self, after: int) -> None:
        if after < self._removed_through:
            raise CursorExpired(
                f"the log keeps records from sequence {self._removed_through + 1} on, "
                f"asked for what follows {after}: resume from {self._removed_through} or later"
            )

    def _require_connection(self) -> None:
        """Fails at once where waiting would only take the caller's time."""
        if self._closed:
            raise Unavailable("the detection log is closed")
        if not self._client.is_connected:
            raise Unavailable("detection log: there is no connection to NATS; it is being made again")

    def _subject(self, name: FrameName) -> str:
        return subject_of(self._streams.frames_subject, name)


def _fail(batch: Iterable[_Append], error: Exception) -> None:
    failure = error if isinstance(error, Unavailable) else Unavailable(f"detection log: cannot be written: {error}")
    for request in batch:
        if not request.done.done():
            request.done.set_exception(failure)
