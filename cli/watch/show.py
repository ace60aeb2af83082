"""Events for eyes and for pipes: a table that lives on the terminal, or one line of JSON each."""

import json
from collections import Counter, deque
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cli.watch.rows import as_json, counted

if TYPE_CHECKING:
    from rich.table import Table

    from shared.clients import DetectionEvent

KEPT = 200
TITLE_CAMERAS = 6


class View(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def add(self, event: "DetectionEvent") -> None: ...


class JsonLines:
    """One JSON object a line on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, event: "DetectionEvent") -> None:
        print(json.dumps(as_json(event)), flush=True)


class Silent(JsonLines):
    """Nothing: the events go into a file or to a program."""

    def add(self, event: "DetectionEvent") -> None:
        pass


class LiveTable:
    """The newest events, as many as the terminal has rows for, redrawn four times a second. What scores less than
    `min_score` is not told."""

    def __init__(self, min_score: float) -> None:
        from rich.console import Console
        from rich.live import Live

        self._min_score = min_score
        self._console = Console()
        self._events: deque[DetectionEvent] = deque(maxlen=KEPT)
        self._cameras: Counter[str] = Counter()
        self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def add(self, event: "DetectionEvent") -> None:
        self._events.append(event)
        self._cameras[event.frame.camera_id] += 1

    def table(self) -> "Table":
        from rich import box
        from rich.table import Table

        rows = max(1, self._console.height - 6)
        table = Table(box=box.SIMPLE_HEAD, title=self._title(), title_justify="left")
        table.add_column("captured", no_wrap=True)
        table.add_column("camera", style="bold")
        for name in ("frame", "kB", "quality", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("found")
        for event in list(self._events)[-rows:]:
            taken, stored = event.capture_time, event.persisted_time
            table.add_row(
                f"{taken.astimezone():%H:%M:%S}.{taken.microsecond // 100_000}" if taken else "",
                event.frame.camera_id,
                str(event.frame.seq),
                f"{event.payload_bytes / 1000:.1f}",
                f"{event.quality:.2f}",
                f"{(stored - taken).total_seconds():.2f}" if taken and stored else "",
                counted(event, self._min_score) or (f"{event.outcome.value}: {event.reason}" if event.reason else "-"),
            )
        return table

    def _title(self) -> str:
        shown = self._cameras.most_common(TITLE_CAMERAS)
        more = len(self._cameras) - len(shown)
        names = ", ".join(f"{name} {number}" for name, number in shown)
        return f"{self._cameras.total()} events: {names}{f' and {more} cameras more' if more > 0 else ''}"
