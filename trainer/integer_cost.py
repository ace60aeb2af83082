"""What making h_s and the context model integer costs in rate.

Three ideal code lengths of the same pictures' latents: under a float entropy model (exact Gaussians), under that model
rounded to the tables' scale indexes and to means in 1/16 steps, and under the bundle's integers (the tables that are
really used). Latents below the bundle's skip threshold are left out of all three alike, by the integers' indexes, and
the symbols are each path's own: rounding to another mean gives other symbols.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.codec.codec import Codec
from shared.codec.hyper import SCALE_COUNT
from shared.codec.transforms import interpolate_levels
from shared.codec.types import MEAN_STEPS, Frame
from trainer.model import LEVELS, SCALE_MIN, TrainableCodec
from trainer.quantise import LOG_STEP


@dataclass(slots=True)
class CodeLengths:
    """Bits of some pictures' latents at one quality, see the module's head."""

    quality: int
    floats: float = 0.0
    rounded: float = 0.0
    integers: float = 0.0

    @property
    def cost(self) -> float:
        """The integers' bits over the floats', 0.01 for one percent more."""
        return self.integers / self.floats - 1 if self.floats else 0.0


@torch.no_grad()
def code_lengths(codec: Codec, model: TrainableCodec, frames: Iterable[Frame]) -> list[CodeLengths]:
    """Of all frames, at quality 1 to 8. `model`: has the float entropy model, and `codec`'s transforms."""
    rows = [CodeLengths(quality) for quality in range(1, LEVELS + 1)]
    for frame in frames:
        for row in rows:
            _add(row, codec, model, frame)
    return rows


def _add(row: CodeLengths, codec: Codec, model: TrainableCodec, frame: Frame) -> None:
    steps = 256 * row.quality
    y = codec.latents([frame], steps)
    symbols = codec.quantise(y, [steps], [frame])[0]
    scaled = y * interpolate_levels(torch.from_numpy(codec.bundle.arrays["gain.log"]), torch.tensor([steps]))
    z_hat = torch.from_numpy(symbols.z_hat)[None].float()
    means, log_scales = model.coding(scaled, z_hat, torch.tensor([steps]))
    coded = symbols.scale_indexes >= codec.bundle.skip_below
    indexes = ((log_scales - math.log(SCALE_MIN)) / LOG_STEP).round().clamp(0, SCALE_COUNT - 1)
    rounded_symbols = (scaled - (means * MEAN_STEPS).round() / MEAN_STEPS).round()
    residual = (scaled - means).round() + 0.0
    row.floats += _gaussian_bits(residual[0].numpy()[coded], log_scales[0].numpy()[coded])
    row.rounded += codec.tables_y.ideal_bits(
        rounded_symbols[0].numpy()[coded].astype(np.int32), indexes[0].numpy()[coded].astype(np.uint8)
    )
    row.integers += codec.tables_y.ideal_bits(symbols.symbols[coded], symbols.scale_indexes[coded])


def _gaussian_bits(residual: NDArray[np.float32], log_scales: NDArray[np.float32]) -> float:
    """-log2 of the Gaussian's mass on [r - 1/2, r + 1/2], scales bounded below as in training."""
    scale = torch.from_numpy(log_scales).double().exp().clamp(min=SCALE_MIN)
    r = torch.from_numpy(residual).double().abs()
    upper = 0.5 * torch.erfc((r - 0.5) / scale / math.sqrt(2))
    lower = 0.5 * torch.erfc((r + 0.5) / scale / math.sqrt(2))
    return float(-(upper - lower).clamp(min=1e-9).log2().sum())
