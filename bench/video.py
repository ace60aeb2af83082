"""A fixed camera's video through edge and cloud, its bits beside x264's and x265's at the same detection result.

    python -m bench.video VIDEO [--start 0] [--frames 45] [--every 1] [--look 3] [--rtsp] [--keep FILE] [--json]

The same pictures are coded by everybody: `--frames` of them, every `--every`th of the file from `--start` on; the task
model looks at every `--look`th of these, because looking is what takes the time. Sightline's go through real edge and
cloud processes, one Compress call each, and their detections come back through Subscribe. x264 and x265 (the ffmpeg of
imageio-ffmpeg, preset medium) code them as a video and the same task model looks at what they decode to: "live" as a
camera is set, without look-ahead and B pictures and with a key picture every 4 s; "file" with all that they have.
Parameter sets and SEI are left out of their bits; Sightline's per-picture header is left in its own.

Detection result, over all categories or, with `--people`, of people alone: agreement with what the task model finds on
the uncoded pictures (boxes of score 0.5 and more as the truth, COCO's AP over IoU 0.5 to 0.95). A video codec's bits at
Sightline's result are read from its curve, interpolated in the logarithm of the rate; beyond the curve's ends there is
none.

The rows "+ gate" are Sightline behind the camera command's motion gate: pictures in which less than `--motion` percent
changed are not sent and keep the detections of the last that was.

`--rtsp` reads the file as a network camera's stream, from GStreamer's RTSP server at its own pace.

`--keep FILE` writes each point as it is measured; a run with the same file and flags goes on where one was ended.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from rich.console import Console
from rich.table import Table

from bench.rtsp import NEEDS, RtspServer, available, file
from cli.codecs import find_named
from cli.demo.run import cloud_flags, edge_flags
from cli.demo.services import Service, service
from cli.progress import bar
from cloud.tasks import load_task
from cloud.tasks.types import TaskModel
from edge.motion import MotionGate
from edge.sources import Grab, Reading, find_source, read, to_rgb
from shared.clients import CameraClient, CompressOptions, Delivery, DetectionClient, DetectionEvent, FrameName, Start
from shared.errors import SightlineError, Unavailable
from trainer.evaluation.accuracy import as_truth
from trainer.evaluation.anchors import ffmpeg_program
from trainer.evaluation.bdrate import front_curve
from trainer.evaluation.bits import hevc_picture_bits, nal_units
from trainer.evaluation.detections import as_found
from trainer.evaluation.matching import Found, match, score

TASK = "faster-rcnn-mobilenetv2"
QUALITIES = (1.0, 2.0, 3.0, 4.0, 6.0)
CRFS = (20, 28, 36, 42, 48)
KEY_S = 4.0
MIN_SCORE = 0.1  # the cloud's default, and so everybody's
CATEGORIES = tuple(range(1, 91))
_H264_PICTURES = (1, 2, 3, 4, 5)  # NAL unit types of slices, H.264 table 7-1


@dataclass(frozen=True, slots=True)
class Point:
    """One coder at one setting. `agreement`: see the head of this module, over all categories and of people alone;
    `sent`: pictures that cost bits."""

    coder: str
    setting: float
    kbit_s: float
    agreement: float
    person_agreement: float
    sent: int


@dataclass(frozen=True, slots=True)
class Clip:
    """Pictures of a fixed camera. `rgb`: uint8 [height, width, 3] each; `fps`: of these pictures; `looked`: indices of
    those that the task model sees."""

    grabs: list[Grab]
    rgb: list[np.ndarray]
    fps: float
    looked: range

    def kbit_s(self, bits: int) -> float:
        return bits / 1000 / (len(self.rgb) / self.fps)


def read_clip(path: str, start: int, frames: int, every: int, look: int, *, rtsp: bool = False) -> Clip:
    scaler = VideoReformatter()
    with streamed(path) if rtsp else nullcontext(path) as source:
        found = read(find_source(source), Reading(hardware="none"), Event())
        grabs = list(islice(found, start, start + frames * every, every))
    if len(grabs) < 2:
        raise SightlineError(f"expected at least 2 pictures in {path}, got {len(grabs)}")
    fps = (len(grabs) - 1) / (grabs[-1].time_s - grabs[0].time_s)
    rgb = [to_rgb(grab.frame, scaler, None) for grab in grabs]
    return Clip(grabs, rgb, fps, range(0, len(rgb), look))


@contextmanager
def streamed(path: str) -> Iterator[str]:
    """The address at which an RTSP server plays the file while this is open."""
    if not available():
        raise Unavailable(f"--rtsp needs {NEEDS}")
    server = RtspServer(file(Path(path).resolve())).start()
    try:
        yield server.address
    finally:
        server.kill()


class Points:
    """What was measured, in the order of measuring, kept in a file where there is one."""

    def __init__(self, file: Path | None, about: dict[str, object]) -> None:
        self._file = file
        self._about = about
        self._of: dict[tuple[str, float], Point] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                kept = json.loads(line)
                if kept["about"] == about:
                    self._note(Point(**kept["point"]))

    def _note(self, point: Point) -> None:
        self._of[point.coder, point.setting] = point

    def add(self, point: Point) -> None:
        self._note(point)
        if self._file is not None:
            with self._file.open("a") as lines:
                lines.write(json.dumps({"about": self._about, "point": asdict(point)}) + "\n")

    def has(self, coder: str, setting: float) -> bool:
        return (coder, setting) in self._of

    def all(self) -> list[Point]:
        return list(self._of.values())


def detect(task: TaskModel, pictures: Sequence[np.ndarray]) -> list[Found]:
    return [
        as_found(task.predict([torch.from_numpy(rgb).permute(2, 0, 1)], MIN_SCORE)[0], with_masks=False)
        for rgb in pictures
    ]


def agreement(originals: Sequence[Found], found: Sequence[Found]) -> tuple[float, float]:
    """Over all categories, and of people; in [0, 1], NaN where the originals hold none."""
    scores = score(match([as_truth(one) for one in originals], found, CATEGORIES, "box"))
    return float(scores.ap.reshape(-1)[0]), float(scores.person_ap.reshape(-1)[0])


# -- Sightline, through its services --------------------------------------------------------------------------------


def through_services(clip: Clip, originals: Sequence[Found], motion: float, points: Points) -> None:
    missing = [quality for quality in QUALITIES if not points.has("sightline + gate", quality)]
    if not missing:
        return
    gate = MotionGate(motion / 100, 10.0)
    opened = [gate.opens(grab.frame, grab.time_s) for grab in clip.grabs]
    stands_for = np.maximum.accumulate([i if is_open else 0 for i, is_open in enumerate(opened)]).tolist()
    wanted = {*clip.looked, *(stands_for[i] for i in clip.looked)}
    with tempfile.TemporaryDirectory(prefix="sightline-video-") as name:
        folder, bundle = Path(name), find_named("detection")
        with bar() as progress, service("cloud", cloud_flags(bundle, TASK, folder), folder) as cloud:
            wait_ready(cloud)
            with service("edge", edge_flags(bundle, folder, cloud.address), folder) as edge:
                wait_ready(edge)
                for quality in progress.track(missing, description="sightline"):
                    sizes, found = send(clip, wanted, edge.address, cloud.address, quality)
                    points.add(point("sightline", quality, clip, sizes, originals, [found[i] for i in clip.looked]))
                    kept = [size for size, is_open in zip(sizes, opened, strict=True) if is_open]
                    seen = [found[stands_for[i]] for i in clip.looked]
                    points.add(point("sightline + gate", quality, clip, kept, originals, seen))


def point(
    coder: str, setting: float, clip: Clip, sizes: list[int], originals: Sequence[Found], found: Sequence[Found]
) -> Point:
    return Point(coder, setting, clip.kbit_s(8 * sum(sizes)), *agreement(originals, found), len(sizes))


def send(clip: Clip, wanted: set[int], edge: str, cloud: str, quality: float) -> tuple[list[int], dict[int, Found]]:
    """Every picture's size in bytes, and the detections of those `wanted`, from the cloud's log."""
    names: dict[FrameName, int] = {}
    sizes = []
    options = CompressOptions(quality=quality)
    with CameraClient(edge, f"bench-{quality:g}") as camera:
        for i, rgb in enumerate(clip.rgb):
            delivery = Delivery.SPOOLED if i in wanted else Delivery.NONE
            receipt = camera.compress(rgb, replace(options, delivery=delivery))
            sizes.append(receipt.coded_bytes)
            if receipt.frame is not None:
                names[receipt.frame] = i
    found: dict[int, Found] = {}
    with DetectionClient(cloud) as consumer:
        for event in consumer.events(Start.BEGINNING):
            if event.frame in names:
                found[names[event.frame]] = found_in(event)
            if len(found) == len(names):
                break
    return sizes, found


def found_in(event: DetectionEvent) -> Found:
    boxes = [(d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max) for d in event.detections]
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([d.score for d in event.detections], np.float32),
        np.array([d.category_id for d in event.detections], np.int64),
        None,
    )


def wait_ready(one: Service) -> None:
    import asyncio

    asyncio.run(one.wait_ready())


# -- video codecs ---------------------------------------------------------------------------------------------------


def video_points(clip: Clip, task: TaskModel, originals: Sequence[Found], points: Points, *, live: bool) -> None:
    name = "live" if live else "file"
    settings = [(coder, crf) for coder in ("x264", "x265") for crf in CRFS]
    settings = [(coder, crf) for coder, crf in settings if not points.has(f"{coder} {name}", crf)]
    with bar() as progress:
        for coder, crf in progress.track(settings, description=f"x264 and x265 {name}"):
            stream = encode(clip, coder, crf, live=live)
            bits = h264_picture_bits(stream) if coder == "x264" else hevc_picture_bits(stream)
            decoded = decode(clip, stream, coder)
            found = detect(task, [decoded[i] for i in clip.looked])
            rate = clip.kbit_s(bits)
            points.add(Point(f"{coder} {name}", crf, rate, *agreement(originals, found), len(clip.rgb)))


def encode(clip: Clip, coder: str, crf: int, *, live: bool) -> bytes:
    height, width = clip.rgb[0].shape[:2]
    key = ["-g", str(round(KEY_S * clip.fps)), "-tune", "zerolatency"] if live else []
    quiet = ["-x265-params", "log-level=error:info=0"] if coder == "x265" else []
    with tempfile.TemporaryDirectory(prefix="sightline-video-") as folder:
        out = Path(folder) / "stream"
        run(
            [
                *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{clip.fps:.4f}", "-i", "-"),
                *("-c:v", f"lib{coder}", "-preset", "medium", "-crf", str(crf), *key, *quiet, "-pix_fmt", "yuv420p"),
                *("-f", "h264" if coder == "x264" else "hevc", str(out)),
            ],
            b"".join(rgb.tobytes() for rgb in clip.rgb),
        )
        return out.read_bytes()


def decode(clip: Clip, stream: bytes, coder: str) -> list[np.ndarray]:
    form = "h264" if coder == "x264" else "hevc"
    raw = run(["-f", form, "-i", "-", "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-"], stream)
    pictures = np.frombuffer(raw, np.uint8).reshape(-1, *clip.rgb[0].shape)
    if len(pictures) != len(clip.rgb):
        raise SightlineError(f"expected {len(clip.rgb)} pictures from {coder}, got {len(pictures)}")
    return [picture.copy() for picture in pictures]


def run(arguments: list[str], given: bytes) -> bytes:
    path, _, _ = ffmpeg_program()
    command = [path, "-hide_banner", "-loglevel", "error", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        raise Unavailable(f"ffmpeg ended with {done.returncode}: {done.stderr.decode(errors='replace')[-400:]}")
    return done.stdout


def h264_picture_bits(stream: bytes) -> int:
    return 8 * sum(len(unit) for unit in nal_units(stream) if unit[0] & 0x1F in _H264_PICTURES)


# -- at the same result ---------------------------------------------------------------------------------------------


def rate_at(points: Sequence[Point], people: bool, wanted: float) -> float | None:
    """kbit/s of a coder at an agreement; None beyond its curve."""
    front = front_curve([point.kbit_s for point in points], [result(point, people) for point in points])
    if not front.accuracy[0] <= wanted <= front.accuracy[-1]:
        return None
    return float(np.exp(np.interp(wanted, front.accuracy, np.log(front.bpp))))


def result(point: Point, people: bool) -> float:
    return point.person_agreement if people else point.agreement


def report(points: Sequence[Point], people: bool, console: Console) -> None:
    coders = list(dict.fromkeys(point.coder for point in points))
    peers = [coder for coder in coders if coder.startswith("x")]
    curves = Table(title="Rate and detection result")
    for name in ("coder", "setting", "pictures sent", "kbit/s", "agreement", "of people"):
        curves.add_column(name, justify="left" if name == "coder" else "right")
    for point in points:
        results = (f"{point.agreement:.3f}", f"{point.person_agreement:.3f}")
        curves.add_row(point.coder, f"{point.setting:g}", str(point.sent), f"{point.kbit_s:.1f}", *results)
    console.print(curves)
    same = Table(title="A video codec's kbit/s at Sightline's detection result (Sightline's rate over its)")
    same.add_column("coder")
    for name in ("quality", "kbit/s", *peers):
        same.add_column(name, justify="right")
    for point in points:
        if point.coder.startswith("sightline"):
            row = []
            for peer in peers:
                rate = rate_at([one for one in points if one.coder == peer], people, result(point, people))
                row.append("beyond its curve" if rate is None else f"{rate:.1f} ({point.kbit_s / rate:.2f}x)")
            same.add_row(point.coder, f"{point.setting:g}", f"{point.kbit_s:.1f}", *row)
    console.print(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="a video file of a camera that does not move")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--frames", type=int, default=45)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--look", type=int, default=3)
    parser.add_argument("--motion", type=float, default=0.5, help="percent, as in sightline camera --motion")
    parser.add_argument("--people", action="store_true", help="compare at the same result on people alone")
    parser.add_argument("--rtsp", action="store_true", help="read the file through an RTSP server")
    parser.add_argument("--keep", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    about = {name: value for name, value in vars(given).items() if name not in ("people", "keep", "json")}
    points = Points(given.keep, about)
    clip = read_clip(given.video, given.start, given.frames, given.every, given.look, rtsp=given.rtsp)
    task = load_task(TASK)
    originals = detect(task, [clip.rgb[i] for i in clip.looked])
    through_services(clip, originals, given.motion, points)
    for live in (True, False):
        video_points(clip, task, originals, points, live=live)
    if given.json:
        print(json.dumps([asdict(point) for point in points.all()], indent=1))
        return 0
    console = Console(width=140)
    height, width = clip.rgb[0].shape[:2]
    console.print(
        f"{Path(given.video).name}: {len(clip.rgb)} pictures of {width}x{height}, {clip.fps:.2f} a second, "
        f"{len(clip.looked)} looked at; "
        f"{TASK}; {ffmpeg_program()[1]}"
    )
    report(points.all(), given.people, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
