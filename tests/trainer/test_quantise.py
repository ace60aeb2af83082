"""The float entropy model as integers: what that costs, and that doing it again costs little more."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.codec.bitstream import to_bytes
from shared.codec.bundle import SCALE_TENSOR
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.export import coded_at_all_levels, export_bundle, trainable_from_bundle
from trainer.integer_cost import code_lengths
from trainer.quantise import compute_as_integers, quantise_hyper_synthesis


def middles(photographs: dict[str, Frame]) -> tuple[list[Frame], list[Tensor]]:
    """Parts of 320 pixels, as frames and for calibration."""
    frames = [Frame(frame.rgb[:320, :320].copy()) for frame in photographs.values() if min(frame.rgb.shape[:2]) >= 320]
    assert len(frames) > 1
    return frames, [torch.from_numpy(frame.rgb).permute(2, 0, 1).float() / 255 for frame in frames]


def test_integers_that_become_floats_and_integers_again_and_again_code_as_well(
    codec: Codec, photographs: dict[str, Frame], tmp_path: Path
) -> None:
    frames, calibration = middles(photographs)
    model = trainable_from_bundle("detection")
    for i in range(3):
        folder = tmp_path / str(i)
        scales = codec.bundle.arrays[SCALE_TENSOR]
        made = export_bundle(model, calibration, folder, name="again", info={}, scales=scales)
        assert max(made.info["integer_cost"]) < 0.06
        model = trainable_from_bundle(folder)
    again = Codec.load(tmp_path / "2")
    for quality in (1, 4, 8):
        sizes = [sum(len(to_bytes(each.encode(frame, quality))) for frame in frames) for each in (codec, again)]
        assert sizes[1] < 1.1 * sizes[0], "rounding three times costs a few percent at quality 1, not more"


def test_a_model_that_computes_as_its_integers_codes_as_they_do(
    photographs: dict[str, Frame], tmp_path: Path, astronaut: Frame
) -> None:
    """At borders that cut through a hyper-latent too: the last layer sees nothing beyond them."""
    _, calibration = middles(photographs)
    model = trainable_from_bundle("detection")
    floats = export_bundle(model, calibration, tmp_path / "floats", name="floats", info={})
    compute_as_integers(model, coded_at_all_levels(model, calibration), coverage=0.999)
    export_bundle(model, calibration, tmp_path / "integers", name="integers", info={})
    codec, odd = Codec.load(tmp_path / "integers"), Frame(astronaut.rgb[:420, :440].copy())
    assert codec.latent_shape(420, 440, 1024).y[1] % 4, "the picture cuts no hyper-latent"
    for row in code_lengths(codec, model, [odd]):
        assert abs(row.integers / row.rounded - 1) < 0.01
    assert codec.model_id != floats.model_id


def test_a_channel_that_is_never_active_is_not_made_larger_at_every_export(photographs: dict[str, Frame]) -> None:
    """All multipliers of a layer share one shift: one channel of huge weights left the others three bits."""
    _, calibration = middles(photographs)
    model = trainable_from_bundle("detection")
    with torch.no_grad():
        model.h_s.conv2.weight[:4] *= 1e5
        model.h_s.conv2.bias[:4] = -1e6  # type: ignore[index]
        model.h_s.conv3.weight[:, 0] *= 1e-5
    arrays = quantise_hyper_synthesis(model, coded_at_all_levels(model, calibration))
    multipliers = np.sort(arrays["h_s.multiplier2"])
    assert multipliers[len(multipliers) // 2] > 1000


def test_the_cost_is_of_what_is_really_coded_and_shows_an_entropy_model_that_is_another(
    codec: Codec, astronaut: Frame
) -> None:
    model = trainable_from_bundle(codec.bundle.name).eval()
    rows = code_lengths(codec, model, [astronaut])
    assert [row.quality for row in rows] == list(range(1, 9))
    for row in rows[3:]:  # below, hyper-latents and the header are much of a file
        assert row.integers == pytest.approx(8 * len(to_bytes(codec.encode(astronaut, row.quality))), rel=0.1)
        assert row.rounded == pytest.approx(row.floats, rel=0.01)
        assert abs(row.cost) < 0.01
    with torch.no_grad():
        model.h_s.conv3.bias[codec.bundle.architecture.m :][: codec.bundle.architecture.m] += np.log(2)
    wrong = code_lengths(codec, model, [astronaut])
    assert wrong[3].integers == rows[3].integers
    assert wrong[3].cost < -0.05, "scales twice as large cost the floats more than that"
