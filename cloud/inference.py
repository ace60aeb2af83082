"""From a checked bitstream to what the frozen networks see in it: the cloud's only heavy work.

    infer --batcher--> unpack (rANS and h_s; thread pool, one frame a thread)
                   --> g_s and the task models (one thread, whole batches) --> Detections

Frames wait in their coded form and are unpacked when their batch begins, so that what waits stays small: the symbols of
a 1080p frame take a hundred times the room of its bitstream. The networks have one thread, which uses all the cores
that torch is given; entropy decoding releases the GIL and scales over frames. Nothing here runs on the event loop.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from cloud.batching import Batcher, BatchLimits
from cloud.metrics import CloudMetrics
from cloud.tasks.types import Detections, TaskModel
from shared.codec import bitstream as bits
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame, Symbols
from shared.errors import InvalidInput, Overloaded, UnknownModel

_WARM_UP_SIZE = (64, 64)  # pixels


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """One task model's answer for one frame. `task_s`: the whole batch's time."""

    task: TaskModel
    detections: Detections
    task_s: float


@dataclass(frozen=True, slots=True)
class Inferred:
    """What was seen in one frame, and where the time went. `synthesise_s` is the whole batch's.

    `frame` is the decoded picture.
    """

    outputs: tuple[TaskOutput, ...]
    frame: Frame
    batch_size: int
    queue_s: float
    unpack_s: float
    synthesise_s: float


@dataclass(frozen=True, slots=True)
class _Job:
    bitstream: Bitstream
    tasks: tuple[str, ...]
    expires_unix_us: int
    min_score: float


@dataclass(frozen=True, slots=True)
class _Seen:
    outputs: tuple[TaskOutput, ...]
    frame: Frame
    unpack_s: float
    synthesise_s: float


class Inference:
    """Codecs and task models behind one batcher. `start` on the event loop, `close` there too."""

    def __init__(
        self,
        codecs: Sequence[Codec],
        tasks: Sequence[TaskModel],
        *,
        limits: BatchLimits,
        threads: int,
        unpack_threads: int,
        metrics: CloudMetrics,
        unix_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.codecs: dict[str, Codec] = {codec.model_id: codec for codec in codecs}
        self._jobs: Counter[str] = Counter()  # frames in work, by model id
        self.tasks: Mapping[str, TaskModel] = {task.name: task for task in tasks}
        self._metrics = metrics
        self._unix_us = unix_us
        self._batcher: Batcher[_Job, _Seen | None] = Batcher(self._run, limits)
        self._unpackers = ThreadPoolExecutor(unpack_threads, thread_name_prefix="unpack")
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        _set_torch_threads(self._unpackers, unpack_threads, self._network, threads)

    def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        """Stops at once; who waits for a frame is cancelled."""
        await self._batcher.close()
        await asyncio.to_thread(self._unpackers.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._network.shutdown, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Frames that wait for a batch."""
        return self._batcher.waiting

    def require_model(self, model_id: str) -> None:
        """Raises UnknownModel, naming the ids there are."""
        if model_id not in self.codecs:
            raise UnknownModel(f"no model {model_id!r} here, there are: {', '.join(sorted(self.codecs))}")

    async def infer(
        self,
        camera: str,
        bitstream: Bitstream,
        tasks: Sequence[str],
        *,
        expires_unix_us: int = 0,
        min_score: float = 0.0,
    ) -> Inferred | None:
        """Decodes a frame and runs `tasks` on it. None if its time was over when its batch began.

        `camera`: whose turn it takes. `expires_unix_us`: 0 means never. `min_score`: what scores below it is left out,
        and no mask is made for it. Raises UnknownModel, InvalidBitstream, InvalidInput for an unknown task, Overloaded
        where there is no room.
        """
        self.require_model(bitstream.model_id)
        codec = self.codecs[bitstream.model_id]
        coded_as = codec.latent_shape(bitstream.height, bitstream.width, bitstream.quality)
        bits.check_streams(bitstream, codec.tables_z, coded_as.z, coded_as.y)  # before anything of that size is made
        if unknown := [name for name in tasks if name not in self.tasks]:
            raise InvalidInput(f"no task {unknown[0]!r} here, there are: {', '.join(self.tasks)}")
        job = _Job(bitstream, tuple(tasks), expires_unix_us, min_score)
        shape = (bitstream.model_id, bitstream.height, bitstream.width, job.tasks)
        self._jobs[bitstream.model_id] += 1
        try:
            batched = await self._batcher.submit(camera, shape, job, cost=bitstream.height * bitstream.width)
        finally:
            self._jobs[bitstream.model_id] -= 1
        self._metrics.queue_seconds.observe(batched.queue_s)
        seen = batched.result
        if seen is None:
            return None
        return Inferred(seen.outputs, seen.frame, batched.batch_size, batched.queue_s, seen.unpack_s, seen.synthesise_s)

    def warm_up(self) -> None:
        """Passes one small frame through everything, so that the first real one finds kernels compiled. Blocks."""
        for codec in self.codecs.values():
            self._warm_up(codec, tuple(self.tasks))

    def add(self, codec: Codec) -> None:
        """Takes one more bundle into use, once it has decoded a small frame beside what runs. Blocks."""
        self._warm_up(codec, ())
        self.codecs = {**self.codecs, codec.model_id: codec}

    def busy_with(self, model_id: str) -> bool:
        """Whether frames of a bundle wait or are in work."""
        return self._jobs[model_id] > 0

    def remove(self, model_id: str) -> None:
        """Frees a bundle that nothing is busy with."""
        self.codecs = {each: codec for each, codec in self.codecs.items() if each != model_id}

    def _warm_up(self, codec: Codec, tasks: tuple[str, ...]) -> None:
        bitstream = codec.encode(Frame(np.full((*_WARM_UP_SIZE, 3), 128, np.uint8)))
        symbols = self._unpackers.submit(codec.unpack, bitstream).result()
        self._network.submit(self._see, codec, tasks, [symbols], [0.0]).result()

    async def _run(self, jobs: Sequence[_Job]) -> list[_Seen | Exception | None]:
        loop = asyncio.get_running_loop()
        self._metrics.batch_size.observe(len(jobs))
        now_us = self._unix_us()
        on_time = [i for i, job in enumerate(jobs) if not job.expires_unix_us or now_us <= job.expires_unix_us]
        unpacked = await asyncio.gather(
            *(loop.run_in_executor(self._unpackers, self._unpack, jobs[i].bitstream) for i in on_time),
            return_exceptions=True,
        )
        answers: list[_Seen | Exception | None] = [None] * len(jobs)
        good: list[tuple[int, Symbols, float]] = []
        for i, result in zip(on_time, unpacked, strict=True):
            if isinstance(result, Exception):
                answers[i] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                good.append((i, *result))
        if good:
            symbols = [each for _, each, _ in good]
            min_scores = [jobs[i].min_score for i, _, _ in good]
            try:
                frames, outputs, synthesise_s = await loop.run_in_executor(
                    self._network,
                    self._see,
                    self.codecs[jobs[0].bitstream.model_id],
                    jobs[0].tasks,
                    symbols,
                    min_scores,
                )
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise Overloaded(f"no memory for a batch of {len(symbols)} frames: {error}") from error
            for (i, _, unpack_s), frame, found in zip(good, frames, outputs, strict=True):
                answers[i] = _Seen(found, frame, unpack_s, synthesise_s)
        return answers

    def _unpack(self, bitstream: Bitstream) -> tuple[Symbols, float]:
        start = time.perf_counter()
        symbols = self.codecs[bitstream.model_id].unpack(bitstream)
        taken_s = time.perf_counter() - start
        self._metrics.decode_seconds.labels("unpack").observe(taken_s)
        return symbols, taken_s

    def _see(
        self, codec: Codec, tasks: Sequence[str], symbols: Sequence[Symbols], min_scores: Sequence[float]
    ) -> tuple[list[Frame], list[tuple[TaskOutput, ...]], float]:
        """The pictures of a batch, and what each task sees in them with at least each one's score."""
        start = time.perf_counter()
        frames = codec.synthesise(symbols)
        synthesise_s = time.perf_counter() - start
        self._metrics.decode_seconds.labels("synthesise").observe(synthesise_s)
        images = [torch.from_numpy(frame.rgb).permute(2, 0, 1) for frame in frames]
        by_task = []
        for name in tasks:
            start = time.perf_counter()
            found = self.tasks[name].predict(images, min(min_scores))
            task_s = time.perf_counter() - start
            self._metrics.task_seconds.labels(name).observe(task_s)
            by_task.append(
                [
                    TaskOutput(self.tasks[name], detections.at_least(score), task_s)
                    for detections, score in zip(found, min_scores, strict=True)
                ]
            )
        return frames, [tuple(outputs[i] for outputs in by_task) for i in range(len(frames))], synthesise_s


def _set_torch_threads(
    unpackers: ThreadPoolExecutor, unpack_threads: int, network: ThreadPoolExecutor, threads: int
) -> None:
    """One torch thread for each unpacker, `threads` for the networks.

    The number is the calling thread's own in OpenMP but the process's in MKL, so the networks' thread comes last.
    """
    together = threading.Barrier(unpack_threads)  # keeps one worker from serving two

    def alone() -> None:
        torch.set_num_threads(1)
        together.wait()

    for done in [unpackers.submit(alone) for _ in range(unpack_threads)]:
        done.result()
    network.submit(torch.set_num_threads, threads).result()
