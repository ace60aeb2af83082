"""The cloud: what decoding, batching and logging add to the task model, and whether one camera can crowd out others.

    sightline bench pipeline [--short] [--json]

A cloud in a process of its own takes frames that were coded before, from `CAMERAS` cameras that each send their next
when the last is in the log. What is outside the task model is the time a frame takes beyond the model's own; the share
is of the model's. Models: torchvision's fasterrcnn_resnet50_fpn at 800 pixels with random weights, as the target says,
and the bundled one, which is much smaller. The peer takes the same pictures as JPEG, decodes them and runs the same
model, without batches, checks or a log.

Fairness: four cameras send evenly and together ask for 40 % of what the cloud can do; then one of them sends ten times
as much. Given is the 99th percentile of the other three's time to the log.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from sightline.v1 import detection_pb2, detection_pb2_grpc

from bench import plain
from bench.pictures import VGA, frame, jpeg, size_name
from bench.report import Report, Say, resident_bytes, run
from bench.services import folder_on_disk, started
from bench.timing import sample
from bench.uploader import Uploader
from shared.codec.codec import Codec
from shared.codec.types import Bitstream

QUALITY, CAMERAS = 4.0, 4
BUNDLED, LARGE = "faster-rcnn-mobilenetv2", "fasterrcnn_resnet50_fpn"
FAIR_LOAD, CROWD = 0.4, 10
TARGET_SHARE, TARGET_CROWDED = 15.0, 2.0


@dataclass(frozen=True, slots=True)
class Spent:
    """Milliseconds a frame: in all by the wall clock, and the task model's. `stages`: medians of what events say."""

    wall_ms: float
    task_ms: float
    stages: dict[str, float]

    @property
    def share(self) -> float:
        """Time outside the task model, percent of the model's."""
        return 100 * (self.wall_ms - self.task_ms) / self.task_ms


def measure(short: bool, say: Say) -> Report:
    size = (96, 128) if short else VGA
    settings = {"size": size_name(size), "quality": QUALITY, "cameras": CAMERAS, "short_side": 800}
    report = Report("pipeline", "the cloud beyond its task model", settings)
    codec = Codec.load("detection")
    frames = [frame(size, i) for i in range(CAMERAS)]
    coded, files = codec.encode_batch(frames, QUALITY), [jpeg(each.rgb) for each in frames]
    del codec
    rounds, count = (1, 4) if short else (5, 24)
    with folder_on_disk() as folder, asyncio.Runner() as loop:
        say(BUNDLED)
        ours, theirs = _measure(report, loop, folder, BUNDLED, coded, files, rounds, count, fairness=True)
        _compare(report, BUNDLED, ours, theirs)
        if not short:
            say(f"{LARGE}, random weights")
            large = str(random_network(folder / LARGE))
            ours, theirs = _measure(report, loop, folder, large, coded, files, 2, 4, fairness=False)
            _compare(report, LARGE, ours, theirs)
    return report


def random_network(folder: Path) -> Path:
    """torchvision's network with random weights as a bundle, which a cloud can be told to load."""
    from cloud.tasks.loading import torchvision_network
    from trainer.taskexport import export_task

    network = torchvision_network(LARGE, published=False)
    return export_task(network, folder, name=LARGE, architecture=LARGE, provenance={"weights": "random"}, measured={})


def _measure(
    report: Report,
    loop: asyncio.Runner,
    folder: Path,
    task: str,
    coded: Sequence[Bitstream],
    files: Sequence[bytes],
    rounds: int,
    count: int,
    *,
    fairness: bool,
) -> tuple[list[Spent], list[Spent]]:
    """The cloud's and the plain service's rounds."""
    with started("cloud", ["--tasks", task], folder / f"cloud-{Path(task).name}") as cloud:
        loop.run(carry(cloud.address, coded, CAMERAS))  # warm
        ours = [loop.run(carry(cloud.address, coded, count)) for _ in range(rounds)]
        report.add(f"{Path(task).name}: the cloud's memory, most", resident_bytes(cloud.pid, "VmHWM") / 2**20, "MiB")
        if fairness:
            loop.run(_fairness(report, cloud.address, coded, 1e3 / sample([one.wall_ms for one in ours]).median, count))
    with plain.detect(task, len(os.sched_getaffinity(0))) as port:
        loop.run(ask(port, files, CAMERAS))
        return ours, [loop.run(ask(port, files, count)) for _ in range(rounds)]


