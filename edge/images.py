"""The image border: bytes that a camera sent become a Frame, or an error that says what was expected and what came.

Order, so that nothing a stranger sends can cost more than it should:

    first bytes -> format -> size in the file's header -> limits -> only then a decoder sees it

The header is read here and not by the decoder, because some decoders allocate the picture when they open the file
(libwebp's animation decoder does). A decoder that finds another size than the header told is an error.

What a picture means:
  * An EXIF orientation is applied: detectors have learned upright pictures, and boxes are given in what a person sees.
  * Transparency is laid over white, as a browser shows it; colours hidden below it would be noise to the codec.
  * 16-bit samples are scaled to 8 bits (Pillow would clip grey ones), palettes and CMYK are converted to RGB, grey is
    repeated in all three channels. Colour profiles are not applied. Of an animation the first picture is taken.
  * NV12 is ITU-R BT.601, limited range, each chroma sample used for its 2x2 pixels, in integers:
    C = Y - 16, D = U - 128, E = V - 128;  R = (298 C + 409 E + 128) >> 8,  G = (298 C - 100 D - 208 E + 128) >> 8,
    B = (298 C + 516 D + 128) >> 8, each clamped to [0, 255]. GRAY8, RGB24 and BGR24 are full range.
"""

import io
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numba
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.codec.types import MAX_SIDE, Frame
from shared.errors import InvalidImage, TooLarge

MAX_JPEG_SCANS = 64  # a progressive JPEG of cameras and editors has about 10; each scan costs a pass over the picture
_ORIENTATION_TAG = 0x0112
_OTHER_FORMATS = {
    b"GIF8": "a GIF file",
    b"BM": "a BMP file",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"%PDF": "a PDF file",
    b"\0\0\x01\0": "an ICO file",
    b"<": "a text file",
    b"{": "a text file",
}


