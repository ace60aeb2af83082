"""The classical codecs Sightline is measured against, each coding one picture as a deployed encoder would.

    rgb --resize to scale--> --replicate to even sides--> encoder --> bytes --> decoder --crop--> --resize back--> rgb

* VVC: libvvenc, all-intra, 10 bit, `-qpa 0` (the perceptual default shifts the curve by about five QP).
* HEVC: x265, all-intra, 10 bit, `info=0`, tuned for PSNR, one QP for the whole picture.
* AV1: libaom, all-intra still picture, 10 bit, constant quality.
* JPEG: Pillow, 4:2:0, optimised Huffman tables.

The video encoders come with imageio-ffmpeg. RGB becomes BT.601 limited-range 4:2:0 and comes back by the same matrix
and range, both named explicitly; swscale runs bit-exactly, so that a decode is the same everywhere. Everything is
single-threaded: parallelism is over pictures.

libvvenc lowers an intra slice's QP by three: `-qp 37` codes a slice of QP 34. The labels here are what `-qp` was given.
libvvenc prints to stdout, so streams are written to files, never to a pipe.
"""

import io
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import InvalidSettings, Unavailable
from trainer.evaluation.bits import av1_picture_bits, hevc_picture_bits, jpeg_picture_bits, vvc_picture_bits

Rgb = NDArray[np.uint8]  # [height, width, 3]

SCALES = (100, 75, 50, 25)  # percent of each side
_SWS = "flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
_TO_YUV = f"scale=in_range=full:out_range=limited:out_color_matrix=bt601:{_SWS},format=yuv420p10le"
_TO_RGB = f"scale=in_range=limited:in_color_matrix=bt601:out_range=full:{_SWS},format=rgb24"
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """One setting of an anchor: its quantiser (QP, CRF or JPEG quality) and the coded size in percent of each side."""

    quantiser: int
    scale: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 100:
            raise InvalidSettings(f"scale must be in [1, 100] percent, got {self.scale}")

    def __str__(self) -> str:
        return f"{self.quantiser}@{self.scale}"


@dataclass(frozen=True, slots=True)
class CodedPicture:
    """One picture coded by an anchor. `picture_bits`: see `bits`; `encode_s`: wall time, process start included."""

    data: bytes
    picture_bits: int
    encode_s: float


@dataclass(frozen=True, slots=True)
class Anchor:
    """A codec with fixed settings. `quantisers`: its grid, finest first. `identity`: whatever decides its bytes."""

    name: str
    quantisers: tuple[int, ...]
    settings: str
    decoder: str
    compress: Callable[[Rgb, int], bytes] = field(repr=False)
    expand: Callable[[bytes, int, int], Rgb] = field(repr=False)
    count_bits: Callable[[bytes], int] = field(repr=False)
    scales: tuple[int, ...] = SCALES

    @property
    def identity(self) -> str:
        return f"{self.name}|{self.settings}|resize=lanczos|pad=replicate-even"

    @property
    def decoding(self) -> str:
        """Whatever decides the decoded pixels, given the bytes."""
        return f"{self.decoder}|resize=bicubic"

    @property
    def points(self) -> list[Point]:
        """The whole grid, cheapest first, so that an interrupted run has the low rates at every size."""
        coarse_first = sorted(self.quantisers, key=self.quantisers.index, reverse=True)
        return [Point(quantiser, scale) for quantiser in coarse_first for scale in sorted(self.scales)]

    def encode(self, rgb: Rgb, point: Point) -> CodedPicture:
        """uint8 [height, width, 3] -> its coded form at `point`. Raises Unavailable if the encoder fails."""
        small = _to_even(reduced(rgb, point.scale))
        start = time.perf_counter()
        data = self.compress(small, point.quantiser)
        return CodedPicture(data, self.count_bits(data), time.perf_counter() - start)

    def decode(self, data: bytes, point: Point, height: int, width: int) -> Rgb:
        """The coded form -> uint8 [height, width, 3] at the original size."""
        small_height, small_width = coded_size(height, width, point.scale)
        even = self.expand(data, small_height + small_height % 2, small_width + small_width % 2)
        return restored(even[:small_height, :small_width], height, width)


def coded_size(height: int, width: int, scale: int) -> tuple[int, int]:
    """Sides in pixels at `scale` percent, rounded, at least 1."""
    return max(1, round(height * scale / 100)), max(1, round(width * scale / 100))


def vvc(preset: str = "slower") -> Anchor:
    """`preset`: faster, fast, medium, slow or slower; the published table takes slower."""
    arguments = ("-c:v", "libvvenc", "-preset", preset, "-qpa", "0", "-g", "1", "-qp", "{q}")
    quantisers = (22, 27, 32, 37, 42, 47, 52)
    return _ffmpeg_anchor(f"vvc-{preset}", "libvvenc", "vvc", arguments, quantisers, vvc_picture_bits)


def hevc(preset: str = "slower") -> Anchor:
    """QP 21 to 51, the end of HEVC's range; `ipratio=1` makes the intra picture's QP the one that was asked for."""
    arguments = ("-c:v", "libx265", "-preset", preset, "-tune", "psnr", "-x265-params")
    arguments += ("qp={q}:keyint=1:ipratio=1:info=0:pools=1:frame-threads=1:log-level=error",)
    quantisers = (21, 26, 31, 36, 41, 46, 51)
    return _ffmpeg_anchor(f"hevc-{preset}", "libx265", "hevc", arguments, quantisers, hevc_picture_bits)


def av1(cpu_used: int = 4) -> Anchor:
    arguments = ("-c:v", "libaom-av1", "-usage", "allintra", "-cpu-used", str(cpu_used), "-still-picture", "1")
    arguments += ("-tune", "psnr", "-b:v", "0", "-crf", "{q}")
    quantisers = (15, 23, 31, 39, 47, 55, 63)
    return _ffmpeg_anchor(f"av1-cpu{cpu_used}", "libaom-av1", "obu", arguments, quantisers, av1_picture_bits)