def _compare(report: Report, name: str, ours: Sequence[Spent], theirs: Sequence[Spent]) -> None:
    wall, peer = (sample([one.wall_ms for one in each]) for each in (ours, theirs))
    report.add(f"{name}: a frame", wall, "ms", peer=("JPEG + detect", peer))
    task, other = (sample([one.task_ms for one in each]) for each in (ours, theirs))
    report.add(f"{name}: of it the task model", task, "ms", peer=("JPEG + detect", other))
    for stage in ours[0].stages:
        report.add(f"{name}: {stage}", sample([one.stages[stage] for one in ours]), "ms")
    outside, others = (sample([one.share for one in each]) for each in (ours, theirs))
    bound = TARGET_SHARE if name == LARGE else None
    report.add(f"{name}: outside the task model", outside, "%", peer=("JPEG + detect", others), at_most=bound)


async def carry(address: str, coded: Sequence[Bitstream], count: int) -> Spent:
    """`count` frames of CAMERAS cameras to the log."""
    cursor = await _events_end(address)
    left = iter(range(count))

    async def camera(index: int) -> None:
        async with Uploader(address, coded[0].model_id, f"camera-{index}") as uploader:
            for i in left:
                await uploader.send(coded[i % len(coded)])

    start = time.perf_counter()
    await asyncio.gather(*(camera(i) for i in range(CAMERAS)))
    wall_ms = (time.perf_counter() - start) * 1e3 / count
    events = await _events_after(address, cursor, count)
    shared = [max(1, event.results[0].batch_size) for event in events]
    task_ms = sum(event.timings.task_ms / n for event, n in zip(events, shared, strict=True)) / count
    synthesise = [event.timings.synthesise_ms / n for event, n in zip(events, shared, strict=True)]
    stages = {
        "unpack": float(np.median([event.timings.unpack_ms for event in events])),
        "g_s": float(np.median(synthesise)),
        "waiting for a batch": float(np.median([event.timings.queue_ms for event in events])),
    }
    return Spent(wall_ms, task_ms, stages)


async def ask(port: int, files: Sequence[bytes], count: int) -> Spent:
    """The same of the plain service."""
    left = iter(range(count))
    answers: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = plain.stub(channel)

        async def camera() -> None:
            for i in left:
                answers.append(json.loads(await call(files[i % len(files)]))["task_s"] * 1e3)

        start = time.perf_counter()
        await asyncio.gather(*(camera() for _ in range(CAMERAS)))
        wall_ms = (time.perf_counter() - start) * 1e3 / count
    return Spent(wall_ms, sum(answers) / count, {})


async def _fairness(report: Report, address: str, coded: Sequence[Bitstream], capacity: float, count: int) -> None:
    """`capacity`: frames a second that the cloud can do."""
    each = FAIR_LOAD * capacity / CAMERAS
    seconds = 3 * count / capacity
    alone = await _others(address, coded, each, each, seconds)
    crowded = await _others(address, coded, each, CROWD * each, seconds)
    p99 = [float(np.percentile(times, 99)) * 1e3 for times in (alone, crowded)]
    report.add("another camera's p99, all even", p99[0], "ms")
    report.add(f"another camera's p99, one at {CROWD} times the rate", p99[1], "ms")
    report.add("raised by", p99[1] / p99[0], "x", at_most=TARGET_CROWDED)


async def _others(
    address: str, coded: Sequence[Bitstream], each_s: float, first_s: float, seconds: float
) -> list[float]:
    """Seconds to the log of all cameras but the first, which sends `first_s` frames a second, the others `each_s`."""
    took: list[float] = []

    async def camera(index: int) -> None:
        rate = each_s if index else first_s
        times: list[float] = []
        async with Uploader(address, coded[0].model_id, f"fair-{index}") as uploader:

            async def one(i: int) -> None:
                times.append(await uploader.send(coded[i % len(coded)]))

            start, tasks = time.perf_counter() + index / CAMERAS / each_s, []
            for i in range(max(1, int(rate * seconds))):
                await asyncio.sleep(max(0.0, start + i / rate - time.perf_counter()))
                tasks.append(asyncio.create_task(one(i)))
            if index:
                await asyncio.gather(*tasks)
                took.extend(times)
            else:  # what the crowd still waits for does not matter
                await asyncio.sleep(1 / each_s)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    await asyncio.gather(*(camera(i) for i in range(CAMERAS)))
    return took


async def _events_end(address: str) -> detection_pb2.Cursor:
    """The cursor of the log's end."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = detection_pb2_grpc.DetectionServiceStub(channel).Subscribe(
            detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_END)
        )
        cursor = (await call.read()).progress.cursor
        call.cancel()
    return cursor


async def _events_after(address: str, cursor: detection_pb2.Cursor, count: int) -> list[detection_pb2.DetectionEvent]:
    found: list[detection_pb2.DetectionEvent] = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = detection_pb2_grpc.DetectionServiceStub(channel).Subscribe(detection_pb2.SubscribeRequest(after=cursor))
        async for response in call:
            if response.HasField("event"):
                found.append(response.event)
            if len(found) == count:
                break
        call.cancel()
    return found


def main() -> int:
    return run(__doc__, "pipeline", measure)


if __name__ == "__main__":
    raise SystemExit(main())
