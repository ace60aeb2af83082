"""A camera's loop: read, thin, gate, wait in a bounded mailbox, send; over a source and an edge that come and go.

    reader thread     source -> frame rate -> motion gate -> mailbox
    sender threads                                            mailbox -> RGB at size -> Compress

Memory is bounded by the mailbox and the senders. When the edge is slower than the camera, a live source's oldest
picture gives way to the newest (and is counted); a file waits instead. When a live source is lost it is opened again
with pauses that double; when the edge is away its pictures are tried again until it answers.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from av.video.reformatter import VideoReformatter

from edge.motion import MotionGate
from edge.sources import Grab, NotThere, Reading, Source, read, to_rgb
from shared.clients import CameraClient, Receipt, Retry
from shared.clients.retry import Attempts
from shared.errors import InvalidInput, SightlineError, Unavailable

RECONNECT = Retry(first_s=0.25, max_s=10.0, give_up_s=None)
_RECENT_S = 5.0
_FINISH_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a source. `fps`: at most so many pictures a second, None: all. `largest`: (width, height) in
    pixels to fit into. `motion`: share of the picture that must change, 0: no gate; `refresh_s` as in MotionGate.
    `window`: pictures under way to the edge at once; `waiting`: pictures that may wait for that."""

    source: Source
    reading: Reading
    loop: bool = False
    fps: float | None = None
    largest: tuple[int, int] | None = None
    motion: float = 0.0
    refresh_s: float = 10.0
    window: int = 4
    waiting: int = 8


@dataclass(frozen=True, slots=True)
class Counts:
    """Pictures since the start, by what became of them; `thinned` by the frame rate, `unchanged` at the motion gate,
    `dropped` because the edge was slower. `reconnects` of the source."""

    read: int = 0
    thinned: int = 0
    unchanged: int = 0
    dropped: int = 0
    sent: int = 0
    failed: int = 0
    sent_bytes: int = 0
    reconnects: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """How it goes. Rates over the last 5 s; `latency_ms`: median from the picture's capture to its receipt; `away` and
    `edge_away`: why the source or the edge is not there now, empty if it is. `quality` is that of the last receipt,
    None before the first."""

    counts: Counts
    fps: float
    kbit_s: float
    quality: float | None
    waiting: int
    latency_ms: float | None
    away: str
    edge_away: str = ""


class Mailbox:
    """A bounded queue between the reader and the senders. `drops`: a full one gives up its oldest, else it blocks."""

    def __init__(self, limit: int, *, drops: bool) -> None:
        self._limit = limit
        self._drops = drops
        self._items: deque[Grab] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Grab) -> int:
        """How many gave way for it. What comes after `close` is let go."""
        with self._changed:
            self._changed.wait_for(lambda: self._drops or self._closed or len(self._items) < self._limit)
            if self._closed:
                return 0
            dropped = 0
            while len(self._items) >= self._limit:
                self._items.popleft()
                dropped += 1
            self._items.append(item)
            self._changed.notify_all()
            return dropped

    def take(self) -> Grab | None:
        """The oldest; None once it is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            item = self._items.popleft() if self._items else None
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more will come; what is in it can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._items)


class Thinner:
    """Takes at most `fps` pictures a second by the source's clock, evenly; None: all."""

    def __init__(self, fps: float | None) -> None:
        self._step_s = 0.0 if fps is None else 1.0 / fps
        self._due_s = float("-inf")

    def takes(self, time_s: float) -> bool:
        # A little early counts as due, or a camera's jitter would halve its rate.
        if time_s < self._due_s - 0.1 * self._step_s:
            return False
        late = time_s > self._due_s + self._step_s
        self._due_s = (time_s if late else self._due_s) + self._step_s
        return True