def jpeg() -> Anchor:
    import PIL
    from PIL import features

    library = f"pillow={PIL.__version__}|jpeg={features.version('jpg')}"
    return Anchor(
        name="jpeg",
        quantisers=(90, 75, 55, 35, 20, 10, 5),
        settings=f"{library}|subsampling=4:2:0|optimize",
        decoder=library,
        compress=_jpeg_compress,
        expand=_jpeg_expand,
        count_bits=jpeg_picture_bits,
    )


def anchor_by_name(name: str) -> Anchor:
    """`jpeg`, `hevc`, `av1` or `vvc`, the last three with an optional preset: `vvc:medium`, `hevc:slower`, `av1:4`."""
    family, _, preset = name.partition(":")
    if family == "jpeg" and not preset:
        return jpeg()
    if family == "vvc" and preset in ("", "faster", "fast", "medium", "slow", "slower"):
        return vvc(preset) if preset else vvc()
    if family == "hevc" and preset in ("", "ultrafast", "fast", "medium", "slow", "slower", "veryslow"):
        return hevc(preset) if preset else hevc()
    if family == "av1" and (not preset or (preset.isdigit() and int(preset) <= 9)):
        return av1(int(preset)) if preset else av1()
    raise InvalidSettings(f"anchor must be jpeg, hevc[:PRESET], av1[:0..9] or vvc[:PRESET], got {name!r}")


@cache
def ffmpeg_program() -> tuple[str, str, frozenset[str]]:
    """Path, version line and encoder names of imageio-ffmpeg's ffmpeg. Raises Unavailable if there is none."""
    try:
        import imageio_ffmpeg

        path = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"the HEVC, AV1 and VVC anchors need imageio-ffmpeg with its binary: {error}") from error
    version = _run([path, "-version"]).stdout.decode().splitlines()[0]
    listing = _run([path, "-hide_banner", "-encoders"]).stdout.decode().splitlines()
    return path, version, frozenset(line.split()[1] for line in listing if line.startswith(" V") and " = " not in line)


def _ffmpeg_anchor(
    name: str,
    encoder: str,
    container: str,
    arguments: tuple[str, ...],
    quantisers: tuple[int, ...],
    count_bits: Callable[[bytes], int],
) -> Anchor:
    path, version, encoders = ffmpeg_program()
    if encoder not in encoders:
        raise Unavailable(f"anchor {name} needs the encoder {encoder}, which {version!r} ({path}) does not have")

    def compress(rgb: Rgb, quantiser: int) -> bytes:
        height, width = rgb.shape[:2]
        with tempfile.TemporaryDirectory(prefix="sightline-anchor-") as folder:
            out = Path(folder) / "coded"
            command = [path, "-hide_banner", "-nostdin", "-loglevel", "error", "-filter_threads", "1"]
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1", "-i", "pipe:0"]
            command += ["-frames:v", "1", "-vf", _TO_YUV, "-threads", "1"]
            command += [argument.replace("{q}", str(quantiser)) for argument in arguments]
            done = _run([*command, "-f", container, str(out)], rgb.tobytes())
            if not out.exists() or not out.stat().st_size:
                raise Unavailable(f"{encoder} wrote nothing at {width}x{height}, q {quantiser}: {_tail(done.stderr)}")
            return out.read_bytes()

    def expand(data: bytes, height: int, width: int) -> Rgb:
        command = [path, "-hide_banner", "-nostdin", "-loglevel", "error", "-filter_threads", "1", "-threads", "1"]
        command += ["-f", container, "-i", "pipe:0", "-frames:v", "1", "-vf", _TO_RGB, "-f", "rawvideo", "pipe:1"]
        done = _run(command, data)
        if len(done.stdout) != height * width * 3:
            got = f"{len(done.stdout)} bytes for {width}x{height}"
            raise Unavailable(f"{name} did not decode, got {got}: {_tail(done.stderr)}")
        return np.frombuffer(done.stdout, np.uint8).reshape(height, width, 3)

    settings = f"{version}|{' '.join(arguments)}|{_TO_YUV}"
    return Anchor(name, quantisers, settings, f"{version}|{_TO_RGB}", compress, expand, count_bits)


def _run(command: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(command[0]).name} took longer than {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name} exited with {done.returncode}: {_tail(done.stderr)}")
    return done


def _tail(log: bytes) -> str:
    return log.decode(errors="replace").strip()[-400:]


def _jpeg_compress(rgb: Rgb, quantiser: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=quantiser, subsampling="4:2:0", optimize=True)
    return out.getvalue()


def _jpeg_expand(data: bytes, height: int, width: int) -> Rgb:
    rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if rgb.shape != (height, width, 3):
        raise Unavailable(f"JPEG decoded to {rgb.shape[1]}x{rgb.shape[0]}, expected {width}x{height}")
    return rgb


def reduced(rgb: Rgb, scale: int) -> Rgb:
    """What a codec is given at `scale` percent of each side."""
    return _resized(rgb, *coded_size(rgb.shape[0], rgb.shape[1], scale), Image.Resampling.LANCZOS)


def restored(rgb: Rgb, height: int, width: int) -> Rgb:
    """What comes back of it, at the size that the picture had."""
    return _resized(rgb, height, width, Image.Resampling.BICUBIC)


def _resized(rgb: Rgb, height: int, width: int, filter_: Image.Resampling) -> Rgb:
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize((width, height), filter_))


def _to_even(rgb: Rgb) -> Rgb:
    height, width = rgb.shape[:2]
    return np.ascontiguousarray(np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
