"""`sightline camera`: any source of pictures to an edge, until it ends or somebody stops it."""

import json
import signal
import sys
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.connect import EDGE, Ca, Certificate, Insecure, Key, Token, connection
from shared.errors import InvalidInput

if TYPE_CHECKING:
    from edge.capture import Capture, Counts, Status
    from edge.sources import Grab
    from shared.clients import Receipt
    from shared.errors import SightlineError

LINE_S = 0.5  # on a terminal
REPORT_S = 10.0  # elsewhere


class DeliveryName(StrEnum):
    """Values of --delivery; those of shared.clients.Delivery, which is not imported before it is needed."""

    NONE = "none"
    SPOOLED = "spooled"
    PERSISTED = "persisted"


def camera(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="rtsp://... or another URL, /dev/video0, a video file, or a folder of pictures."
        ),
    ],
    edge: Annotated[str, typer.Option("--edge", metavar="HOST:PORT", help="The edge service.")] = EDGE,
    camera_id: Annotated[str, typer.Option("--id", metavar="NAME", help="This camera's name.")] = "camera",
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality", "-q", min=1, max=8, help="From 1, smallest, to 8, finest.", show_default="the edge's"
        ),
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option("--target-bytes", min=1, help="In place of a quality: the finest that fits.")
    ] = None,
    delivery: Annotated[
        DeliveryName, typer.Option("--delivery", help="How far a picture must have come to count as sent.")
    ] = DeliveryName.SPOOLED,
    model: Annotated[
        str, typer.Option("--model", metavar="ID", help="Codec, as the edge names it.", show_default="the edge's")
    ] = "",
    realtime: Annotated[bool, typer.Option("--realtime", help="Read a file at its own pace, like a camera.")] = False,
    loop: Annotated[bool, typer.Option("--loop", help="Begin a file or folder again at its end.")] = False,
    fps: Annotated[
        float | None,
        typer.Option("--fps", min=0.01, help="At most so many pictures a second; pace of a folder with --realtime."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Scale down to fit; the sides keep their proportion.")
    ] = None,
    motion: Annotated[
        float,
        typer.Option("--motion", min=0, max=100, help="Skip pictures in which less than this percentage changed."),
    ] = 0.0,
    refresh: Annotated[
        float, typer.Option("--refresh", min=0, help="With --motion: one picture at least every so many seconds.")
    ] = 10.0,
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="NAME", help="Decode with: auto, none, cuda, vaapi, qsv, ...")
    ] = "auto",
    udp: Annotated[bool, typer.Option("--udp", help="RTSP over UDP, which may lose packets, in place of TCP.")] = False,
    silence: Annotated[
        float, typer.Option("--silence", min=0.5, help="Seconds without a picture after which a source is lost.")
    ] = 10.0,
    window: Annotated[int, typer.Option("--window", min=1, max=64, help="Pictures under way to the edge at once.")] = 4,
    waiting: Annotated[int, typer.Option("--waiting", min=1, max=1000, help="Pictures that may wait for that.")] = 8,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: Token = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each picture sent.")] = False,
) -> None:
    """Send a camera's pictures to the edge."""
    if quality is not None and target_bytes is not None:
        raise typer.BadParameter("--quality and --target-bytes cannot both be given")
    largest = read_size(size) if size else None

    from edge.capture import Capture, Plan
    from edge.sources import FOLDER_FPS, Kind, Reading, find_source
    from shared.clients import CameraClient, CompressOptions, Delivery, Retry

    try:
        found = find_source(source)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None
    if (realtime or loop) and found.live:
        raise typer.BadParameter(f"--realtime and --loop are for files and folders; '{found.shown}' is live already")
    folder = found.kind is Kind.FOLDER
    plan = Plan(
        found,
        Reading(
            realtime,
            (fps if folder else None) or FOLDER_FPS,
            hardware,
            silence,
            tcp=not udp,
            device_size=largest,
            device_fps=fps,
        ),
        loop=loop,
        fps=None if folder else fps,
        largest=largest,
        motion=motion / 100,
        refresh_s=refresh,
        window=window,
        waiting=waiting,
    )
    client = CameraClient(
        connection(edge, ca, certificate, key, token, insecure),
        camera_id,
        options=CompressOptions(quality, target_bytes, Delivery(delivery.value), model_id=model),
        retry=Retry(give_up_s=None),
    )
    capture = Capture(plan, client, on_receipt=print_receipt if as_json else ignore, on_failure=Failures())
    watch_run(capture, camera_id)


