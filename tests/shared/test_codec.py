"""The codec as a whole: any size comes back, the same bits everywhere, and damage is an error, never a crash."""

import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import corruption
from bench.exactness import digest
from shared.codec import bitstream as bits
from shared.codec import rans
from shared.codec.bundle import compute_model_id
from shared.codec.codec import Codec
from shared.codec.hyper import CONTEXT
from shared.codec.types import Frame
from shared.errors import InvalidBitstream, InvalidQuality, NumericalError, UnknownModel

ROOT = Path(__file__).resolve().parent.parent.parent


def psnr(a: Frame, b: Frame) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.rgb.astype(float) - b.rgb) ** 2)))


def crop(frame: Frame, height: int, width: int) -> Frame:
    """A frame of any size out of a photograph, mirrored as often as needed."""
    rows = np.pad(
        frame.rgb, ((0, max(0, height - frame.height)), (0, max(0, width - frame.width)), (0, 0)), "symmetric"
    )
    return Frame(np.ascontiguousarray(rows[:height, :width]))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8192, 1), (1, 300), (17, 33), (64, 64), (65, 63), (640, 480)])
def test_any_size_comes_back(codec: Codec, astronaut: Frame, width: int, height: int) -> None:
    frame = crop(astronaut, height, width)
    back = codec.decode(bits.from_bytes(bits.to_bytes(codec.encode(frame, 8)), [codec.model_id]))
    assert (back.height, back.width) == (height, width)
    assert psnr(frame, back) > 20


