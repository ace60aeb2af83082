"""How soon pictures flow again after an RTSP camera was killed under load.

    python -m bench.recovery [--kills 10] [--cameras 3] [--away 1.0] [--json]

GStreamer's RTSP server (320x192, 15 pictures a second) is read by `--cameras` captures, as `sightline camera` runs
them, into a real edge process that spools every picture. The server dies by SIGKILL and is started again `--away`
seconds later, over and over. Measured on each camera: from the kill until the loss is noticed, and from the moment the
server listens again until a picture is read, and until the edge's receipt of a picture that was taken after it. Then,
once, the edge is stopped and started again, and the same is measured from its being ready.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from bench.rtsp import NEEDS, RtspServer, available, ball
from cli.demo.services import Service, service
from cli.progress import bar
from edge.capture import Capture, Counts, Plan
from edge.sources import Grab, Reading, find_source
from shared.clients import CameraClient, CompressOptions, Receipt, Retry
from shared.errors import SightlineError, Unavailable

PATIENCE_S = 60.0
STEP_S = 0.005


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds, of one camera at one kill."""

    noticed_s: float
    read_s: float
    received_s: float


class Camera:
    """One capture in a thread. `receipts`: when each picture was taken and when its receipt came, by time.time."""

    def __init__(self, name: str, source: str, edge: str) -> None:
        client = CameraClient(edge, name, options=CompressOptions(quality=2), retry=Retry(give_up_s=None))
        plan = Plan(find_source(source), Reading(hardware="none"))
        self.receipts: list[tuple[float, float]] = []
        self.failures: list[SightlineError] = []
        self.capture = Capture(plan, client, on_receipt=self._received, on_failure=self.failures.append)
        self._thread = threading.Thread(target=self.capture.run)
        self._thread.start()

    def _received(self, grab: Grab, _: Receipt) -> None:
        self.receipts.append((grab.captured.timestamp(), time.time()))

    def first_after(self, start_s: float) -> float:
        """When the first receipt of a picture that was taken after `start_s` came; waits for it."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for taken_s, received_s in list(self.receipts):
                if taken_s > start_s:
                    return received_s
            time.sleep(STEP_S)
        raise Unavailable(f"no picture within {PATIENCE_S:.0f} s; {self.capture.status().away}")

    def stop(self) -> None:
        self.capture.stop()
        self._thread.join()


def when(condition: Callable[[], bool], what: str) -> float:
    """time.time() at which it came true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"{what}: not within {PATIENCE_S:.0f} s")
        time.sleep(STEP_S)
    return time.time()


def kill_camera(server: RtspServer, cameras: list[Camera], away_s: float) -> list[Recovery]:
    killed_s = time.time()
    server.kill()
    noticed = [when(lambda c=camera: c.capture.status().away != "", "loss") for camera in cameras]
    time.sleep(max(0.0, killed_s + away_s - time.time()))
    server.start()
    back_s = time.time()
    read = [when(lambda c=camera: c.capture.status().away == "", "reading") for camera in cameras]
    return [
        Recovery(lost_s - killed_s, read_s - back_s, camera.first_after(back_s) - back_s)
        for camera, lost_s, read_s in zip(cameras, noticed, read, strict=True)
    ]


def run(kills: int, count: int, away_s: float) -> tuple[list[Recovery], list[float], list[Counts]]:
    """Recoveries of the source, seconds of each camera to recover from the edge's absence, and all that was counted."""
    server = RtspServer(ball(320, 192, 15)).start()
    with tempfile.TemporaryDirectory(prefix="sightline-recovery-") as name, ExitStack() as stack:
        stack.callback(server.kill)
        folder = Path(name)
        first = ExitStack()
        edge = start_edge(first, folder, "127.0.0.1:0")
        address = edge.address
        cameras = [Camera(f"camera-{i}", server.address, address) for i in range(count)]
        try:
            for camera in cameras:
                camera.first_after(0.0)
            recoveries = []
            with bar() as progress:
                for _ in progress.track(range(kills), description="kills"):
                    recoveries += kill_camera(server, cameras, away_s)
            first.close()
            start_edge(stack, folder, address)
            ready_s = time.time()
            edge_s = [camera.first_after(ready_s) - ready_s for camera in cameras]
        finally:
            first.close()
            for camera in cameras:
                camera.stop()
        failures = [error for camera in cameras for error in camera.failures]
        if failures:
            raise failures[0]
        return recoveries, edge_s, [camera.capture.status().counts for camera in cameras]


def start_edge(stack: ExitStack, folder: Path, listen: str) -> Service:
    import asyncio

    (folder / "edge.ready").unlink(missing_ok=True)
    edge = stack.enter_context(service("edge", ["--data-dir", str(folder / "edge"), "--listen", listen], folder))
    asyncio.run(edge.wait_ready())
    return edge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--cameras", type=int, default=3)
    parser.add_argument("--away", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not available():
        raise Unavailable(f"this needs {NEEDS}")
    recoveries, edge_s, counts = run(given.kills, given.cameras, given.away)
    if given.json:
        told = {"recoveries": [asdict(one) for one in recoveries], "edge_s": edge_s}
        print(json.dumps(told | {"counts": [asdict(one) for one in counts]}, indent=1))
        return 0
    console = Console(width=120)
    console.print(f"{given.kills} kills of the RTSP server, {given.cameras} cameras, {given.away:g} s away")
    for name, values in (
        ("loss noticed after", [one.noticed_s for one in recoveries]),
        ("pictures read again after it listened", [one.read_s for one in recoveries]),
        ("receipts again after it listened", [one.received_s for one in recoveries]),
        ("receipts again after the edge was ready", edge_s),
    ):
        console.print(f"{name:42} median {statistics.median(values):.2f} s, most {max(values):.2f} s")
    for one in counts:
        console.print(f"{one.sent} sent, {one.dropped} dropped, {one.failed} failed, {one.reconnects} reconnects")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
