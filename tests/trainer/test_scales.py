"""Choosing coded sizes: the smallest that costs hardly more bits at equal distance."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.codec.bundle import SCALE_TENSOR, WEIGHTS, load_bundle
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import InvalidSettings
from trainer.scales import ScaleSettings, choose, train_scales


def curve(factor: float, floor: float) -> NDArray[np.float64]:
    """Eight points of a size whose distance cannot fall below `floor`; `factor` more bits for the rest."""
    rates = np.geomspace(0.05, 1.6, 8) * factor
    return np.stack([rates, floor + 0.1 / np.geomspace(0.05, 1.6, 8)], 1)


def test_small_sizes_serve_low_qualities_and_the_full_one_high_qualities() -> None:
    scales = choose({8: curve(0.6, 0.08), 12: curve(0.8, 0.02), 16: curve(1.0, 0.0)}, 0.03)
    assert scales == sorted(scales)
    assert (scales[0], scales[-1]) == (8, 16)
    assert 12 in scales


def test_of_equals_the_smaller_and_cheaper_size_is_taken() -> None:
    assert choose({10: curve(1.0, 0.0), 16: curve(1.0, 0.0)}, 0.0) == [10] * 8
    assert choose({10: curve(1.02, 0.0), 16: curve(1.0, 0.0)}, 0.03) == [10] * 8
    assert choose({10: curve(1.05, 0.0), 16: curve(1.0, 0.0)}, 0.03) == [16] * 8


@pytest.mark.skipif(not (WEIGHTS / "faster-rcnn-mobilenetv2").is_dir(), reason="the bundled network is not here")
def test_the_bundle_that_comes_out_codes_at_the_sizes_that_it_reports(
    photographs: dict[str, Frame], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, frame in photographs.items():
        Image.fromarray(frame.rgb).resize((160, 128)).save(pictures / f"{name}.png")
    settings = ScaleSettings("detection", pictures, tmp_path / "made", candidates=(8, 16), pictures=2)
    made = load_bundle(train_scales(settings))
    sizes = made.info["sizes"]
    assert made.arrays[SCALE_TENSOR].tolist() == sizes["scale"]
    assert set(sizes["scale"]) <= {8, 16}
    assert (sizes["pictures"], len(sizes["bpp"]), len(sizes["distance"])) == (2, 8, 8)
    assert sizes["bpp"] == sorted(sizes["bpp"])
    codec = Codec(made)
    for quality, scale in ((1, sizes["scale"][0]), (8, sizes["scale"][-1])):
        assert codec.coded_size(128, 160, 256 * quality) == (128 * scale // 16, 160 * scale // 16)
    given = load_bundle("detection")
    assert all(np.array_equal(made.arrays[name], given.arrays[name]) for name in given.arrays if name != SCALE_TENSOR)


@pytest.mark.parametrize(
    "change", [{"candidates": ()}, {"candidates": (17,)}, {"tolerance": -0.1}, {"pictures": 0}, {"frame_scale": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings):
        ScaleSettings("detection", tmp_path, tmp_path / "made", **change)  # type: ignore[arg-type]
