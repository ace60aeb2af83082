"""The image border: what cameras send becomes upright 8-bit RGB, and everything else a sentence."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edge import images
from edge.images import ImageLimits, PixelFormat
from shared.codec.types import Frame
from shared.errors import InvalidImage, SightlineError, TooLarge

LIMITS = ImageLimits()


def read(data: bytes, limits: ImageLimits = LIMITS) -> Frame:
    return images.decode(images.open_file(data, limits))


def read_raw(form: PixelFormat, width: int, height: int, data: bytes) -> Frame:
    return images.decode(images.open_raw(form, width, height, data, LIMITS))


def write(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea())


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_give_the_very_pixels(cat: Image.Image, form: str, options: dict[str, object]) -> None:
    assert np.array_equal(read(write(cat, form, **options)).rgb, np.asarray(cat))


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 2}), ("WEBP", {"quality": 90})],
)
def test_lossy_files_give_nearly_the_pixels(cat: Image.Image, form: str, options: dict[str, object]) -> None:
    rgb = read(write(cat, form, **options)).rgb
    assert np.abs(rgb.astype(int) - np.asarray(cat).astype(int)).mean() < 6


def test_a_frame_can_be_written_to_because_tensors_share_its_memory(cat: Image.Image) -> None:
    assert read(write(cat, "PNG")).rgb.flags.writeable
    assert read_raw(PixelFormat.RGB24, 1, 1, b"abc").rgb.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_viewers_do(cat: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = write(cat.crop((0, 0, 60, 40)), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(read(data).rgb, np.asarray(upright))


def test_damaged_exif_is_no_reason_to_refuse_a_picture(cat: Image.Image) -> None:
    data = write(cat, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 20)
    assert read(data).rgb.shape == (cat.height, cat.width, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    rgb = read(write(Image.fromarray(wide), "PNG")).rgb
    assert np.array_equal(rgb[0, :, 0], np.arange(256))
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_transparency_lies_over_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 10, 10, 255)
    pixels[0, 1] = (200, 10, 10, 0)
    rgb = read(write(Image.fromarray(pixels), "PNG")).rgb
    assert rgb[0, 0].tolist() == [200, 10, 10]
    assert rgb[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_other_colour_models_become_rgb(cat: Image.Image, mode: str) -> None:
    data = write(cat.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    rgb = read(data).rgb
    assert rgb.shape == (cat.height, cat.width, 3)
    assert abs(rgb.mean() - np.asarray(cat).mean()) < 12


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    rgb = read(write(image, "PNG", transparency=1)).rgb
    assert rgb[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_of_an_animation_the_first_picture_is_taken(cat: Image.Image) -> None:
    data = write(cat, "WEBP", save_all=True, append_images=[ImageOps.invert(cat)], lossless=True)
    assert np.array_equal(read(data).rgb, np.asarray(cat))


def test_raw_layouts(cat: Image.Image) -> None:
    rgb = np.asarray(cat.crop((0, 0, 64, 48)))
    assert np.array_equal(read_raw(PixelFormat.RGB24, 64, 48, rgb.tobytes()).rgb, rgb)
    assert np.array_equal(read_raw(PixelFormat.BGR24, 64, 48, rgb[:, :, ::-1].tobytes()).rgb, rgb)
    grey = read_raw(PixelFormat.GRAY8, 64, 48, rgb[:, :, 0].tobytes()).rgb
    assert np.array_equal(grey, rgb[:, :, :1].repeat(3, 2))


def test_nv12_follows_bt601_limited_range() -> None:
    # Black, white, mid grey, and the primaries of ITU-R BT.601 at limited range, 2x2 pixels each.
    cases = {
        (16, 128, 128): (0, 0, 0),
        (235, 128, 128): (255, 255, 255),
        (126, 128, 128): (128, 128, 128),
        (81, 90, 240): (255, 0, 0),
        (145, 54, 34): (0, 255, 0),
        (41, 240, 110): (0, 0, 255),
        (0, 128, 128): (0, 0, 0),
        (255, 128, 128): (255, 255, 255),
    }
    for (y, u, v), expected in cases.items():
        rgb = read_raw(PixelFormat.NV12, 2, 2, bytes([y] * 4 + [u, v])).rgb
        assert np.abs(rgb.astype(int) - np.array(expected)).max() <= 1, (y, u, v)


def test_nv12_is_the_written_integer_formula_on_any_samples() -> None:
    rng = np.random.default_rng(7)
    luma = rng.integers(0, 256, (34, 66), dtype=np.uint8)
    chroma = rng.integers(0, 256, (17, 33, 2), dtype=np.uint8)
    c = luma.astype(int) - 16
    d, e = (np.repeat(np.repeat(chroma[..., i].astype(int) - 128, 2, 0), 2, 1) for i in (0, 1))
    planes = (298 * c + 409 * e, 298 * c - 100 * d - 208 * e, 298 * c + 516 * d)
    expected = np.stack([np.clip((plane + 128) >> 8, 0, 255) for plane in planes], axis=2)
    rgb = read_raw(PixelFormat.NV12, 66, 34, luma.tobytes() + chroma.tobytes()).rgb
    assert np.array_equal(rgb, expected)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "got 0 bytes"),
        (b"hello, this is no picture", "start with 0x68656c6c6f2c2074"),
        (b"GIF89a" + bytes(20), "got a GIF file"),
        (b"<svg/>", "got a text file"),
        (b"\xff\xd8\xff", "end inside its header"),
        (b"\xff\xd8\xff\xd9", "frame header before its first scan"),
        (b"\x89PNG\r\n\x1a\n\0\0", "end inside its header"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x0dIDATxxxxxxxxxx", "expected IHDR"),
        (b"RIFF\0\0\0\0WEBPVP8X", "end inside its header"),
        (b"RIFF\0\0\0\0WEBPABCD", "VP8, VP8L or VP8X"),
        (png_header(0, 5), "at least 1x1 pixels, got 0x5"),
    ],
)
def test_what_is_no_picture_is_told_so(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidImage, match="expected") as caught:
        read(data)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_invalid_wherever_it_ends(cat: Image.Image, form: str) -> None:
    data = write(cat, form)
    for part in (0.02, 0.3, 0.6, 0.95):
        with pytest.raises(InvalidImage, match="expected"):
            read(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("form", "width", "height", "length", "sentence"),
    [
        (PixelFormat.RGB24, 4, 4, 47, "expected 48 bytes for RGB24 of 4x4 pixels, got 47"),
        (PixelFormat.BGR24, 4, 4, 49, "expected 48 bytes for BGR24 of 4x4 pixels, got 49"),
        (PixelFormat.GRAY8, 4, 4, 0, "expected 16 bytes for GRAY8 of 4x4 pixels, got 0"),
        (PixelFormat.NV12, 4, 4, 25, "expected 24 bytes for NV12 of 4x4 pixels, got 25"),
        (PixelFormat.NV12, 3, 4, 18, "expected even sides for NV12, got 3x4"),
        (PixelFormat.RGB24, 0, 4, 0, "at least 1x1 pixels, got 0x4"),
    ],
)
def test_raw_pixels_must_fit_their_size(form: PixelFormat, width: int, height: int, length: int, sentence: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        read_raw(form, width, height, bytes(length))
    assert sentence in str(caught.value)


def webp_canvas(width: int, height: int) -> bytes:
    low = struct.pack("<HBHB", (width - 1) & 0xFFFF, (width - 1) >> 16, (height - 1) & 0xFFFF, (height - 1) >> 16)
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + low
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", height, width) + b"\x03" + bytes(9)


@pytest.mark.parametrize("make", [png_header, webp_canvas, jpeg_header])
@pytest.mark.parametrize(("width", "height"), [(8193, 1), (1, 8193), (8192, 8192), (16383, 16383), (65535, 65535)])
def test_bombs_are_refused_by_their_header(make: object, width: int, height: int) -> None:
    tracemalloc.start()
    with pytest.raises(TooLarge, match=f"{width}x{height}"):
        images.open_file(make(width, height), LIMITS)  # type: ignore[operator]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_largest_picture_passes_where_the_limit_is_set_so() -> None:
    data = write(Image.new("L", (8192, 8192)), "PNG")
    assert read(data, ImageLimits(max_pixels=8192 * 8192)).rgb.shape == (8192, 8192, 3)


def test_a_picture_that_differs_from_its_canvas_is_refused(cat: Image.Image) -> None:
    data = bytearray(write(cat, "PNG"))
    data[16:20] = struct.pack(">I", cat.width + 1)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(InvalidImage, match="cannot be decoded"):
        read(bytes(data))


def test_a_jpeg_of_endless_scans_is_refused(cat: Image.Image) -> None:
    data = write(cat, "JPEG", progressive=True)
    with pytest.raises(TooLarge, match="at most 64 scans, got"):
        read(data + b"\xff\xda\0\x08" * 64)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_damaged_files_give_a_frame_of_their_size_or_a_typed_error(form: str, data: st.DataObject) -> None:
    small = Image.fromarray(skimage.data.chelsea()).resize((40, 30))
    damaged = bytearray(write(small, form))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    sides = None
    try:
        picture = images.open_file(bytes(damaged), ImageLimits(max_pixels=1_000_000))
        sides = {picture.width, picture.height}
        frame = images.decode(picture)
        sides -= {frame.width, frame.height}
    except SightlineError as error:
        sides = set() if "expected" in str(error) else None
    assert sides == set()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_decoder_that_takes_too_long_is_stopped(cat: Image.Image, form: str) -> None:
    data = write(cat, form)
    read(data)
    with pytest.raises(TooLarge, match="decoded within"):
        read(data, ImageLimits(max_decode_s=1e-9))
