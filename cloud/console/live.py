"""The live wall: follows the log while somebody watches, and tells each watcher what changed, a few times a second.

    first watcher --> follow: fold the last minutes of the log, then its news --> version rises --> watchers
    last watcher gone, `_LINGER_S` later --> the wall is forgotten

A watcher is told of cameras, not of events: however many frames passed since it was told last, it gets each camera's
state once, so a slow browser sees fewer updates and holds nothing up. A camera's JSON is made once for all watchers.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from cloud.console.pictures import Pictures
from cloud.console.wall import WINDOW_S, Wall
from cloud.detections.log import DetectionLog
from shared.errors import CursorExpired, Unavailable

_log = logging.getLogger("sightline.cloud.console")
TELL_S = 0.4  # between two messages to a watcher
_QUIET_S = 10.0  # a comment is sent after this long without one, so that both ends notice a dead connection
_LINGER_S = 20.0  # reloading a page does not fold the history again
_READ_RECORDS = 256
_MAX_HISTORY = 50_000  # records folded at the start
_RETRY_S = 2.0


class Live:
    """Belongs to one event loop; `close` ends every watch."""

    def __init__(self, log: DetectionLog, pictures: Pictures) -> None:
        self._log = log
        self._pictures = pictures
        self._wall = Wall(pictures.has)
        self._watchers = 0
        self._following: asyncio.Task[None] | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._caught_up = asyncio.Event()
        self._news = asyncio.Event()
        self._closed = False

    @property
    def watchers(self) -> int:
        return self._watchers

    async def watch(self, may_see: Callable[[str], bool]) -> AsyncIterator[str]:
        """Server-sent events: `wall`, everything, then `news`, what changed. Ends at `close`, or by an exception of
        `may_see`, which is asked for each camera each time."""
        self._enter()
        try:
            yield "retry: 1000\n\n"
            await self._caught_up.wait()
            seen = self._wall.version
            yield _message("wall", self._wall.whole(may_see))
            told_s = time.monotonic()
            while not self._closed:
                news = self._news
                if self._wall.version == seen:
                    try:
                        async with asyncio.timeout(_QUIET_S):
                            await news.wait()
                    except TimeoutError:
                        yield ": quiet\n\n"
                        continue
                await asyncio.sleep(max(0.0, told_s + TELL_S - time.monotonic()))
                since, seen = seen, self._wall.version
                told_s = time.monotonic()
                if text := self._wall.news(since, may_see):
                    yield _message("news", text)
        finally:
            self._leave()

    async def close(self) -> None:
        self._closed = True
        self._caught_up.set()
        self._tell()
        if self._leaving is not None:
            self._leaving.cancel()
        await self._stop_following()

    def _enter(self) -> None:
        self._watchers += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self._following is None and not self._closed:
            self._following = asyncio.create_task(self._follow())

    def _leave(self) -> None:
        self._watchers -= 1
        if self._watchers or self._closed:
            return
        self._pictures.stop_looking()
        self._leaving = asyncio.get_running_loop().call_later(_LINGER_S, self._forget)

    def _forget(self) -> None:
        self._leaving = None
        if self._following is not None:
            self._following.cancel()
            self._following = None
        self._caught_up.clear()
        self._wall = Wall(self._pictures.has)

    async def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    def _tell(self) -> None:
        """Wakes every watcher."""
        self._news.set()
        self._news = asyncio.Event()

    async def _follow(self) -> None:
        wall = self._wall
        while True:
            try:
                await self._fold_history(wall)
                self._caught_up.set()
                while True:
                    records = await self._log.read(wall.version, _READ_RECORDS)
                    if not records:
                        await self._log.wait_beyond(wall.version)
                        continue
                    wall.fold(records)
                    self._tell()
                    await asyncio.sleep(0)  # reading from memory never yields
            except (CursorExpired, Unavailable) as error:
                _log.warning("the console cannot follow the log and tries again: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _fold_history(self, wall: Wall) -> None:
        span = await self._log.span()
        start = await self._log.position_at(time.time_ns() - WINDOW_S * 1_000_000_000)
        position = max(wall.version, start, span.newest - _MAX_HISTORY, span.oldest - 1)
        wall.version = position
        while records := await self._log.read(wall.version, _READ_RECORDS):
            await asyncio.to_thread(wall.fold, records)
            if wall.version >= span.newest:
                return


def _message(event: str, data: str) -> str:
    return f"event: {event}\ndata: {data}\n\n"
