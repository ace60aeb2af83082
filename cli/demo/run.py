"""The demo's run: pictures go in through Compress at the edge, detections come back through Subscribe at the cloud.

One picture at a time, so that the times shown are a picture's own. Before any is measured each picture goes through
once, so that what is measured is the work and not the start of it.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sightline.v1 import detection_pb2, edge_pb2

from cli.codecs import find_named
from cli.demo.results import STAGES, Coded, Demo, Found, Picture, Rgb
from cli.demo.services import service
from cli.demo.wire import Wire
from cli.detect import load as load_task
from cli.pictures import jpeg_size, read_frame
from cloud.tasks.types import TaskModel
from shared.codec.bitstream import from_bytes
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import SightlineError


@dataclass(frozen=True, slots=True)
class Input:
    """One picture file: its bytes are sent as they are."""

    source: Path
    data: bytes
    frame: Frame


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `shown` is one of `qualities`, which rise; objects below `score` are left out everywhere."""

    qualities: tuple[float, ...]
    shown: float
    model: str
    task: str
    score: float


def read_inputs(sources: Sequence[Path]) -> list[Input]:
    """Reads and checks every picture before a service is started. Raises InvalidImage, TooLarge naming the file."""
    inputs = []
    for source in sources:
        data = source.read_bytes()
        try:
            inputs.append(Input(source, data, read_frame(data)))
        except SightlineError as error:
            raise type(error)(f"{source}: {error}") from error
    return inputs


async def run(inputs: Sequence[Input], plan: Plan, say: Callable[[str], None]) -> Demo:
    """Starts both services, sends every picture at every quality, and stops them, whatever happens. `say` hears what is
    under way. Raises SightlineError; SIGTERM cancels."""
    this = asyncio.current_task()
    assert this is not None  # noqa: S101 - a coroutine runs in a task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    with TemporaryDirectory(prefix="sightline-demo-") as name:
        folder = Path(name)
        bundle = find_named(plan.model)
        say("starting the cloud service")
        with service("cloud", cloud_flags(bundle, plan.task, folder), folder) as cloud:
            codec = await asyncio.to_thread(Codec.load, bundle)
            task = await asyncio.to_thread(load_task, plan.task)
            await cloud.wait_ready()
            say("starting the edge service")
            with service("edge", edge_flags(bundle, folder, cloud.address), folder) as edge:
                await edge.wait_ready()
                wire = Wire(edge, cloud)
                try:
                    pictures = await send_all(inputs, plan, wire, codec, task, say)
                finally:
                    await wire.close()
                say("stopping the services")
    return Demo(
        pictures=pictures,
        qualities=plan.qualities,
        shown_quality=plan.shown,
        codec=codec.bundle.name,
        model_id=codec.model_id,
        task=task.name,
        version=version("sightline"),
    )


def cloud_flags(bundle: Path, task: str, folder: Path) -> list[str]:
    return ["--data-dir", str(folder / "cloud"), "--models", str(bundle.resolve()), "--tasks", task]


def edge_flags(bundle: Path, folder: Path, cloud: str) -> list[str]:
    return ["--data-dir", str(folder / "edge"), "--models", str(bundle.resolve()), "--cloud", cloud]


async def send_all(
    inputs: Sequence[Input], plan: Plan, wire: Wire, codec: Codec, task: TaskModel, say: Callable[[str], None]
) -> list[Picture]:
    for one in inputs:
        say(f"{one.source.name}: once, to warm up")
        await wire.send(one.source, one.data, plan.shown)
    pictures = []
    for one in inputs:
        coded = []
        for quality in plan.qualities:
            say(f"{one.source.name}: quality {quality:g}")
            receipt, event, round_trip_ms = await wire.send(one.source, one.data, quality)
            seen = await asyncio.to_thread(codec.decode, from_bytes(receipt.bitstream, [codec.model_id]))
            coded.append(
                Coded(
                    quality=quality,
                    sent_bytes=receipt.coded_bytes,
                    rgb=seen.rgb,
                    found=found_in(event, plan.score),
                    stages_ms=stages(receipt.timings, event.timings, round_trip_ms),
                    round_trip_ms=round_trip_ms,
                )
            )
        say(f"{one.source.name}: the original")
        found = await asyncio.to_thread(find, task, one.frame.rgb, plan.score)
        jpeg_bytes, own = jpeg_size(one.data, one.frame)
        pictures.append(Picture(one.source, one.frame.rgb, jpeg_bytes, own, found, coded))
    return pictures


def find(task: TaskModel, rgb: Rgb, score: float) -> list[Found]:
    """What the cloud's task model finds in a picture that was never coded."""
    detections = task.predict([torch.from_numpy(rgb).permute(2, 0, 1)], score)[0]
    return [
        Found((box[0], box[1], box[2], box[3]), value, category_id, label)
        for box, value, category_id, label in zip(
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.category_ids.tolist(),
            detections.labels,
            strict=True,
        )
    ]


def found_in(event: detection_pb2.DetectionEvent, score: float) -> list[Found]:
    return [
        Found((one.box.x_min, one.box.y_min, one.box.x_max, one.box.y_max), one.score, one.category_id, one.label)
        for result in event.results
        for one in result.detections
        if one.score >= score
    ]


def stages(edge: edge_pb2.EdgeTimings, cloud: detection_pb2.CloudTimings, round_trip_ms: float) -> dict[str, float]:
    """The frame's way in order, and what of the whole is in none of these: wires, logs, processes that take turns."""
    at_edge = (edge.image_decode_ms, edge.queue_ms, edge.analyse_ms, edge.pack_ms, edge.spool_ms)
    at_cloud = (cloud.queue_ms, cloud.unpack_ms, cloud.synthesise_ms, cloud.task_ms)
    rest = max(0.0, round_trip_ms - sum(at_edge) - sum(at_cloud))
    return dict(zip(STAGES, (*at_edge, rest, *at_cloud), strict=True))