class Capture:
    """See the head of this module. `run` once. `client` retries without end (Retry(give_up_s=None)) and is closed here.

    `on_receipt` and `on_failure` are called from the senders' threads."""

    def __init__(
        self,
        plan: Plan,
        client: CameraClient,
        *,
        on_receipt: Callable[[Grab, Receipt], None] = lambda _grab, _receipt: None,
        on_failure: Callable[[SightlineError], None] = lambda _error: None,
    ) -> None:
        self._plan = plan
        self._client = client
        client.on_retry = self._retried
        self._on_receipt = on_receipt
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._start_s = time.monotonic()
        live = plan.source.live or plan.reading.realtime
        self._mailbox = Mailbox(plan.waiting, drops=live)
        self._lock = threading.Lock()  # of all below
        self._counts = Counts()
        self._recent: deque[tuple[float, int, float]] = deque()  # end by time.monotonic, bytes, latency ms
        self._quality: float | None = None
        self._away = ""
        self._edge_away = ""
        self._fatal: SightlineError | None = None

    def stop(self) -> None:
        """Reads no more; what was read is sent within 5 s or given up. From any thread."""
        self._stop.set()

    def run(self) -> Counts:
        """Until the source ends or `stop`. Raises what makes going on pointless: an address that is none, a file that
        cannot be read, or an edge that refuses the first picture."""
        senders = [threading.Thread(target=self._send_all, name=f"sender-{i}") for i in range(self._plan.window)]
        for sender in senders:
            sender.start()
        try:
            self._read_all()
        finally:
            self._mailbox.close()
            self._finish(senders)
        if self._fatal is not None:
            raise self._fatal
        return self._counts

    def status(self) -> Status:
        now = time.monotonic()
        over_s = max(0.1, min(_RECENT_S, now - self._start_s))
        with self._lock:
            while self._recent and self._recent[0][0] < now - _RECENT_S:
                self._recent.popleft()
            recent = list(self._recent)
            return Status(
                counts=self._counts,
                fps=len(recent) / over_s,
                kbit_s=sum(size for _, size, _ in recent) * 8 / 1000 / over_s,
                quality=self._quality,
                waiting=len(self._mailbox),
                latency_ms=median(latency for _, _, latency in recent) if recent else None,
                away=self._away,
                edge_away=self._edge_away,
            )

    # -- reading -------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        attempts = Attempts(RECONNECT)
        while not self._stop.is_set():
            before = self._counts.read
            try:
                self._read_once(attempts)
            except Unavailable as error:
                if isinstance(error, NotThere) and self._counts.read == 0:
                    raise
                self._pause(error, attempts)
                continue
            if not self._plan.loop:
                return
            if self._counts.read == before and not self._stop.is_set():
                raise InvalidInput(f"{self._plan.source.shown} holds no picture")

    def _read_once(self, attempts: Attempts) -> None:
        plan = self._plan
        gate = MotionGate(plan.motion, plan.refresh_s) if plan.motion > 0 else None
        thinner = Thinner(plan.fps)
        for grab in read(plan.source, plan.reading, self._stop):
            if self._away:
                self._back()
            attempts.succeeded()
            self._count(read=1)
            if not thinner.takes(grab.time_s):
                self._count(thinned=1)
                continue
            if gate is not None and not gate.opens(grab.frame, grab.time_s):
                self._count(unchanged=1)
                continue
            self._count(dropped=self._mailbox.put(grab))

    def _pause(self, error: Unavailable, attempts: Attempts) -> None:
        pause_s = attempts.failed(error)
        with self._lock:
            self._away = str(error)
        self._stop.wait(pause_s)

    def _back(self) -> None:
        with self._lock:
            self._away = ""
            if self._counts.read:
                self._counts = replace(self._counts, reconnects=self._counts.reconnects + 1)

    # -- sending -------------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        scaler = VideoReformatter()  # keeps its tables from picture to picture; not for two threads
        while (grab := self._mailbox.take()) is not None:
            try:
                receipt = self._client.compress(
                    to_rgb(grab.frame, scaler, self._plan.largest), capture_time=grab.captured
                )
            except SightlineError as error:
                self._failed(error)
            else:
                self._sent(grab, receipt)

    def _sent(self, grab: Grab, receipt: Receipt) -> None:
        latency_ms = 1000 * (time.time() - grab.captured.timestamp())
        with self._lock:
            self._recent.append((time.monotonic(), receipt.coded_bytes, latency_ms))
            self._quality = receipt.quality
            self._edge_away = ""
        self._count(sent=1, sent_bytes=receipt.coded_bytes)
        self._on_receipt(grab, receipt)

    def _retried(self, error: SightlineError) -> None:
        with self._lock:
            self._edge_away = str(error)

    def _failed(self, error: SightlineError) -> None:
        if self._stop.is_set():
            self._count(dropped=1)
            return
        self._count(failed=1)
        if self._counts.sent == 0:
            # Nothing was ever taken: a wrong model, a picture too large, a camera that may not send.
            self._fatal = error
            self._stop.set()
        else:
            self._on_failure(error)

    def _finish(self, senders: list[threading.Thread]) -> None:
        """Waits for the senders: as long as it takes at a source's end, 5 s after `stop`."""
        for sender in senders:
            while sender.is_alive() and not self._stop.is_set():
                sender.join(0.2)
        deadline_s = time.monotonic() + _FINISH_S
        for sender in senders:
            sender.join(max(0.0, deadline_s - time.monotonic()))
        self._client.close()
        for sender in senders:
            sender.join()

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._counts = replace(
                self._counts, **{name: getattr(self._counts, name) + change for name, change in changes.items()}
            )
