"""Pictures for people: what the networks looked at, as JPEG, made off the event loop and only where somebody looks.

    pipeline --see--> somebody looks at this camera? --> thread: scale, JPEG --> cache (bounded) --get--> browser
    get, not cached --> kept bitstream --> decoded again --> thread --> cache

A camera is looked at while a browser asks for its pictures, and for `_LOOKING_S` after. Its frames are then turned into
pictures as they pass, a few a second, while the decoded frame is at hand; nothing is decoded twice for a live wall. For
a camera that nobody looks at, `see` is one look into a dictionary.
"""

import asyncio
import io
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from cloud.detections.log import FrameName
from shared.codec.types import Frame

_LOOKING_S = 6.0
_REFRESH_S = 0.35  # between two pictures of one camera
_MAX_WAITING = 32  # pictures; a live wall skips a picture where the thread does not keep up
_JPEG_QUALITY = 86
Decode = Callable[[FrameName], Awaitable[Frame | None]]


@dataclass(frozen=True, slots=True)
class _Picture:
    """`side`: what its longest side was bounded by, pixels."""

    side: int
    jpeg: bytes


@dataclass(slots=True)
class _Looking:
    """At one camera: until when (monotonic seconds), how large, and when the next picture is due."""

    until_s: float
    side: int
    due_s: float = 0.0


class Pictures:
    """`decode` gives a frame's picture from what was kept, None where it was not. `max_bytes`: of the cache."""

    def __init__(self, decode: Decode, *, max_bytes: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._decode = decode
        self._max_bytes = max_bytes
        self._clock_s = clock_s
        self._looking: dict[str, _Looking] = {}
        self._cache: OrderedDict[FrameName, _Picture] = OrderedDict()
        self._cache_bytes = 0
        self._under_way: dict[tuple[FrameName, int], asyncio.Future[_Picture | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="console-pictures")
        self.made = 0

    def see(self, name: FrameName, frame: Frame) -> None:
        """Takes a frame that the networks have looked at. On the event loop; returns at once."""
        looking = self._looking.get(name.camera)
        if looking is None:
            return
        now_s = self._clock_s()
        if now_s > looking.until_s:
            del self._looking[name.camera]
        elif now_s >= looking.due_s and len(self._under_way) < _MAX_WAITING:
            looking.due_s = now_s + _REFRESH_S
            self._start(name, looking.side, self._encode(frame, looking.side))

    def has(self, name: FrameName) -> bool:
        """Whether the picture is at hand, or about to be."""
        return name in self._cache or any(name == each for each, _ in self._under_way)

    def stop_looking(self) -> None:
        """Nobody is there any more."""
        self._looking.clear()

    async def get(self, name: FrameName, side: int) -> bytes | None:
        """A JPEG whose longest side is at most `side` pixels, perhaps more where a larger one is at hand.

        None if the frame is not kept. Raises what decoding raises.
        """
        now_s = self._clock_s()
        looking = self._looking.setdefault(name.camera, _Looking(0.0, side))
        looking.side = side if now_s > looking.until_s else max(side, looking.side)
        looking.until_s = now_s + _LOOKING_S
        cached = self._cache.get(name)
        if cached is not None and cached.side >= side:
            self._cache.move_to_end(name)
            return cached.jpeg
        for (each, at), making in self._under_way.items():
            if each == name and at >= side:
                picture = await asyncio.shield(making)
                return None if picture is None else picture.jpeg
        picture = await asyncio.shield(self._start(name, side, self._decode_and_encode(name, side)))
        return None if picture is None else picture.jpeg

    async def close(self) -> None:
        for making in list(self._under_way.values()):
            making.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _start(
        self, name: FrameName, side: int, making: Awaitable[_Picture | None]
    ) -> "asyncio.Future[_Picture | None]":
        task = asyncio.ensure_future(making)
        key = (name, side)
        self._under_way[key] = task

        def done(finished: "asyncio.Future[_Picture | None]") -> None:
            self._under_way.pop(key, None)
            if not finished.cancelled() and finished.exception() is None:
                self._keep(name, finished.result())

        task.add_done_callback(done)
        return task

    async def _decode_and_encode(self, name: FrameName, side: int) -> _Picture | None:
        frame = await self._decode(name)
        return None if frame is None else await self._encode(frame, side)

    async def _encode(self, frame: Frame, side: int) -> _Picture:
        self.made += 1
        jpeg = await asyncio.get_running_loop().run_in_executor(self._thread, to_jpeg, frame, side)
        return _Picture(side, jpeg)

    def _keep(self, name: FrameName, picture: _Picture | None) -> None:
        if picture is None:
            return
        before = self._cache.pop(name, None)
        if before is not None:
            self._cache_bytes -= len(before.jpeg)
        self._cache[name] = picture
        self._cache_bytes += len(picture.jpeg)
        while self._cache_bytes > self._max_bytes and self._cache:
            self._cache_bytes -= len(self._cache.popitem(last=False)[1].jpeg)


def to_jpeg(frame: Frame, side: int) -> bytes:
    """`frame` with its longest side at most `side` pixels."""
    image = Image.fromarray(frame.rgb)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()
