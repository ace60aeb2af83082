"""Where a camera's pictures come from: a network stream, a V4L2 device, a video file, or a folder of pictures.

    address -> find_source -> Source -> read -> Grab, Grab, ... (one connection; who reconnects is edge/capture.py)

FFmpeg (through PyAV) opens and decodes everything but pictures in a folder, which pass the same border as those that
cameras send (`edge.images`). A Grab still is what the decoder made: what is thinned out or unchanged is never converted
to RGB. Live sources (streams, devices) are read as fast as they come, because what is not read makes them late; a file
is read as fast as it is taken, or at its own pace with `realtime`.

A stream's address may hold a password: messages show `Source.shown`, which does not.
"""

import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.video.reformatter import Colorspace, VideoReformatter
from numpy.typing import NDArray

from edge import images
from shared.errors import InvalidInput, InvalidSettings, SightlineError, Unavailable

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FOLDER_FPS = 1.0
_DAMAGED_IN_A_ROW = 100
_HARDWARE = ("cuda", "vaapi", "qsv", "videotoolbox", "d3d11va")  # in the order of preference
_HD_ROWS = 720


class Kind(Enum):
    STREAM = "stream"
    DEVICE = "device"
    FILE = "video file"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Source:
    """What an address means. `live`: it goes on whether somebody reads or not, and may come back after it went."""

    address: str
    kind: Kind

    @property
    def live(self) -> bool:
        return self.kind in (Kind.STREAM, Kind.DEVICE)

    @property
    def shown(self) -> str:
        """The address without user and password."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.address)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read. `realtime`: a file or folder at its own pace. `folder_fps`: pace of a folder. `hardware`: "auto",
    "none", or FFmpeg's name of a device type. `silence_s`: a live source that shows nothing for so long is lost.
    `tcp`: RTSP over TCP, which loses no packets, else UDP. `device_size` (width, height) and `device_fps`: what a
    device is asked for; its driver may choose another."""

    realtime: bool = False
    folder_fps: float = FOLDER_FPS
    hardware: str = "auto"
    silence_s: float = 10.0
    tcp: bool = True
    device_size: tuple[int, int] | None = None
    device_fps: float | None = None


@dataclass(frozen=True, slots=True)
class Grab:
    """One picture as the decoder made it. `time_s`: on the source's own clock. `captured`: by this machine's, UTC."""

    frame: av.VideoFrame
    time_s: float
    captured: datetime


class NotThere(Unavailable):
    """A source that was never there under this address: the address, the path or the password is wrong."""


def find_source(address: str) -> Source:
    """Raises InvalidInput if it is none."""
    if "://" in address:
        return Source(address, Kind.STREAM)
    path = Path(address)
    if path.is_dir():
        if not _pictures(path):
            raise InvalidInput(f"folder '{path}' has no file ending in {', '.join(sorted(PICTURE_SUFFIXES))}")
        return Source(address, Kind.FOLDER)
    if path.is_file():
        return Source(address, Kind.FILE)
    if re.fullmatch(r"/dev/video\d+", address) or (path.exists() and stat.S_ISCHR(path.stat().st_mode)):
        return Source(address, Kind.DEVICE)
    raise InvalidInput(
        f"expected a URL (rtsp://host/path), a device (/dev/video0), a video file or a folder, got '{address}'"
    )


def read(source: Source, how: Reading, stop: Event) -> Iterator[Grab]:
    """Pictures until the source ends or `stop` is set.

    Raises Unavailable when a live source is lost, NotThere when it was never there, InvalidInput for a file that cannot
    be read, InvalidSettings for hardware that is not there.
    """
    pictures = _read_folder(source, how) if source.kind is Kind.FOLDER else _read_video(source, how)
    start_s = time.monotonic()
    for frame, time_s in pictures:
        if how.realtime and not source.live:
            stop.wait(max(0.0, start_s + time_s - time.monotonic()))
        if stop.is_set():
            return
        yield Grab(frame, time.monotonic() if source.live else time_s, datetime.now(UTC))


