"""Hostile inputs for everything that reads bytes of strangers: what each must end in, and what it did.

A target makes an input from a generator of random numbers and tries it; the answer is the name of a typed error, or a
word for input that was harmless after all. Any other exception is a fault of the program and passes through.
"""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.corruption import injure, injure_streams
from edge import images
from edge.control import Control
from edge.images import ImageLimits, PixelFormat
from edge.settings import EdgeSettings
from shared.codec import bitstream as bits
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import SightlineError
from shared.rpc import certificates
from shared.rpc.policy import Policy

LIMITS = ImageLimits(max_side=2048, max_pixels=1 << 20)
MAX_PIXELS = 1 << 16
POLICY = """
[[grant]]
identity = "spiffe://example.org/edge/*"
send = ["gate-*", "door"]
subscribe = ["*"]
administer = false
[[grant]]
identity = "token:console"
subscribe = ["gate-*"]
[tokens]
console = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
"""
SETTINGS = """
[edge]
listen = "127.0.0.1:0"
quality = 4.5
spool_max_bytes = "1GiB"
models = ["detection"]
spool_policy = "drop-oldest"
max_cameras = 100
"""


@dataclass(frozen=True, slots=True)
class Target:
    """`share`: of a run's inputs."""

    share: float
    attempt: Callable[[np.random.Generator], str]


def targets(codec: Codec, folder: Path) -> dict[str, Target]:
    """By name. `folder` gets the files that are read as files."""
    frame = Frame(_scene())
    pictures = _pictures(frame.rgb)
    stream = codec.encode(frame, 3)
    whole = bits.to_bytes(stream)
    certificate = certificates.authority("hostile", 1)

    def image(rng: np.random.Generator) -> str:
        data = _spoil(pictures[int(rng.integers(len(pictures)))], rng)
        return _tried(lambda: images.decode(images.open_file(data, LIMITS)), "picture")

    def raw(rng: np.random.Generator) -> str:
        form = list(PixelFormat)[int(rng.integers(4))]
        width, height = (int(each) for each in rng.integers(0, 70, 2) * (1 + 500 * (rng.random(2) < 0.1)))
        data = bytes(int(rng.integers(0, 3 * 64 * 64)))
        return _tried(lambda: images.decode(images.open_raw(form, width, height, data, LIMITS)), "picture")

    def bitstream(rng: np.random.Generator) -> str:
        data = injure(whole, rng)
        return _tried(lambda: bits.from_bytes(data, {codec.model_id}, max_pixels=MAX_PIXELS), "bitstream")

    def forged(rng: np.random.Generator) -> str:
        hostile = injure_streams(codec, stream, rng)

        def decode() -> None:
            parsed = bits.from_bytes(bits.to_bytes(hostile), {codec.model_id}, max_pixels=MAX_PIXELS)
            shape = codec.latent_shape(parsed.height, parsed.width, parsed.quality)
            bits.check_streams(parsed, codec.tables_z, shape.z, shape.y)
            codec.unpack(parsed)

        return _tried(decode, "symbols")

    def policy(rng: np.random.Generator) -> str:
        return _tried(lambda: Policy.parse(_spoil_text(POLICY, rng)).rights(("token:console",)), "policy")

    def settings(rng: np.random.Generator) -> str:
        path = folder / "edge.toml"
        path.write_bytes(_spoil_text(SETTINGS, rng))
        return _tried(lambda: EdgeSettings.load(config=path), "settings")

    def control(rng: np.random.Generator) -> str:
        path = folder / "control.json"
        good = json.dumps({"paused": ["gate-1"], "lowest_quality": 2.0, "highest_quality": 7.5}, indent=1)
        path.write_bytes(_spoil_text(good, rng))
        return _tried(lambda: Control(path, 100).require_running("gate-2"), "control")

    def pem(rng: np.random.Generator) -> str:
        data, key = injure(certificate.certificate, rng), injure(certificate.key, rng)

        def read() -> None:
            certificates.require_pair(certificates.inspect(data, "certificate"), key, "key")

        return _tried(read, "certificate")

    return {
        "image": Target(0.20, image),
        "raw picture": Target(0.10, raw),
        "bitstream": Target(0.55, bitstream),
        "forged bitstream": Target(0.01, forged),
        "policy": Target(0.10, policy),
        "settings": Target(0.005, settings),
        "control file": Target(0.01, control),
        "certificate and key": Target(0.025, pem),
    }


def _tried(work: Callable[[], object], harmless: str) -> str:
    try:
        work()
    except SightlineError as error:
        return type(error).__name__
    return harmless


def scene_jpeg() -> bytes:
    """A small JPEG file."""
    return _pictures(_scene())[0]


def _scene() -> np.ndarray:
    """uint8 [48, 64, 3]: edges, a gradient and noise, so that every coder has something to code."""
    rows, columns = np.mgrid[:48, :64]
    rgb = np.stack([rows * 5, columns * 4, (rows ^ columns) * 4], axis=2) % 256
    rgb[12:30, 20:44] = 230
    return np.ascontiguousarray(rgb.astype(np.uint8))


def _pictures(rgb: np.ndarray) -> list[bytes]:
    files = []
    for form, options in (
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 80, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
    ):
        out = io.BytesIO()
        Image.fromarray(rgb).save(out, form, **options)
        files.append(out.getvalue())
    grey = io.BytesIO()
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 200).save(grey, "PNG")
    return [*files, grey.getvalue()]


def _spoil(data: bytes, rng: np.random.Generator) -> bytes:
    """An injury, or a size in the header that the picture does not have."""
    if rng.random() < 0.8:
        return injure(data, rng)
    out = bytearray(data)
    at = int(rng.integers(min(len(out), 200)))
    struct.pack_into(">H", out, min(at, len(out) - 2), int(rng.integers(1 << 16)))
    return bytes(out)


def _spoil_text(text: str, rng: np.random.Generator) -> bytes:
    """An injury of the bytes, a line twice, a line gone, or a value of another kind."""
    lines = text.splitlines()
    at = int(rng.integers(len(lines)))
    match int(rng.integers(4)):
        case 0:
            return injure(text.encode(), rng)
        case 1:
            lines.insert(int(rng.integers(len(lines))), lines[at])
        case 2:
            del lines[at]
        case _:
            values = ("1e999", "[[[[", "true", '"\\u0000"', "-1", "{}", '"' + "x" * 5000 + '"', "[" * 3000, "nan")
            name = lines[at].split("=")[0]
            lines[at] = f"{name} = {values[int(rng.integers(len(values)))]}"
    return "\n".join(lines).encode()
