"""Dynamic batching across cameras: fuller batches under load, no waiting when idle, fair between cameras.

    submit --> waits, by camera and shape --> batch of one shape --> run, `lanes` batches at a time

* A frame that finds all lanes idle is run at once, alone. While batches run, others gather; when a lane is free, the
  next batch is taken from what waits, and held for at most `max_delay_s` after its oldest frame came if it is not
  full. Mostly the oldest has waited longer than that by then, so the hold costs nothing. A second lane lets entropy
  decoding of one batch overlap with the networks of the one before.
* Fair: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over cameras. A frame's start tag is the later of
  the virtual time (the tag last served) and the end of its camera's previous frame (that one's tag plus its cost). The
  smallest tag is served next, its shape decides the batch, and the batch is filled by rising tag. A camera that sends
  ten times as much waits behind its own frames. With equal costs this is round robin; the pipeline counts cost in
  pixels, so that big frames do not crowd out small ones.
* Bounded: `max_waiting` frames over all cameras, and at most a share of them for one camera, then Overloaded.
* `run` answers each frame with a result or an exception. If it raises, the batch is run again one by one, so that a
  frame that cannot be run fails alone.
"""

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from shared.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

_REMEMBERED_CAMERAS = 65_536  # past it, cameras with nothing waiting are forgotten, whatever they used


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_batch`: frames in one run. `max_delay_s`: how long a batch that is not full may be held for more.

    `max_waiting`: frames that may wait in all. `max_waiting_camera`: of them, how many of one camera.
    `lanes`: batches that may be under way at once. `max_cost`: of one batch in all; a dearer frame runs alone.
    """

    max_batch: int
    max_delay_s: float
    max_waiting: int
    max_waiting_camera: int
    lanes: int = 1
    max_cost: float = math.inf


@dataclass(frozen=True, slots=True)
class Batched(Generic[Result]):
    """A result, with how long its frame waited (s) and how many frames were run together."""

    result: Result
    queue_s: float
    batch_size: int


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    camera: str
    cost: float
    came_s: float
    met_idle: bool  # nothing ran when it came
    done: "asyncio.Future[Batched[Result]]"


class Batcher(Generic[Item, Result]):
    """Runs `run` over items in batches of one shape. Belongs to one event loop; `start` and `close` it there."""

    def __init__(
        self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]], limits: BatchLimits
    ) -> None:
        self._run = run
        self._limits = limits
        # Per shape, a heap by tag. Ties go to who came first.
        self._heaps: dict[Hashable, list[tuple[float, int, _Waiting[Item, Result]]]] = {}
        self._count = itertools.count()
        self._virtual_time = 0.0
        self._ends: dict[str, float] = {}  # by camera, the end of its last frame in virtual time
        self._waiting_of: dict[str, int] = {}
        self._waiting = 0
        self._came = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._under_way = 0  # batches in `run`
        self._free_lanes = asyncio.Semaphore(limits.lanes)
        self._running: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Frames that wait for a batch."""
        return self._waiting

    def start(self) -> None:
        self._runner = asyncio.create_task(self._run_batches(), name="batcher")

    async def close(self) -> None:
        """Stops at once; what still waits is cancelled."""
        tasks = [*self._running, *([self._runner] if self._runner else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for heap in self._heaps.values():
            for _, _, waiting in heap:
                waiting.done.cancel()
        self._heaps.clear()

    async def submit(self, camera: str, shape: Hashable, item: Item, cost: float = 1.0) -> Batched[Result]:
        """Runs `item` with others of its `shape`. Raises Overloaded if there is no room, or what running it raised."""
        if self._waiting >= self._limits.max_waiting:
            raise Overloaded(f"{self._waiting} frames wait to be decoded, the limit is {self._limits.max_waiting}")
        mine = self._waiting_of.get(camera, 0)
        if mine >= self._limits.max_waiting_camera:
            raise Overloaded(
                f"{mine} frames of camera {camera} wait to be decoded, "
                f"the limit for one camera is {self._limits.max_waiting_camera}"
            )
        waiting: _Waiting[Item, Result] = _Waiting(
            item, camera, cost, time.monotonic(), self._under_way == 0, asyncio.get_running_loop().create_future()
        )
        tag = max(self._virtual_time, self._ends.get(camera, 0.0))
        self._ends[camera] = tag + cost
        self._waiting_of[camera] = mine + 1
        self._waiting += 1
        heapq.heappush(self._heaps.setdefault(shape, []), (tag, next(self._count), waiting))
        self._came.set()
        return await waiting.done

    async def _run_batches(self) -> None:
        while True:
            await self._free_lanes.acquire()
            if not self._waiting:
                await self._next_arrival()
            shape = min(self._heaps, key=lambda shape: self._heaps[shape][0][:2])
            await self._hold(shape)
            batch = self._take(shape)
            if not batch:
                self._free_lanes.release()
                continue
            task = asyncio.create_task(self._run_batch(batch))
            self._running.add(task)
            task.add_done_callback(self._end_lane)

    def _end_lane(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._free_lanes.release()

    async def _next_arrival(self) -> None:
        self._came.clear()
        while not self._waiting:
            if not self._under_way:  # idle: nobody is behind anybody
                self._ends.clear()
                self._virtual_time = 0.0
            await self._came.wait()
            self._came.clear()

    async def _hold(self, shape: Hashable) -> None:
        """Lets a batch that came together while others ran fill up, until its oldest frame has waited max_delay_s."""
        heap = self._heaps[shape]
        deadline = min(waiting.came_s for _, _, waiting in heap) + self._limits.max_delay_s
        while self._has_room(heap) and not any(waiting.met_idle for _, _, waiting in heap):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._came.clear()
            try:
                async with asyncio.timeout(left):
                    await self._came.wait()
            except TimeoutError:
                return

    def _has_room(self, heap: list[tuple[float, int, _Waiting[Item, Result]]]) -> bool:
        cost = sum(waiting.cost for _, _, waiting in heap)
        return len(heap) < self._limits.max_batch and cost < self._limits.max_cost

    def _take(self, shape: Hashable) -> list[_Waiting[Item, Result]]:
        heap = self._heaps[shape]
        batch: list[_Waiting[Item, Result]] = []
        cost = 0.0
        while heap and len(batch) < self._limits.max_batch:
            cost += heap[0][2].cost
            if batch and cost > self._limits.max_cost:
                break
            tag, _, waiting = heapq.heappop(heap)
            self._virtual_time = max(self._virtual_time, tag)
            self._forget(waiting.camera)
            if not waiting.done.done():  # else who waited for it has gone
                batch.append(waiting)
        if not heap:
            del self._heaps[shape]
        return batch

    def _forget(self, camera: str) -> None:
        self._waiting -= 1
        self._waiting_of[camera] -= 1
        if not self._waiting_of[camera]:
            del self._waiting_of[camera]
        if len(self._ends) > _REMEMBERED_CAMERAS:
            self._ends = {camera: end for camera, end in self._ends.items() if camera in self._waiting_of}

    async def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        started_s = time.monotonic()
        try:
            results = await self._attempt(batch)
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].done.done():
                    batch[0].done.set_exception(error)
                return
            for waiting in batch:
                await self._run_batch([waiting])
            return
        except BaseException:  # closed
            for waiting in batch:
                waiting.done.cancel()
            raise
        for waiting, result in zip(batch, results, strict=True):
            if waiting.done.done():
                continue
            if isinstance(result, Exception):
                waiting.done.set_exception(result)
            else:
                waiting.done.set_result(Batched(result, started_s - waiting.came_s, len(batch)))

    async def _attempt(self, batch: list[_Waiting[Item, Result]]) -> Sequence[Result | Exception]:
        self._under_way += 1
        try:
            return await self._run([waiting.item for waiting in batch])
        finally:
            self._under_way -= 1