def to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, largest: tuple[int, int] | None) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], upright. `largest`: (width, height) to fit into, sides kept in proportion; a picture
    that fits is not enlarged. Without a matrix of its own, a stream has BT.709 from 720 rows on, as usual."""
    width, height = frame.width, frame.height
    turned = frame.rotation % 180 != 0
    if largest is not None:
        fit_width, fit_height = (largest[1], largest[0]) if turned else largest
        scale = min(1.0, fit_width / width, fit_height / height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    untold = frame.format.name.startswith("yuv") and frame.colorspace == 2 and frame.height >= _HD_ROWS
    scaled = scaler.reformat(
        frame,
        width,
        height,
        "rgb24",
        src_colorspace=Colorspace.ITU709 if untold else None,
        interpolation="AREA" if width < frame.width else "BILINEAR",
    )
    rgb = scaled.to_ndarray().astype(np.uint8, copy=False)
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, quarters)) if quarters else rgb


@cache
def hardware() -> str | None:
    """FFmpeg's name of the first device type that can decode H.264 here; None: only software."""
    there = hwdevices_available()
    for name in _HARDWARE:
        if name not in there:
            continue
        try:
            wanted = HWAccel(name, allow_software_fallback=False)
            if av.CodecContext.create("h264", "r", hwaccel=wanted).is_hwaccel:
                return name
        except (av.FFmpegError, NotImplementedError, RuntimeError):
            continue  # the library knows the type, the machine does not have it
    return None


def _read_video(source: Source, how: Reading) -> Iterator[tuple[av.VideoFrame, float]]:
    with _open(source, how) as container:
        if not container.streams.video:
            raise NotThere(f"{source.shown} has no video stream")
        video = container.streams.video[0]
        # Threads that decode frames side by side hold some back, which a live picture should not wait for.
        video.thread_type = "SLICE" if source.live else "AUTO"
        first_s: float | None = None
        rate = float(video.average_rate or 25)
        for count, frame in enumerate(_decoded(source, container)):
            time_s = frame.time if frame.time is not None else count / rate
            first_s = time_s if first_s is None else first_s
            yield frame, time_s - first_s
    if source.live:
        raise Unavailable(f"{source.shown} ended the stream")


def _decoded(source: Source, container: Any) -> Iterator[av.VideoFrame]:
    damaged = 0
    packets = container.demux(container.streams.video[0])
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError as error:
            raise _lost(source, error) from None
        try:
            frames = packet.decode()
            damaged = 0
        except av.InvalidDataError as error:
            damaged += 1  # joined between two key frames, or a packet was lost: the next key frame mends it
            if damaged >= _DAMAGED_IN_A_ROW:
                raise _lost(source, error) from None
            continue
        except av.FFmpegError as error:
            raise _lost(source, error) from None
        yield from frames


def _open(source: Source, how: Reading) -> Any:
    options: dict[str, str] = {}
    form = None
    if source.kind is Kind.DEVICE:
        form = "v4l2"
        if how.device_size is not None:
            options["video_size"] = "{}x{}".format(*how.device_size)
        if how.device_fps is not None:
            options["framerate"] = f"{how.device_fps:g}"
    elif source.address.startswith(("rtsp://", "rtsps://")):
        options = {"rtsp_transport": "tcp" if how.tcp else "udp", "fflags": "nobuffer"}
    timeout = (how.silence_s, how.silence_s) if source.live else None
    try:
        return av.open(
            source.address, format=form, options=options, timeout=timeout, hwaccel=_acceleration(how.hardware)
        )
    except (av.HTTPClientError, av.FileNotFoundError, av.ProtocolNotFoundError, av.PermissionError) as error:
        raise NotThere(f"{source.shown} cannot be opened: {_reason(error)}") from None
    except av.FFmpegError as error:
        raise _lost(source, error) from None


def _acceleration(wanted: str) -> HWAccel | None:
    if wanted == "none":
        return None
    if wanted == "auto":
        found = hardware()
        return HWAccel(found, allow_software_fallback=True) if found else None
    if wanted not in hwdevices_available():
        raise InvalidSettings(
            f"expected hardware out of auto, none, {', '.join(sorted(hwdevices_available()))}, got {wanted!r}"
        )
    return HWAccel(wanted, allow_software_fallback=True)


def _lost(source: Source, error: av.FFmpegError) -> SightlineError:
    if source.live:
        return Unavailable(f"{source.shown} is lost: {_reason(error)}")
    return InvalidInput(f"{source.shown} cannot be read as video: {_reason(error)}")


def _reason(error: av.FFmpegError) -> str:
    """FFmpeg's words without the address, which may hold a password."""
    if isinstance(error, av.ExitError):
        return "nothing came in time"
    return error.strerror or type(error).__name__


def _read_folder(source: Source, how: Reading) -> Iterator[tuple[av.VideoFrame, float]]:
    for count, path in enumerate(_pictures(Path(source.address))):
        try:
            rgb = images.decode(images.open_file(path.read_bytes(), images.ImageLimits())).rgb
        except SightlineError as error:
            raise type(error)(f"{path}: {error}") from None
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"), count / how.folder_fps


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
