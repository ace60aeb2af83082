"""From float h_s to the integers of `shared.codec.hyper`, calibrated on real hyper-latents.

Weights get 8 bits with a scale an output channel; activations 8 bits with a scale a layer, its top chosen so that
`coverage` of the calibration activations stay below it. Eight bits are not only for speed: integers of 8 significant
bits pass TF32 and bfloat16 unchanged, which is what makes the integer layers immune to precision switches. Before
quantising, channel ranges are evened out between a layer and the next (Nagel et al., "Data-free quantization through
weight equalization", ICCV 2019): relu(s a) = s relu(a), so a channel may be scaled up here and down there.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared.codec.hyper import MAX_MULTIPLIER, SCALE_COUNT
from shared.codec.transforms import between_levels
from shared.codec.types import MEAN_STEPS
from trainer.model import SCALE_MAX, SCALE_MIN, HyperSynthesis

ACT_MAX = 255
SHIFT_LIMIT = 36
LOG_STEP = (math.log(SCALE_MAX) - math.log(SCALE_MIN)) / (SCALE_COUNT - 1)


@torch.no_grad()
def quantise_hyper_synthesis(
    h_s: HyperSynthesis, z_symbols: list[Tensor], quality_steps: list[int], *, coverage: float = 0.99999
) -> dict[str, NDArray[np.generic]]:
    """Integer parameters of h_s as `IntegerHyperSynthesis.from_arrays` takes them.

    `z_symbols`: calibration inputs, float [B, Z, hz, wz] holding integers, one tensor a quality in `quality_steps`.
    """
    w1, b1, w2, b2, w3, b3, level_bias = _equalised(h_s, z_symbols, quality_steps)
    tops = _activation_tops((w1, b1, w2, b2, level_bias), z_symbols, quality_steps, coverage)
    arrays: dict[str, NDArray[np.generic]] = {"h_s.act_max": np.array([ACT_MAX, ACT_MAX], np.int64)}
    shifts = []
    scale_in = 1.0
    for i, (weight, bias, scale_out) in enumerate(
        ((w1, b1, tops[0] / ACT_MAX), (w2, b2, tops[1] / ACT_MAX), (w3, b3, None)), start=1
    ):
        scale_w = weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-6) / 127
        unit = scale_w * scale_in  # what one step of the sum is worth
        arrays[f"h_s.weight{i}"] = (weight / scale_w[:, None, None, None]).round().to(torch.int8).numpy()
        if i == 3:
            half = len(bias) // 2
            bias = bias.clone()
            bias[half:] -= math.log(SCALE_MIN)
            per_step = torch.cat([torch.full((half,), 1 / MEAN_STEPS), torch.full((half,), LOG_STEP)])
        else:
            per_step = torch.full_like(unit, float(scale_out))  # type: ignore[arg-type]
        arrays[f"h_s.bias{i}"] = (bias / unit).round().to(torch.int64).numpy()
        if i == 1:
            arrays["h_s.level_bias"] = (level_bias / unit).round().to(torch.int64).numpy()
        ratio = (unit / per_step).double().numpy()
        shift = min(SHIFT_LIMIT, math.floor(math.log2((MAX_MULTIPLIER - 1) / ratio.max())))
        arrays[f"h_s.multiplier{i}"] = np.rint(ratio * 2.0**shift).astype(np.int64)
        shifts.append(shift)
        scale_in = float(scale_out) if scale_out is not None else 0.0
    arrays["h_s.shift"] = np.array(shifts, np.int64)
    return arrays


def _equalised(h_s: HyperSynthesis, z_symbols: list[Tensor], quality_steps: list[int]) -> tuple[Tensor, ...]:
    """Parameters of h_s with each hidden channel scaled so that its calibration maximum is the layer's mean one."""
    w1, b1 = h_s.conv1.weight.clone(), h_s.conv1.bias.clone()  # type: ignore[union-attr]
    w2, b2 = h_s.conv2.weight.clone(), h_s.conv2.bias.clone()  # type: ignore[union-attr]
    w3, b3 = h_s.conv3.weight.clone(), h_s.conv3.bias.clone()  # type: ignore[union-attr]
    level_bias = h_s.level_bias.clone()
    for layer in (1, 2):
        peaks = torch.zeros(w2.shape[1])
        for z, steps in zip(z_symbols, quality_steps, strict=True):
            a = _hidden((w1, b1, w2, b2, level_bias), z, steps)[layer - 1]
            peaks = torch.maximum(peaks, a.amax(dim=(0, 2, 3)))
        # a square root of the full correction: what this layer's activations gain, the next one's weights lose
        factor = (peaks.clamp(min=1e-3) / peaks.mean().clamp(min=1e-3)).sqrt().clamp(0.1, 10)
        spread = factor.repeat_interleave(4)  # pixel shuffle: channel c comes from outputs 4c to 4c + 3
        if layer == 1:
            w1, b1, level_bias = w1 / spread[:, None, None, None], b1 / spread, level_bias / spread
            w2 = w2 * factor[None, :, None, None]
        else:
            w2, b2 = w2 / spread[:, None, None, None], b2 / spread
            w3 = w3 * factor[None, :, None, None]
    return w1, b1, w2, b2, w3, b3, level_bias


def _hidden(parameters: tuple[Tensor, ...], z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    w1, b1, w2, b2, level_bias = parameters
    bias = between_levels(level_bias, torch.tensor([steps]))
    one = F.relu(F.pixel_shuffle(F.conv2d(z, w1, b1, padding=1) + bias, 2))
    two = F.relu(F.pixel_shuffle(F.conv2d(one, w2, b2, padding=1), 2))
    return one, two


def _activation_tops(
    parameters: tuple[Tensor, ...], z_symbols: list[Tensor], quality_steps: list[int], coverage: float
) -> tuple[float, float]:
    tops = [0.0, 0.0]
    for z, steps in zip(z_symbols, quality_steps, strict=True):
        for i, a in enumerate(_hidden(parameters, z, steps)):
            values = a.flatten()
            rank = max(1, int((1 - coverage) * values.numel()))
            tops[i] = max(tops[i], float(values.topk(rank).values[-1]))
    return max(tops[0], 1e-3), max(tops[1], 1e-3)
