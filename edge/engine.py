"""The encoder: pictures in, bitstreams out, every stage on its own threads so that they overlap.

    admit -> image threads: decode -> [waiting] -> transform lanes: analyse a batch each -> pack threads: rANS

The event loop only hands over. What waits for a transform when a lane becomes free goes together, as far as size,
quality and model agree: under light load a frame never waits for company, under heavy load batches form by
themselves. On a CPU several lanes, frames side by side on a core each, bring more than one frame on all cores. Memory
is bounded by admission: a picture is let in by the bytes of its RGB form before anything is decoded, and refused
(Overloaded) or made to wait where there is no room.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from edge import images
from edge.images import ImageFile, RawPicture
from shared.codec.types import QUALITY_STEP, Bitstream, Frame, Symbols
from shared.errors import Overloaded, SightlineError


class FrameEncoder(Protocol):
    """What the engine needs of `shared.codec.codec.Codec`."""

    def analyse(self, frames: Sequence[Frame], quality: float = ...) -> list[Symbols]: ...
    def pack(self, symbols: Symbols) -> Bitstream: ...
    def encode_to_size(self, frame: Frame, target_bytes: int) -> Bitstream: ...


@dataclass(frozen=True, slots=True)
class Rate:
    """How many bytes to spend: a quality in [1, 8], or the bytes that the file form may have.

    `lowest` and `highest`: qualities that the search for `target_bytes` is held to, whatever it finds.
    """

    quality: float = 0.0
    target_bytes: int = 0
    lowest: float = 1.0
    highest: float = 8.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A coded frame and where its time went, in seconds. `analyse_s` is its whole batch's; of `batch_frames` frames."""

    bitstream: Bitstream
    image_s: float
    queue_s: float
    analyse_s: float
    pack_s: float
    batch_frames: int


@dataclass(slots=True)
class _Job:
    model_id: str
    rate: Rate
    frame: Frame
    done: "asyncio.Future[tuple[Symbols | Bitstream, float, float, int]]"
    queued: float = field(default_factory=time.perf_counter)

    @property
    def key(self) -> tuple[str, Rate, int, int]:
        return self.model_id, self.rate, self.frame.height, self.frame.width


class Engine:
    """See the head of this module. Belongs to one event loop; `encoders` by model id."""

    def __init__(
        self,
        encoders: Mapping[str, FrameEncoder],
        *,
        in_flight_max_bytes: int,
        batch_frames: int,
        batch_pixels: int,
        lanes: int,
        workers: int,
    ) -> None:
        self._encoders = encoders
        self._max_bytes = in_flight_max_bytes
        self._batch_frames = batch_frames
        self._batch_pixels = batch_pixels
        self.in_flight_bytes = 0
        self._room = asyncio.Condition()
        self._waiting: deque[_Job] = deque()
        self._work = asyncio.Event()
        self._image_threads = ThreadPoolExecutor(workers, "image")
        self._transform_threads = ThreadPoolExecutor(lanes, "transform")
        self._pack_threads = ThreadPoolExecutor(workers, "pack")
        self._lanes = [asyncio.create_task(self._transform()) for _ in range(lanes)]

    @asynccontextmanager
    async def admitted(self, picture: ImageFile | RawPicture, *, wait: bool) -> AsyncIterator[None]:
        """Room for one picture. With `wait` it waits for it, else it raises Overloaded where there is none."""
        cost = 3 * picture.width * picture.height + len(picture.data)
        async with self._room:
            if not wait and not self._fits(cost):
                raise Overloaded(
                    f"expected room for {cost} bytes of picture, {self.in_flight_bytes} of {self._max_bytes} are in "
                    "work; try again later"
                )
            await self._room.wait_for(lambda: self._fits(cost))
            self.in_flight_bytes += cost
        try:
            yield
        finally:
            self.in_flight_bytes -= cost
            async with self._room:
                self._room.notify_all()

    async def encode(self, picture: ImageFile | RawPicture, model_id: str, rate: Rate) -> Encoded:
        """Decodes and codes an admitted picture. Raises InvalidImage, InvalidQuality, NumericalError."""
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        frame = await loop.run_in_executor(self._image_threads, images.decode, picture)
        image_s = time.perf_counter() - start
        job = _Job(model_id, rate, frame, loop.create_future())
        self._waiting.append(job)
        self._work.set()
        coded, queue_s, analyse_s, batch_frames = await job.done
        start = time.perf_counter()
        if isinstance(coded, Symbols):
            coded = await loop.run_in_executor(self._pack_threads, self._encoders[model_id].pack, coded)
        return Encoded(coded, image_s, queue_s, analyse_s, time.perf_counter() - start, batch_frames)

    async def close(self) -> None:
        """Ends the threads; what still waits is cancelled."""
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        for job in self._waiting:
            job.done.cancel()
        for threads in (self._image_threads, self._transform_threads, self._pack_threads):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)

    def _fits(self, cost: int) -> bool:
        return self.in_flight_bytes == 0 or self.in_flight_bytes + cost <= self._max_bytes

    async def _transform(self) -> None:
        while True:
            await self._work.wait()
            batch = self._next_batch()
            if not batch:
                self._work.clear()
                continue
            await self._run(batch)

    async def _run(self, batch: list[_Job]) -> None:
        start = time.perf_counter()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._transform_threads, self._code, batch)
        except Exception as error:
            if len(batch) > 1 and isinstance(error, SightlineError):  # one frame's fault is not its neighbours'
                for job in batch:
                    await self._run([job])
                return
            for job in batch:
                if not job.done.done():
                    job.done.set_exception(error)
            return
        analyse_s = time.perf_counter() - start
        for job, result in zip(batch, results, strict=True):
            if not job.done.done():
                job.done.set_result((result, start - job.queued, analyse_s, len(batch)))

    def _code(self, batch: list[_Job]) -> Sequence[Symbols | Bitstream]:
        """On a transform thread."""
        encoder, rate = self._encoders[batch[0].model_id], batch[0].rate
        if rate.target_bytes:
            found = encoder.encode_to_size(batch[0].frame, rate.target_bytes)
            quality = min(max(found.quality / QUALITY_STEP, rate.lowest), rate.highest)
            if quality == found.quality / QUALITY_STEP:
                return [found]
            return encoder.analyse([batch[0].frame], quality)
        return encoder.analyse([job.frame for job in batch], rate.quality)

    def _next_batch(self) -> list[_Job]:
        """The longest waiting frame and those that can go with it; the others keep their places."""
        while self._waiting and self._waiting[0].done.done():  # its caller went away
            self._waiting.popleft()
        if not self._waiting:
            return []
        first = self._waiting[0]
        room = max(1, min(self._batch_frames, self._batch_pixels // (first.frame.height * first.frame.width)))
        room = 1 if first.rate.target_bytes else room  # a search for one frame's size has nothing to share
        batch: list[_Job] = []
        others: deque[_Job] = deque()
        for job in self._waiting:
            if len(batch) < room and job.key == first.key:
                batch.append(job)
            else:
                others.append(job)
        self._waiting = others
        return batch
