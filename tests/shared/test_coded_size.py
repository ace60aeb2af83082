"""Bundles that code pictures at a reduced size: any size comes back, and integers alone decide what was coded."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.exactness import digest
from shared.codec import bitstream as bits
from shared.codec.bundle import MANIFEST, SCALE_TENSOR, load_bundle, save_bundle
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import InvalidBundle
from tests.shared.test_codec import crop, psnr

SCALES = np.array([6, 8, 8, 10, 11, 12, 15, 16], np.uint8)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """The shipped codec with other sizes, saved and loaded again."""
    shipped, folder = load_bundle("detection"), tmp_path_factory.mktemp("bundle")
    save_bundle(
        folder,
        name="reduced",
        architecture=shipped.architecture,
        skip_below=shipped.skip_below,
        arrays={**shipped.arrays, SCALE_TENSOR: SCALES},
        info={},
    )
    return Codec.load(folder)


@pytest.mark.parametrize("quality", [1, 2.5, 7.9])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (17, 33), (640, 480)])
def test_any_size_comes_back(reduced: Codec, astronaut: Frame, width: int, height: int, quality: float) -> None:
    frame = crop(astronaut, height, width)
    back = reduced.decode(bits.from_bytes(bits.to_bytes(reduced.encode(frame, quality)), [reduced.model_id]))
    assert (back.height, back.width) == (height, width)
    assert psnr(frame, back) > 15


def test_a_reduced_picture_has_fewer_latents_and_keeps_what_it_shows(reduced: Codec, astronaut: Frame) -> None:
    symbols = reduced.analyse([astronaut], 2)[0]
    assert symbols.symbols.shape[1:] == (16, 16), "512 pixels at half size, 16 to a latent"
    assert psnr(astronaut, reduced.decode(reduced.encode(astronaut, 6))) > 23
    assert psnr(astronaut, reduced.reconstruct_unquantised(astronaut, 6)) > 23


def test_sizes_between_qualities_are_whole_and_never_fall(reduced: Codec) -> None:
    found = [reduced.scale(quality) for quality in range(256, 2049)]
    assert [found[256 * level] for level in range(8)] == SCALES.tolist()
    assert found == sorted(found)
    assert reduced.coded_size(1, 8192, 256) == (1, 3072)


def test_frames_of_several_qualities_pass_together(reduced: Codec, photographs: dict[str, Frame]) -> None:
    frame = crop(next(iter(photographs.values())), 96, 160)
    streams = [reduced.encode(frame, quality) for quality in (1, 3, 2, 8, 3)]
    for stream, together in zip(streams, reduced.decode_batch(streams), strict=True):
        assert np.abs(reduced.decode(stream).rgb.astype(int) - together.rgb).max() <= 1


def test_bands_give_what_the_whole_frame_gives(
    reduced: Codec, astronaut: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = reduced.encode(astronaut, 6)
    whole = reduced.decode(stream)
    monkeypatch.setattr("shared.codec.codec.BAND_PIXELS", 1)
    assert np.abs(reduced.decode(stream).rgb.astype(int) - whole.rgb).max() <= 1
    assert digest(reduced.unpack(stream)) == digest(reduced.analyse([astronaut], 6)[0])


def test_target_bytes_is_met_across_sizes(reduced: Codec, astronaut: Frame) -> None:
    sizes = [len(bits.to_bytes(reduced.encode(astronaut, quality))) for quality in range(1, 9)]
    assert sizes == sorted(sizes)
    for target in sizes[1:]:
        found = reduced.encode_to_size(astronaut, target)
        assert 0.9 * target <= len(bits.to_bytes(found)) <= target


def test_sizes_are_part_of_the_model(reduced: Codec, tmp_path: Path) -> None:
    bundle = reduced.bundle
    assert bundle.model_id != load_bundle("detection").model_id
    common = {"architecture": bundle.architecture, "skip_below": bundle.skip_below, "info": {}}
    for wrong in (SCALES + 1, SCALES.astype(np.int32), SCALES[:7], SCALES * 0):
        save_bundle(tmp_path, name="wrong", arrays={**bundle.arrays, SCALE_TENSOR: wrong}, **common)  # type: ignore[arg-type]
        with pytest.raises(InvalidBundle, match=r"level\.scale must be 8 integers of 8 bit in"):
            load_bundle(tmp_path)
    save_bundle(tmp_path, name="newer", arrays=bundle.arrays, **common)  # type: ignore[arg-type]
    manifest = tmp_path / MANIFEST
    manifest.write_text(re.sub(r'"format": \d', '"format": 4', manifest.read_text()))
    with pytest.raises(InvalidBundle, match="expected bundle format 1, 2 or 3, got 4"):
        load_bundle(tmp_path)


def test_a_stream_of_other_sizes_is_damage(reduced: Codec, astronaut: Frame) -> None:
    stream = reduced.encode(astronaut, 6)
    with pytest.raises(Exception, match=r"CRC-32C|expected|symbols"):
        reduced.decode(replace(stream, quality=2048))
