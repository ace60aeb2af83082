"""The way to the cloud: every frame of the spool is sent until its final acknowledgement is on the spool's disk.

The spool is the queue. What is kept here is only a cursor into it and the set of frames under way, so that all of it
may be lost at any moment:

    next_entries   frames after the cursor that are not under way      (moves the cursor)
    stream lost    cursor back before the oldest frame it carried      (they are sent again, in order)
    RETRY_LATER    pause, then cursor back to the start                (of one model, where only that is missing)
    lost too often sent alone, then given up as REJECTED               (`edge.suspects`)
    final ack      deleted from the spool, and after that COMMIT no longer under way

A frame may so be sent twice, never zero times; its name lets the cloud tell. One stream sends at a time. A cloud that
drains is left for the next stream before the old one is half-closed, so the uplink never stands still. Between
failures it waits, longer each time and never as long as its neighbours (jitter), because a cloud that comes back must
not meet all its edges at once. Each stream gets a channel of its own, so that certificates are read anew.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import grpc
from sightline.v1 import ingest_pb2

from edge.engine import Encoded
from edge.metrics import EdgeMetrics, ack_label
from edge.session import Session
from edge.spool import Spool
from edge.spool_rows import Entry, Final, FrameName, Outcome
from edge.suspects import ALONE_LOSSES, Suspects
from shared.errors import SightlineError, Unavailable
from shared.logs import facts

_log = logging.getLogger("sightline.edge.uplink")

CodeAgain = Callable[[FrameName, int], Awaitable[Encoded]]  # name, quality in steps of 1/256
BACKOFF_MIN_S = 0.2
MODEL_PAUSE_S = 10.0
LIVED_S = 10.0  # a stream that lived this long does not count as a failure when it ends


class Uplink:
    """See the head of this module. `open_channel` makes a new channel to the cloud and may raise SightlineError.
    `on_received` is told the bytes of each frame that the cloud has. `poison_after`: as in `edge.suspects`."""

    def __init__(
        self,
        spool: Spool,
        metrics: EdgeMetrics,
        open_channel: Callable[[], grpc.aio.Channel],
        *,
        edge_id: str,
        model_ids: Sequence[str],
        backoff_max_s: float,
        stall_s: float,
        poison_after: int,
        on_received: Callable[[int], None] | None = None,
    ) -> None:
        self.edge_id = edge_id
        self.boot_id = random.getrandbits(64)
        self.model_ids = list(model_ids)
        self.stall_s = stall_s
        self.code_again: CodeAgain | None = None  # set where originals are kept
        self._on_received = on_received
        self._spool = spool
        self._metrics = metrics
        self._open_channel = open_channel
        self._backoff_max_s = backoff_max_s
        self._cursor = 0
        self._under_way: set[int] = set()
        self._losses: dict[int, int] = {}
        self._suspects = Suspects(poison_after)
        self._alone: int | None = None  # while it is under way, nothing else is sent
        self._paused_until = 0.0
        self._models_paused: dict[str, float] = {}
        self._finals: list[Final] = []
        self._finals_came = asyncio.Event()
        self._current: Session | None = None
        self._running: dict[Session, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to connect and send."""
        self._tasks = [asyncio.create_task(self._connect_for_ever()), asyncio.create_task(self._finish_for_ever())]

    @property
    def connected(self) -> bool:
        """A stream is open that the cloud has welcomed."""
        return self._current is not None

    def speak_of(self, model_ids: Sequence[str]) -> None:
        """From the next stream on, which is opened now, the cloud hears of these bundles."""
        self.model_ids = list(model_ids)
        self.renew()

    def renew(self) -> None:
        """Goes on with a new channel, as when the cloud drains: the files that one is made of have changed."""
        for session in self._running:
            session.ask_to_drain()
        self.look_again_now()

    async def close(self, grace_s: float) -> None:
        """Sends nothing new, waits at most `grace_s` for acknowledgements of what is under way, and ends."""
        if self._tasks:
            self._tasks[0].cancel()
        for session in list(self._running):
            await session.half_close()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=grace_s)
        await self._finish()
        for task in (*self._running.values(), *self._tasks):
            task.cancel()
        await asyncio.gather(*self._running.values(), *self._tasks, return_exceptions=True)

    # -- streams -------------------------------------------------------------------------------------------------

    async def _connect_for_ever(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            session = await self._next_session()
            if session is not None:
                await asyncio.wait({session.draining, session.ended}, return_when=asyncio.FIRST_COMPLETED)
                if session.progressed or time.monotonic() - began > LIVED_S:
                    failures = 0
                    if session.draining.done():
                        continue  # at once: the next stream is opened before this one is half-closed
            await asyncio.sleep(pause_s(failures, self._backoff_max_s, random.uniform(0.5, 1.0)))  # noqa: S311
            failures += 1

    async def _next_session(self) -> Session | None:
        """A stream that was welcomed; None if that failed. Whatever came before it is half-closed after."""
        try:
            session = Session(self, self._open_channel())
        except SightlineError as error:  # files of a certificate that are not there yet
            _log.warning("the uplink cannot be opened", extra=facts(error=error))
            return None
        before = list(self._running)
        self._running[session] = asyncio.create_task(session.run())
        await asyncio.wait({session.welcomed, session.ended}, return_when=asyncio.FIRST_COMPLETED)
        for old in before:
            await old.half_close()
        if not session.welcomed.done():
            return None
        self._current = session
        self._tell()
        return session

    def on_ended(self, session: Session, reason: str) -> None:
        """A stream is over: what it still owed is sent again, in order."""
        self._running.pop(session, None)
        if self._current is session:
            self._current = None
        lost = [sent.id for sent in session.in_flight.values()]
        for frame_id in self._suspects.lost(reason, ((sent.id, sent.received) for sent in session.in_flight.values())):
            self._metrics.uplink_poison_frames.inc()
            _log.error("a frame is given up, the cloud falls over it", extra=facts(id=frame_id))
        for frame_id in lost:
            self._under_way.discard(frame_id)
            self._losses[frame_id] = self._losses.get(frame_id, 0) + 1
        if lost:
            self._cursor = min(self._cursor, min(lost) - 1)
        self._metrics.uplink_connects.labels(reason).inc()
        self._tell()
        self.look_again_now()

    def on_welcome(self, cloud_models: set[str]) -> None:
        """Holds back frames of models that this cloud does not have, for a while; it may load them."""
        for model_id in set(self.model_ids) - cloud_models:
            _log.warning("the cloud does not have a model that this edge encodes with", extra=facts(model=model_id))
            self._models_paused[model_id] = time.monotonic() + MODEL_PAUSE_S
        if self._models_paused.keys() & cloud_models:
            self._models_paused = {m: until for m, until in self._models_paused.items() if m not in cloud_models}
            self._cursor = 0

    # -- what is next --------------------------------------------------------------------------------------------

    async def next_entries(self, *, frames: int, max_bytes: int) -> list[Entry]:
        """The next frames to send, now under way; [] after something may have changed."""
        self._unpause()
        self._spool.arrived.clear()
        entries: list[Entry] = []
        if time.monotonic() >= self._paused_until:
            try:
                entries = await self._take(frames, max_bytes)
            except Unavailable as error:
                _log.warning("the spool cannot be read; trying again", extra=facts(error=error))
                self._paused_until = time.monotonic() + 1
        if not entries:
            await self.look_again()
        return entries

    async def _take(self, frames: int, max_bytes: int) -> list[Entry]:
        while True:
            cursor = self._cursor
            found = await self._spool.take(
                cursor, frames=frames, max_bytes=max_bytes, without_models=list(self._models_paused)
            )
            if self._cursor != cursor:  # moved back meanwhile
                continue
            if not found:
                return []
            entries = self._apart([entry for entry in found if entry.id not in self._under_way])
            if entries is None:
                return []
            self._cursor = entries[-1].id if entries else found[-1].id
            self._under_way.update(entry.id for entry in entries)
            if entries:
                self._tell()
                return entries

    def _apart(self, entries: list[Entry]) -> list[Entry] | None:
        """What may be sent now of entries that are next; None if something under way has to be answered first."""
        if self._alone in self._under_way:
            return None
        for i, entry in enumerate(entries):
            if not self._suspects.is_suspect(entry.id) or entry.bitstream is None:
                continue
            if i:
                return entries[:i]
            if self._suspects.is_given_up(entry.id):
                reason = f"the cloud was lost {ALONE_LOSSES} times while it worked on this frame alone"
                return [replace(entry, bitstream=None, outcome=Outcome.REJECTED, reason=reason)]
            if self._under_way:
                return None
            self._alone = entry.id
            return [entry]
        return entries

    async def look_again(self) -> None:
        """Waits until there may be something to send: a new frame, credit, the end of a pause."""
        pauses = [self._paused_until, *self._models_paused.values()]
        now = time.monotonic()
        pending = [pause - now for pause in pauses if pause > now]
        try:
            async with asyncio.timeout(min(pending) if pending else None):
                await self._spool.arrived.wait()
        except TimeoutError:
            return
        self._spool.arrived.clear()

    def look_again_now(self) -> None:
        """Wakes whoever waits in `look_again`."""
        self._spool.arrived.set()

    def _unpause(self) -> None:
        now = time.monotonic()
        over = [model_id for model_id, until in self._models_paused.items() if until <= now]
        for model_id in over:
            del self._models_paused[model_id]
            self._cursor = 0  # its frames were passed over

    def resends(self, frame_id: int) -> int:
        """How often a frame was under way on a stream that ended."""
        return self._losses.get(frame_id, 0)

    def on_received(self, size_bytes: int) -> None:
        """The cloud has a frame, not yet its result."""
        if self._on_received is not None:
            self._on_received(size_bytes)

    def waiting_for_link(self, spooled: int) -> int:
        """Of so many frames in the spool, those that the link keeps waiting. It does not where the cloud asked to wait,
        nor where the cloud gives no more credit and has most of what was sent: then only the rest of that counts."""
        sent = [sent.received for session in self._running for sent in session.in_flight.values()]
        received = sum(sent)
        no_credit = self._current is not None and self._current.without_credit and 2 * received >= len(sent)
        if no_credit or time.monotonic() < self._paused_until:
            return len(sent) - received
        return max(0, spooled - received)

    def on_sent(self, size_bytes: int) -> None:
        self._metrics.uplink_sent_frames.inc()
        self._metrics.uplink_sent_bytes.inc(size_bytes)

    # -- acknowledgements ----------------------------------------------------------------------------------------

    def on_ack(self, ack: ingest_pb2.FrameAck) -> None:
        kind = ack_label(ingest_pb2.AckState, ack.state, "ACK_STATE_")
        reason = ack_label(ingest_pb2.RejectReason, ack.reject_reason, "REJECT_REASON_") if ack.reject_reason else ""
        if ack.retry_reason:
            reason = ack_label(ingest_pb2.RetryReason, ack.retry_reason, "RETRY_REASON_")
        self._metrics.uplink_acks.labels(kind, reason).inc()

    def on_retry_later(self, frame_id: int, missing_model_id: str, after_s: float, detail: str) -> None:
        """Pauses: one model's frames where the cloud misses that model, else all, since order matters."""
        self._under_way.discard(frame_id)
        self._cursor = min(self._cursor, frame_id - 1)
        if missing_model_id:
            self._models_paused[missing_model_id] = time.monotonic() + max(after_s, MODEL_PAUSE_S)
        else:
            self._paused_until = max(self._paused_until, time.monotonic() + max(after_s, BACKOFF_MIN_S))
        _log.info("the cloud wants a frame later", extra=facts(after_s=after_s, reason=detail))
        self._tell()
        self.look_again_now()

    def on_final(self, final: Final) -> None:
        """The cloud has the frame's end on its disk; it leaves the spool."""
        self._finals.append(final)
        self._finals_came.set()

    async def _finish_for_ever(self) -> None:
        while True:
            await self._finals_came.wait()
            await self._finish()

    async def _finish(self) -> None:
        """One commit for all acknowledgements that came during the one before."""
        self._finals_came.clear()
        finals, self._finals = self._finals, []
        if not finals:
            return
        try:
            await self._spool.finish(finals)
        except Unavailable as error:
            # The frames stay in the spool, are sent again, and the cloud answers that it has them.
            _log.warning("acknowledgements could not be written", extra=facts(frames=len(finals), error=error))
            self._cursor = 0
            self._paused_until = time.monotonic() + 1
        apart = len(self._suspects) > 0
        for final in finals:
            self._under_way.discard(final.id)
            self._losses.pop(final.id, None)
            self._suspects.forget(final.id)
        self._tell()
        if apart:
            self.look_again_now()  # something may have waited for these to be answered

    def _tell(self) -> None:
        self._metrics.uplink_connected.set(self._current is not None)
        self._metrics.uplink_in_flight_frames.set(len(self._under_way))


def pause_s(failures: int, longest_s: float, jitter: float) -> float:
    """Seconds to wait after so many failures in a row: doubling up to the longest, times `jitter` in [0.5, 1]."""
    return float(jitter * min(longest_s, BACKOFF_MIN_S * 2.0 ** min(failures, 16)))
