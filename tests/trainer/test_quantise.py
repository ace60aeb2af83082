"""The float entropy model as integers: what that costs, and that doing it again costs little more."""

from pathlib import Path

import torch

from shared.codec.bitstream import to_bytes
from shared.codec.bundle import SCALE_TENSOR
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.export import export_bundle, trainable_from_bundle


def test_integers_that_become_floats_and_integers_again_and_again_code_as_well(
    codec: Codec, photographs: dict[str, Frame], tmp_path: Path
) -> None:
    frames = [Frame(frame.rgb[:320, :320].copy()) for frame in photographs.values() if min(frame.rgb.shape[:2]) >= 320]
    assert len(frames) > 1
    calibration = [torch.from_numpy(frame.rgb).permute(2, 0, 1).float() / 255 for frame in frames]
    model = trainable_from_bundle("detection")
    for i in range(3):
        folder = tmp_path / str(i)
        export_bundle(model, calibration, folder, name="again", info={}, scales=codec.bundle.arrays[SCALE_TENSOR])
        model = trainable_from_bundle(folder)
    again = Codec.load(tmp_path / "2")
    for quality in (1, 4, 8):
        sizes = [sum(len(to_bytes(each.encode(frame, quality))) for frame in frames) for each in (codec, again)]
        assert sizes[1] < 1.1 * sizes[0], "rounding three times costs a few percent at quality 1, not more"
