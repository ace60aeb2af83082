"""`sightline demo --live`: cameras through a real edge and a real cloud until somebody stops it, with the web console.

A photograph becomes a camera that pans over it; anything else is a source for `sightline camera`, run as a process of
its own. A camera sends its next frame when its last has been seen, so a machine that is too slow for all of them shows
fewer frames a second and never old ones.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from cli.codecs import find_named
from cli.demo.run import cloud_flags, edge_flags
from cli.demo.scene import SIZE, Scene, camera_names
from cli.demo.services import Service, running, service
from shared.clients import AsyncCameraClient, CompressOptions, Delivery, Outcome, Receipt
from shared.errors import SightlineError

CONSOLE_PORT = 7423
LINE_S = 1.0
QUALITY = 4.0


@dataclass(frozen=True, slots=True)
class Show:
    """What to run. `pictures` become panning cameras, `sources` are read by `sightline camera`.

    `fps`: of each camera, at most. `seconds`: None runs until a signal.
    """

    pictures: list[Path]
    sources: list[str]
    model: str
    task: str
    fps: float
    seconds: float | None


@dataclass(slots=True)
class Sent:
    """What went through since the last line."""

    frames: int = 0
    coded_bytes: int = 0
    failed: int = 0
    since_s: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        passed_s = max(1e-9, time.monotonic() - self.since_s)
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.frames / passed_s:.1f} frames/s, {8e-3 * self.coded_bytes / passed_s:.0f} kbit/s{failed}"


async def show(wanted: Show, say: Callable[[str], None], opened: Callable[[str], None]) -> None:
    """Runs it. `say` hears what is under way; `opened` is given the console's address once pictures flow.

    Raises SightlineError; SIGTERM and SIGINT end it in order.
    """
    scenes = [Scene(path) for path in wanted.pictures]
    this = asyncio.current_task()
    assert this is not None  # noqa: S101 - a coroutine runs in a task
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    with TemporaryDirectory(prefix="sightline-live-") as name, ExitStack() as children:
        folder, bundle = Path(name), find_named(wanted.model)
        with suppress(asyncio.CancelledError, TimeoutError):
            say("starting the cloud service")
            flags = [*cloud_flags(bundle, wanted.task, folder), "--console-listen", f"127.0.0.1:{console_port()}"]
            cloud = children.enter_context(service("cloud", flags, folder))
            await cloud.wait_ready()
            say("starting the edge service")
            edge = children.enter_context(service("edge", edge_flags(bundle, folder, cloud.address), folder))
            await edge.wait_ready()
            cameras = [
                children.enter_context(running(f"camera-{n}", camera_flags(n, source, edge, wanted.fps), folder))
                for n, source in enumerate(wanted.sources, 1)
            ]
            opened(cloud.ready["console"])
            async with asyncio.timeout(wanted.seconds):
                await send_all(edge.address, wanted, scenes, [cloud, edge, *cameras], say)
        say("stopping the services")


def camera_flags(number: int, source: str, edge: Service, fps: float) -> list[str]:
    """Arguments of `sightline` that read `source` as a camera. A file plays at its own pace, over and over."""
    from edge.sources import find_source

    return [
        *("camera", source, "--edge", edge.address, "--id", f"camera-{number}"),
        *(() if find_source(source).live else ("--realtime", "--loop")),
        *("--fps", f"{fps:g}", "--size", f"{SIZE[0]}x{SIZE[1]}", "--quality", f"{QUALITY:g}"),
    ]


async def send_all(
    edge: str, wanted: Show, scenes: Sequence[Scene], services: Sequence[Service], say: Callable[[str], None]
) -> None:
    """Every camera, for ever. Raises Unavailable with the end of its log once a service has ended."""
    sent = Sent()
    cameras = [
        asyncio.create_task(send(edge, name, scene, wanted.fps, sent))
        for name, scene in zip(camera_names(wanted.pictures), scenes, strict=True)
    ]
    try:
        while True:
            await asyncio.sleep(LINE_S)
            for each in services:
                each.check()
            for camera in cameras:
                if camera.done():
                    camera.result()  # raises
            say(sent.line() if scenes else "running")
            sent.frames = sent.coded_bytes = 0
            sent.since_s = time.monotonic()
    finally:
        for camera in cameras:
            camera.cancel()
        await asyncio.gather(*cameras, return_exceptions=True)


async def send(edge: str, name: str, scene: Scene, fps: float, sent: Sent) -> None:
    """One camera, for ever: a frame every 1/fps seconds, later where the last is still on its way."""
    options = CompressOptions(quality=QUALITY, delivery=Delivery.PERSISTED)
    start_s = time.monotonic()
    async with AsyncCameraClient(edge, name, options=options) as camera:
        n = 0
        while True:
            time_s = time.monotonic() - start_s
            picture = await asyncio.to_thread(scene.at, time_s)
            try:
                count(await camera.compress(picture, capture_time=datetime.now(UTC)), sent)
            except SightlineError:
                sent.failed += 1  # a service that ended is said by who watches them; anything else may pass
            n = max(n + 1, int((time.monotonic() - start_s) * fps))
            await asyncio.sleep(max(0.0, start_s + n / fps - time.monotonic()))


def count(receipt: Receipt, sent: Sent) -> None:
    if receipt.outcome == Outcome.DETECTIONS:
        sent.frames += 1
        sent.coded_bytes += receipt.coded_bytes
    else:
        sent.failed += 1


def console_port() -> int:
    """The console's own port if it is free, else any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", CONSOLE_PORT))
        except OSError:
            return 0
    return CONSOLE_PORT
