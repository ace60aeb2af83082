"""Whether frames are decoded to the same symbols and y_hat wherever they were encoded and wherever they are decoded.

    sightline bench exactness [--short] [--json]

1,000 frames of 48 to 640 pixels a side, parts of photographs, at all qualities. Each way of computing is a process of
its own, encodes all of them and decodes what every other made; the SHA-256 of hyper-latents, symbols and y_hat must be
the one that its encoder had. Files need not be the same everywhere: what leads to latents is of floats, and a latent at
a half may be rounded either way. What must hold is that all read the same in a file.

"torch alone" is what computes on a GPU, here on the processor: no compiled kernel, no product of bytes, and around it
whatever a process may have switched on (autocast, bfloat16 for float32). Where there is a GPU it is one more.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.pictures import photographs
from bench.processes import AVX2_ONLY, output_of
from bench.report import Report, Say, run
from shared.codec import bitstream as bits
from shared.codec import codec as codec_module
from shared.codec import hyper, integers
from shared.codec.codec import Codec
from shared.codec.types import QUALITY_MAX, QUALITY_MIN, QUALITY_STEP, Frame, Symbols
from shared.errors import SightlineError

FRAMES, BATCH = 1000, 8
SIDES = (48, 640)
PLACES = 32  # at least, to and fro: no two frames of few photographs are the same


@dataclass(frozen=True, slots=True)
class Way:
    """A way of computing. `environment`: of its process, for what is chosen once a process."""

    environment: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    torch_alone: bool = False


WAYS = {
    "this processor": Way(),
    "one thread": Way(threads=1),
    "without bfloat16": Way({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "AVX2 only": Way(AVX2_ONLY),
    "torch alone": Way(torch_alone=True),
}
GPU = {"GPU": Way(device="cuda")}


def ways() -> dict[str, Way]:
    return WAYS | (GPU if torch.cuda.is_available() else {})


def measure(short: bool, say: Say) -> Report:
    count = 2 * BATCH if short else FRAMES
    report = Report("exactness", "frames read otherwise than they were written", {"frames": count, "batch": BATCH})
    with tempfile.TemporaryDirectory(prefix="sightline-bench-") as folder:
        for name, way in ways().items():
            say(f"encoding: {name}")
            call = f"encode_all({name!r}, {count}, {folder!r})"
            output_of(f"from bench.exactness import encode_all; {call}", way.environment)
        differ: dict[str, dict[str, int]] = {}
        for name, way in ways().items():
            say(f"decoding: {name}")
            call = f"decode_all({name!r}, {folder!r})"
            differ[name] = json.loads(output_of(f"from bench.exactness import decode_all; {call}", way.environment))
        alike = _files_alike(Path(folder))
    for name in differ:
        found = {reader: counts[name] for reader, counts in differ.items()}
        report.add(f"encoded by {name}, decoded by {len(differ)} ways", max(found.values()), "frames", at_most=0)
        if any(found.values()):
            where = ", ".join(reader for reader, number in found.items() if number)
            report.notes.append(f"What {name} encoded is read otherwise by {where}.")
    report.notes.append(f"Files of all ways are the same bytes for {alike} of {count} frames.")
    return report


def encode_all(name: str, count: int, folder: str) -> None:
    """Each frame's file and digest into `folder`/`name`; frames of one batch are of one size and quality."""
    way, out = ways()[name], Path(folder) / name
    codec = _codec(way)
    out.mkdir()
    digests = []
    for group, (frames, quality) in enumerate(_batches(count)):
        with _around(way):
            coded = codec.analyse(frames, quality)
        for i, symbols in enumerate(coded):
            (out / f"{BATCH * group + i:06}.slc").write_bytes(bits.to_bytes(codec.pack(symbols)))
            digests.append(digest(symbols))
    (out / "digests.json").write_text(json.dumps(digests))


def decode_all(name: str, folder: str) -> None:
    """How many frames of each encoder are not what it wrote, as JSON on standard output."""
    way = ways()[name]
    codec = _codec(way)
    differ = {}
    for made in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        expected = json.loads((made / "digests.json").read_text())
        files = sorted(made.glob("*.slc"))
        with _around(way):
            found = [_read(codec, file.read_bytes()) for file in files]
        differ[made.name] = sum(one != other for one, other in zip(found, expected, strict=True))
    sys.stdout.write(json.dumps(differ))


def digest(symbols: Symbols) -> str:
    """SHA-256 over everything that the entropy path produced."""
    columns = (symbols.z_hat, symbols.symbols, symbols.y_hat)
    return hashlib.sha256(b"".join(np.ascontiguousarray(column, "<i4").tobytes() for column in columns)).hexdigest()


def _read(codec: Codec, data: bytes) -> str:
    try:
        return digest(codec.unpack(bits.from_bytes(data, [codec.model_id])))
    except SightlineError as error:  # as damage is told, which a difference would look like
        return repr(error)


def _batches(count: int) -> Iterator[tuple[list[Frame], float]]:
    """Frames in batches of one size, and a quality for each, the same for every way."""
    draw = np.random.default_rng(0)
    known = photographs()
    for _ in range(count // BATCH):
        height, width = (int(side) for side in draw.integers(*SIDES, size=2, endpoint=True))
        quality = int(draw.integers(QUALITY_MIN, QUALITY_MAX, endpoint=True)) / QUALITY_STEP
        yield [_part(known[int(draw.integers(len(known)))], height, width, draw) for _ in range(BATCH)], quality


def _part(rgb: np.ndarray, height: int, width: int, draw: np.random.Generator) -> Frame:
    """A part anywhere in a photograph, which is mirrored where it is too small to choose a place in."""
    missing = (max(0, height + PLACES - rgb.shape[0]), max(0, width + PLACES - rgb.shape[1]))
    rgb = np.pad(rgb, ((0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")
    top = int(draw.integers(rgb.shape[0] - height, endpoint=True))
    left = int(draw.integers(rgb.shape[1] - width, endpoint=True))
    return Frame(np.ascontiguousarray(rgb[top : top + height, left : left + width]))


def _codec(way: Way) -> Codec:
    if way.torch_alone:
        for module in (codec_module, hyper, integers):
            module.is_compiled_for = lambda device: False  # type: ignore[attr-defined]
        integers.has_int8_matmul = lambda: False  # type: ignore[assignment]
        codec_module.has_byte_convolution = lambda: False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("medium")
    return Codec.load("detection", device=way.device, threads=way.threads)


def _around(way: Way) -> torch.autocast | nullcontext[None]:
    return torch.autocast("cpu", torch.bfloat16) if way.torch_alone else nullcontext()


def _files_alike(folder: Path) -> int:
    each = [sorted(made.glob("*.slc")) for made in folder.iterdir() if made.is_dir()]
    return sum(len({file.read_bytes() for file in files}) == 1 for files in zip(*each, strict=True))


def main() -> int:
    return run(__doc__, "exactness", measure)


if __name__ == "__main__":
    raise SystemExit(main())