@pytest.mark.parametrize("quality", [1, 4.5, 8])
def test_torch_quantises_as_the_kernels_do(
    codec: Codec, astronaut: Frame, quality: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [astronaut, Frame(np.ascontiguousarray(astronaut.rgb[::-1]))]
    by_kernels = codec.analyse(frames, quality)
    for module in ("codec", "hyper", "integers"):
        monkeypatch.setattr(f"shared.codec.{module}.is_compiled_for", lambda device: False)
    for one, other in zip(by_kernels, codec.analyse(frames, quality), strict=True):
        for column in ("z_hat", "symbols", "means", "scale_indexes"):
            np.testing.assert_array_equal(getattr(one, column), getattr(other, column))


@pytest.mark.parametrize(("quality", "squared"), [(1, 0.5), (4.5, 0.5), (8, 0)])
def test_torch_makes_the_same_pixels(
    codec: Codec, astronaut: Frame, quality: float, squared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [codec.encode(frame, quality) for frame in (astronaut, crop(astronaut, 203, 311))]
    by_kernels = codec.decode_batch(streams)
    monkeypatch.setattr("shared.codec.codec.is_compiled_for", lambda device: False)
    for one, other in zip(by_kernels, codec.decode_batch(streams), strict=True):
        # quality 8 is coded at full size; elsewhere rounding comes before enlarging, not after
        assert np.square(one.rgb.astype(float) - other.rgb).mean() <= squared


@pytest.mark.parametrize("compiled", [True, False])
def test_latents_that_are_no_numbers_or_too_large_are_an_error(
    codec: Codec, astronaut: Frame, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("shared.codec.codec.is_compiled_for", lambda device: False)
    frame = crop(astronaut, 64, 64)
    z_hat = torch.from_numpy(codec.analyse([frame], 8)[0].z_hat)[None]
    far = torch.full_like(codec.latents([frame], 2048), 1e12)
    with pytest.raises(NumericalError, match="steps or more from its mean"):
        codec.quantise_given(z_hat, far, [2048], [frame])
    other = Codec(codec.bundle, dtype=torch.float32)
    other.g_a.last.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        other.encode(frame)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (3840, 2160)])
def test_large_frames_come_back(codec: Codec, astronaut: Frame, width: int, height: int) -> None:
    frame = crop(astronaut, height, width)
    back = codec.decode(codec.encode(frame, 8))
    assert (back.height, back.width) == (height, width)
    assert psnr(frame, back) > 20


def test_bands_give_what_the_whole_frame_gives(codec: Codec, astronaut: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = codec.encode(astronaut, 6)
    whole = codec.decode(stream)
    latents = codec.latents([astronaut], 6 * 256)
    monkeypatch.setattr("shared.codec.codec.BAND_PIXELS", 1)
    banded = codec.decode(stream)
    assert np.abs(banded.rgb.astype(int) - whole.rgb).max() <= 1
    torch.testing.assert_close(codec.latents([astronaut], 6 * 256), latents, rtol=0.02, atol=0.02)


def test_size_grows_with_quality_over_at_least_eight_times(codec: Codec, photographs: dict[str, Frame]) -> None:
    for name, frame in photographs.items():
        sizes = [len(bits.to_bytes(codec.encode(frame, quality))) for quality in range(1, 9)]
        assert sizes == sorted(sizes), name
        assert sizes[-1] >= 8 * sizes[0], (name, sizes)


def test_fractional_qualities_lie_between(codec: Codec, astronaut: Frame) -> None:
    low, middle, high = (len(bits.to_bytes(codec.encode(astronaut, q))) for q in (4, 4.5, 5))
    assert low < middle < high


def test_what_is_not_code_is_at_most_31_bytes_at_quality_1(codec: Codec, astronaut: Frame) -> None:
    """Of a thousand, which is why each of them is counted."""
    frame = crop(astronaut, 480, 640)
    symbols = codec.analyse([frame], 1)[0]
    data = bits.to_bytes(codec.pack(symbols))
    coded = symbols.scale_indexes.ravel() >= codec.bundle.skip_below
    channels = np.repeat(np.arange(len(symbols.z_hat), dtype=np.uint8), symbols.z_hat[0].size)
    ideal_bits = codec.tables_y.ideal_bits(
        symbols.symbols.ravel()[coded], symbols.scale_indexes.ravel()[coded]
    ) + codec.tables_z.ideal_bits(symbols.z_hat.ravel(), channels)
    assert len(data) - ideal_bits / 8 <= 31


def test_a_bundle_without_a_context_model_codes_all_latents_in_one_pass(codec: Codec, astronaut: Frame) -> None:
    latents = codec.bundle.architecture.m
    arrays = {name: array for name, array in codec.bundle.arrays.items() if not name.startswith(CONTEXT)}
    for name in ("weight3", "bias3", "multiplier3"):
        arrays[f"h_s.{name}"] = arrays[f"h_s.{name}"][: 2 * latents]
    architecture = replace(codec.bundle.architecture, context=0)
    model_id = compute_model_id(architecture, codec.bundle.skip_below, arrays)
    plain = Codec(replace(codec.bundle, model_id=model_id, architecture=architecture, arrays=arrays))
    symbols = plain.analyse([astronaut], 3)[0]
    stream = plain.pack(symbols)
    one_pass = rans.encode(symbols.symbols.ravel(), symbols.scale_indexes.ravel(), plain.tables_y, 3)
    assert stream.latents == one_pass
    assert digest(plain.unpack(stream)) == digest(symbols)
    if codec.bundle.architecture.context:
        with_context = codec.encode(astronaut, 3)
        assert len(with_context.latents) < 0.97 * len(one_pass)
        with pytest.raises(InvalidBitstream):
            plain.unpack(replace(with_context, model_id=model_id))


def test_target_bytes_is_kept_and_used(codec: Codec, astronaut: Frame) -> None:
    for target in (6_000, 12_000):
        found = codec.encode_to_size(astronaut, target)
        size = len(bits.to_bytes(found))
        assert 0.85 * target <= size <= target  # the coded size grows in steps of a sixteenth of the side
        assert len(bits.to_bytes(codec.encode(astronaut, (found.quality + 1) / 256))) > target, "the next step fits not"
    assert codec.encode_to_size(astronaut, 10).quality == 256, "too small a target gives the smallest there is"


@pytest.mark.parametrize("quality", [0, 0.99, 8.01, -1, float("nan"), float("inf")])
def test_quality_outside_its_range_is_refused(codec: Codec, astronaut: Frame, quality: float) -> None:
    with pytest.raises(InvalidQuality, match=r"must be in \[1, 8\]"):
        codec.encode(astronaut, quality)


def test_a_stream_of_another_model_is_refused_by_name(codec: Codec, astronaut: Frame) -> None:
    stream = codec.encode(crop(astronaut, 32, 32), 2)
    with pytest.raises(UnknownModel, match=codec.model_id):
        codec.decode(replace(stream, model_id="0" * 64))


def test_batched_and_single_give_the_same_symbols(codec: Codec, photographs: dict[str, Frame]) -> None:
    frames = [crop(frame, 96, 160) for frame in photographs.values()]
    streams = codec.encode_batch(frames, 5)
    together = [digest(codec.unpack(stream)) for stream in streams]
    assert together == [digest(codec.unpack(codec.encode(frame, 5))) for frame in frames]
    pictures = codec.decode_batch(streams)
    for stream, picture in zip(streams, pictures, strict=True):
        assert np.abs(codec.decode(stream).rgb.astype(int) - picture.rgb).max() <= 1


IN_ANOTHER_PROCESS = """
import sys, numpy as np, torch
torch.set_num_threads(int(sys.argv[2]))
from bench.exactness import digest
from shared.codec.codec import Codec
from shared.codec import bitstream as bits
codec = Codec.load("detection")
if sys.argv[3] == "medium": torch.set_float32_matmul_precision("medium")
symbols = codec.unpack(bits.from_bytes(open(sys.argv[1], "rb").read(), [codec.model_id]))
print(digest(symbols))
np.save(sys.argv[4], codec.synthesise([symbols])[0].rgb)
"""


@pytest.mark.parametrize(
    ("threads", "isa", "precision"), [(1, "", "highest"), (2, "", "medium"), (2, "AVX2", "highest")]
)
def test_a_fresh_process_decodes_the_same_symbols_and_y_hat(
    codec: Codec, astronaut: Frame, tmp_path: Path, threads: int, isa: str, precision: str
) -> None:
    """Other thread counts, another instruction set and bfloat16 math mode must not reach the entropy path."""
    frame = crop(astronaut, 200, 312)
    stream = codec.encode(frame, 6)
    path = tmp_path / "frame.slc"
    path.write_bytes(bits.to_bytes(stream))
    env = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": "avx2"} if isa else {})
    arguments = [str(path), str(threads), precision, str(tmp_path / "rgb.npy")]
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(codec.unpack(stream))
    if not isa:  # equal precision: without AVX-512 bfloat16 is computed another way
        assert np.abs(np.load(tmp_path / "rgb.npy").astype(int) - codec.decode(stream).rgb).max() <= 1


def test_damage_is_a_typed_error_or_a_picture_of_the_announced_size() -> None:
    """Half of them under fresh checksums, as a hostile sender would give them; `bench.corruption` runs 100,000."""
    outcome = corruption.run(1500)
    assert set(outcome["outcomes"]) <= {
        "InvalidBitstream",
        "UnknownModel",
        "InvalidQuality",
        "TooLarge",
        "picture",
        "unhurt",
    }
    assert outcome["outcomes"]["picture"] > 10, (
        "no damaged stream got as far as a picture: the hostile half tests nothing"
    )
    assert outcome["memory_growth_bytes"] < 200 << 20


def test_noise_flat_and_extreme_pictures_round_trip(codec: Codec, rng: np.random.Generator) -> None:
    checker = np.indices((70, 90)).sum(0) % 2 * 255
    pictures = [
        np.zeros((70, 90, 3), np.uint8),
        np.full((70, 90, 3), 255, np.uint8),
        np.repeat(checker[:, :, None], 3, 2).astype(np.uint8),
        rng.integers(0, 256, (70, 90, 3), dtype=np.uint8),
    ]
    for picture in pictures:
        for quality in (1, 8):
            back = codec.decode(bits.from_bytes(bits.to_bytes(codec.encode(Frame(picture), quality)), [codec.model_id]))
            assert back.rgb.shape == picture.shape
    assert zlib.crc32(pictures[0].tobytes()) == zlib.crc32(bytes(70 * 90 * 3)), "encoding must not write into a frame"