class PixelFormat(Enum):
    """Layouts of raw pictures; see the head of this module."""

    RGB24 = "RGB24"
    BGR24 = "BGR24"
    NV12 = "NV12"
    GRAY8 = "GRAY8"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """`max_side` in pixels, at most 8192; `max_pixels` is width times height; `max_decode_s` of a file's decoder."""

    max_side: int = MAX_SIDE
    max_pixels: int = 40_000_000
    max_decode_s: float = 10.0

    def check(self, width: int, height: int) -> None:
        """Raises InvalidImage for a picture without pixels, TooLarge over a limit."""
        if width < 1 or height < 1:
            raise InvalidImage(f"expected a picture of at least 1x1 pixels, got {width}x{height}")
        if width > self.max_side or height > self.max_side:
            raise TooLarge(f"expected sides of at most {self.max_side} pixels, got {width}x{height}")
        if width * height > self.max_pixels:
            raise TooLarge(f"expected at most {self.max_pixels} pixels, got {width}x{height} = {width * height}")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file whose format and size (pixels, before orientation) were read from its header and are within limits."""

    form: str
    width: int
    height: int
    data: bytes
    max_decode_s: float


class _TimedFile(io.BytesIO):
    """A file whose reader is stopped when its time is over: decoders read on as they work, 64 KiB at a time."""

    def __init__(self, data: bytes, max_s: float) -> None:
        super().__init__(data)
        self._max_s = max_s
        self._end = time.monotonic() + max_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._end:
            raise TooLarge(f"expected a picture that is decoded within {self._max_s:g} s, this one takes longer")
        return super().read(size)


@dataclass(frozen=True, slots=True)
class RawPicture:
    """Pixels whose length fits their layout and size, within limits."""

    pixel_format: PixelFormat
    width: int
    height: int
    data: bytes


def open_file(data: bytes, limits: ImageLimits) -> ImageFile:
    """Reads the header of a JPEG, PNG or WebP file and nothing more. Raises InvalidImage, TooLarge."""
    if not data:
        raise InvalidImage("expected a JPEG, PNG or WebP file, got 0 bytes")
    form, size = _sniff(data)
    try:
        width, height = size(data)
    except (struct.error, IndexError):
        raise InvalidImage(f"expected a whole {form} file, got {len(data)} bytes that end inside its header") from None
    limits.check(width, height)
    if form == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise TooLarge(f"expected a JPEG file of at most {MAX_JPEG_SCANS} scans, got {scans}")
    return ImageFile(form, width, height, data, limits.max_decode_s)


def open_raw(pixel_format: PixelFormat, width: int, height: int, data: bytes, limits: ImageLimits) -> RawPicture:
    """Checks raw pixels against their layout. Raises InvalidImage, TooLarge."""
    limits.check(width, height)
    if pixel_format is PixelFormat.NV12:
        if width % 2 or height % 2:
            raise InvalidImage(f"expected even sides for NV12, got {width}x{height}")
        expected = width * height * 3 // 2
    else:
        expected = width * height * (1 if pixel_format is PixelFormat.GRAY8 else 3)
    if len(data) != expected:
        raise InvalidImage(
            f"expected {expected} bytes for {pixel_format.value} of {width}x{height} pixels, got {len(data)}"
        )
    return RawPicture(pixel_format, width, height, data)


def decode(picture: ImageFile | RawPicture) -> Frame:
    """The pixels. Pure and slow, so call it off the event loop. Raises InvalidImage, TooLarge."""
    return _decode_file(picture) if isinstance(picture, ImageFile) else _decode_raw(picture)


def _sniff(data: bytes) -> tuple[str, Callable[[bytes], tuple[int, int]]]:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg_size
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", _png_size
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP", _webp_size
    what = next((name for start, name in _OTHER_FORMATS.items() if data.startswith(start)), None)
    if what is None and data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):
        what = "a HEIC or AVIF file"
    got = what or f"{len(data)} bytes that start with 0x{data[:8].hex()}"
    raise InvalidImage(f"expected a JPEG, PNG or WebP file, got {got}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of the first frame header (ITU-T T.81, B.2.2)."""
    at = 2
    while True:
        while data[at] != 0xFF:  # some writers leave bytes between segments
            at += 1
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker in (0xD9, 0xDA):
            raise InvalidImage("expected a JPEG file with a frame header before its first scan, got none")
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            at += max(2, struct.unpack_from(">H", data, at)[0])


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height of the IHDR chunk (PNG, 11.2.1)."""
    if len(data) >= 16 and data[12:16] != b"IHDR":
        raise InvalidImage(f"expected IHDR as the first chunk of a PNG file, got {data[12:16]!r}")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas, or of the only picture (WebP container, RFC 9649)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        low = struct.unpack_from("<HBHB", data, 24)
        return 1 + low[0] + (low[1] << 16), 1 + low[2] + (low[3] << 16)
    if chunk == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise InvalidImage(f"expected a VP8, VP8L or VP8X chunk first in a WebP file, got {chunk!r}")


def _decode_file(file: ImageFile) -> Frame:
    try:
        with Image.open(_TimedFile(file.data, file.max_decode_s), formats=(file.form.upper(),)) as image:
            if image.size != (file.width, file.height):
                raise InvalidImage(
                    f"expected the {file.width}x{file.height} pixels of the {file.form} header, "
                    f"the picture inside has {image.size[0]}x{image.size[1]}"
                )
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
    except (InvalidImage, TooLarge, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InvalidImage(
            f"expected a whole {file.form} file, got {len(file.data)} bytes that cannot be decoded: {error}"
        ) from None
    return Frame(_turn(rgb, orientation))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the picture
        return 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, over)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _turn(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an EXIF orientation (Exif 2.32, tag 0x0112): 1 is upright, 2 to 8 are mirrored or turned."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _decode_raw(picture: RawPicture) -> Frame:
    width, height = picture.width, picture.height
    samples = np.frombuffer(picture.data, dtype=np.uint8)
    if picture.pixel_format is PixelFormat.NV12:
        return Frame(_nv12_to_rgb(samples[: width * height].reshape(height, width), samples[width * height :]))
    if picture.pixel_format is PixelFormat.GRAY8:
        return Frame(np.repeat(samples.reshape(height, width, 1), 3, axis=2))
    rgb = samples.reshape(height, width, 3)
    return Frame(np.ascontiguousarray(rgb[:, :, ::-1]) if picture.pixel_format is PixelFormat.BGR24 else rgb.copy())


def _convert_nv12(luma: NDArray[np.uint8], chroma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [height, width] and [height * width / 2] to uint8 [height, width, 3]; formula at the head."""
    height, width = luma.shape
    rgb = np.empty((height, width, 3), np.uint8)
    for row in range(height):
        pairs = row // 2 * width
        for column in range(width):
            at = pairs + column // 2 * 2
            c = 298 * (np.int32(luma[row, column]) - 16) + 128
            d = np.int32(chroma[at]) - 128
            e = np.int32(chroma[at + 1]) - 128
            rgb[row, column, 0] = min(max((c + 409 * e) >> 8, 0), 255)
            rgb[row, column, 1] = min(max((c - 100 * d - 208 * e) >> 8, 0), 255)
            rgb[row, column, 2] = min(max((c + 516 * d) >> 8, 0), 255)
    return rgb


try:
    _nv12_to_rgb = numba.njit(nogil=True, cache=True)(_convert_nv12)
except RuntimeError:  # no folder to cache in
    _nv12_to_rgb = numba.njit(nogil=True)(_convert_nv12)