def watch_run(capture: "Capture", camera_id: str) -> None:
    """Runs the capture in a thread, shows how it goes, stops it on SIGINT and SIGTERM, and says how it ended."""
    ended: list[BaseException] = []

    def run() -> None:
        try:
            capture.run()
        except BaseException as error:  # told by the main thread
            ended.append(error)

    thread = threading.Thread(target=run, name="capture")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: capture.stop())
    thread.start()
    show_until_end(capture, camera_id, thread)
    if ended:
        raise ended[0]
    counts = capture.status().counts
    print(f"{camera_id}: {told(counts)}", file=sys.stderr)
    if counts.failed:
        raise typer.Exit(1)


def show_until_end(capture: "Capture", camera_id: str, thread: threading.Thread) -> None:
    """One line that changes, on a terminal; a line every 10 s elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        thread.join(REPORT_S)
        while thread.is_alive():
            print(status_line(camera_id, capture.status()), file=sys.stderr, flush=True)
            thread.join(REPORT_S)
        return
    with console.status("opening the source") as line:
        while thread.is_alive():
            thread.join(LINE_S)
            line.update(status_line(camera_id, capture.status()))


def status_line(camera_id: str, status: "Status") -> str:
    parts = [
        camera_id,
        f"{status.fps:.1f} fps",
        f"{status.kbit_s:.0f} kbit/s",
        f"quality {status.quality:.2f}" if status.quality is not None else "quality -",
        f"backlog {status.waiting}",
        f"latency {status.latency_ms:.0f} ms" if status.latency_ms is not None else "latency -",
        told(status.counts),
    ]
    away = [status.away] if status.away else []
    away += [f"edge: {status.edge_away}"] if status.edge_away else []
    return "  ".join(parts) + (f"  ({'; '.join(away)}; trying again)" if away else "")


def told(counts: "Counts") -> str:
    """What became of the pictures; what never happened is left out."""
    rest = {
        "over the frame rate": counts.thinned,
        "unchanged": counts.unchanged,
        "dropped": counts.dropped,
        "failed": counts.failed,
        "reconnects": counts.reconnects,
    }
    return ", ".join([f"{counts.sent} sent", *(f"{number} {what}" for what, number in rest.items() if number)])


class Failures:
    """Says each failure, but not the same one over and over."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, error: "SightlineError") -> None:
        if str(error) != self._last:
            self._last = str(error)
            print(f"sightline: {error}", file=sys.stderr, flush=True)


def ignore(grab: "Grab", receipt: "Receipt") -> None:
    pass


def print_receipt(grab: "Grab", receipt: "Receipt") -> None:
    line: dict[str, Any] = {
        "frame": str(receipt.frame) if receipt.frame else None,
        "state": receipt.state.value,
        "captured": grab.captured.isoformat(),
        "width": receipt.width,
        "height": receipt.height,
        "quality": receipt.quality,
        "coded_bytes": receipt.coded_bytes,
        "bits_per_pixel": round(receipt.bits_per_pixel, 5),
        "edge_ms": round(receipt.timings.total_ms, 2),
    }
    # in one write, end of line included: several threads send
    print(f"{json.dumps(line)}\n", end="", flush=True)


def read_size(text: str) -> tuple[int, int]:
    """(width, height). Raises typer.BadParameter."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"expected a size as 640x360, got '{text}'")
    return int(width), int(height)
