"""The integer hyper-decoder h_s: the one network whose every bit both sides must agree on.

It turns hyper-latents into the scale index and the mean that decide how each latent is coded. A float network would
give other last bits on another thread count, instruction set, library version or GPU, and one differing table index
garbles the rest of the stream (Balle et al., "Integer networks for data compression with latent-variable models",
ICLR 2019). So weights and activations are integers, and the arithmetic below is exact on every machine:

    a0 = clamp(z_hat, -127, 127)                         [Z, hz, wz]
    a1 = requantise(conv1(a0) + bias1 + level_bias)      shuffle 2 -> [h, 2 hz, 2 wz]
    a2 = requantise(conv2(a1) + bias2)                   shuffle 2 -> [h, 4 hz, 4 wz], cropped to [h, hy, wy]
    means         = round_half_up(multiplier * conv3) >> shift       int32 [M, hy, wy], in 1/16 quantisation steps
    scale_indexes = the same, clamped to [0, 63]                      uint8 [M, hy, wy]

    requantise(acc) = clamp((acc * multiplier + 2^(shift-1)) >> shift, 0, act_max)

Exactness. A convolution is unfold + matmul with autocast off (floating-point convolutions may run as Winograd or FFT
and are not exact). Its sums are integers below `bound = max over outputs of (sum |w| * act_max + |bias|)`; a matmul
in any order is exact as long as the bound is below 2^53 in float64, or below 2^24 in float32. Float32
is used only for layers that meet its bound and whose inputs and weights are integers of at most 8 significant bits,
for those survive TF32 and bfloat16 unchanged: the process-wide precision switches (TF32, oneDNN's bf16 math mode)
then cannot touch the result, and no other thread can flip them under us. All bounds are checked when the parameters
are loaded. Requantising is multiplication by an integer below 2^20 and a power of two, in float64, below 2^53 again,
then floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared.codec.types import at_quality
from shared.errors import InvalidBundle

SCALE_COUNT = 64
Z_MAX = 127
MAX_MULTIPLIER = 2**20
FLOAT32_EXACT = 2**24
BFLOAT16_EXACT = 2**8
FLOAT64_EXACT = 2**53
BAND_BYTES = 64 * 2**20  # an unfolded band of rows stays below this, so that memory does not grow with the frame


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """One 3x3 integer convolution, stride 1, zero padding 1, and what turns its sums into the next integers.

    `weight`: int8 [out, in, 3, 3]; `bias`: int64 [out]; `multiplier`: int64 [out], below 2^20; `shift`: bits.
    `input_max`: largest absolute input. `bound`: largest absolute sum that inputs within it can give.
    """

    weight: NDArray[np.int8]
    bias: NDArray[np.int64]
    multiplier: NDArray[np.int64]
    shift: int
    input_max: int
    bound: int


@dataclass(frozen=True, slots=True)
class IntegerHyperSynthesis:
    """The parameters of h_s. `level_bias`: int64 [8, out of layer 1], added per quality level, linear between levels.

    `act_max`: largest activation after layers 1 and 2.
    """

    layers: tuple[IntegerLayer, IntegerLayer, IntegerLayer]
    level_bias: NDArray[np.int64]
    act_max: tuple[int, int]

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "IntegerHyperSynthesis":
        """Build from the bundle's `h_s.*` arrays and check every bound. Raises InvalidBundle."""
        level_bias = np.asarray(arrays["h_s.level_bias"], np.int64)
        act_max = tuple(int(v) for v in np.asarray(arrays["h_s.act_max"]))
        layers = []
        for i, input_max in enumerate((Z_MAX, *act_max), start=1):
            weight = np.asarray(arrays[f"h_s.weight{i}"])
            if weight.dtype != np.int8 or weight.ndim != 4 or weight.shape[2:] != (3, 3):
                raise InvalidBundle(f"h_s.weight{i} must be int8 [out, in, 3, 3], got {weight.dtype} {weight.shape}")
            bias = np.asarray(arrays[f"h_s.bias{i}"], np.int64)
            multiplier = np.asarray(arrays[f"h_s.multiplier{i}"], np.int64)
            shift = int(np.asarray(arrays["h_s.shift"])[i - 1])
            extra = np.abs(level_bias).max(axis=0) if i == 1 else 0
            sums = np.abs(weight.astype(np.int64)).sum(axis=(1, 2, 3)) * input_max + np.abs(bias) + extra
            bound = int(sums.max())
            if not (int(multiplier.min()) >= 0 and int(multiplier.max()) < MAX_MULTIPLIER and 1 <= shift <= 40):
                raise InvalidBundle(f"h_s layer {i}: multipliers must be in [0, 2^20) and the shift in [1, 40]")
            if int((sums * multiplier).max()) + 2**shift >= FLOAT64_EXACT:
                raise InvalidBundle(f"h_s layer {i}: sums times multipliers reach 2^53 and would not be exact")
            layers.append(IntegerLayer(weight, bias, multiplier, shift, input_max, bound))
        return IntegerHyperSynthesis((layers[0], layers[1], layers[2]), level_bias, (act_max[0], act_max[1]))

    def bias_at(self, quality: int) -> NDArray[np.int64]:
        """The first layer's bias at a quality in 1/256 steps, [out]."""
        bias: NDArray[np.int64] = self.layers[0].bias + at_quality(self.level_bias, quality)
        return bias


class HyperSynthesis:
    """Evaluates `IntegerHyperSynthesis` on a device, exactly. Safe to call from several threads."""

    def __init__(self, parameters: IntegerHyperSynthesis, device: torch.device | str = "cpu") -> None:
        self.parameters = parameters
        self.device = torch.device(device)
        self._layers = [_DeviceLayer(layer, self.device) for layer in parameters.layers]

    @torch.no_grad()
    def __call__(self, z_hat: Tensor, qualities: list[int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Hyper-latents to what codes the latents.

        `z_hat`: int32 [B, Z, hz, wz]; `qualities`: B integers in 1/256 steps; `size`: (hy, wy), at most 4x z's.
        Returns means int32 [B, M, hy, wy] in 1/16 steps, and scale indexes uint8 [B, M, hy, wy].
        """
        one, two, three = self._layers
        bias = torch.from_numpy(np.stack([self.parameters.bias_at(q) for q in qualities])).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            a = z_hat.to(self.device).clamp(-Z_MAX, Z_MAX)
            a = F.pixel_shuffle(one(a, bias).clamp_(0, self.parameters.act_max[0]), 2)
            a = F.pixel_shuffle(two(a).clamp_(0, self.parameters.act_max[1]), 2)
            out = three(a[:, :, : size[0], : size[1]])
        means, indexes = out.chunk(2, dim=1)
        return means.to(torch.int32), indexes.clamp(0, SCALE_COUNT - 1).to(torch.uint8)


class _DeviceLayer:
    def __init__(self, layer: IntegerLayer, device: torch.device) -> None:
        small = layer.bound < FLOAT32_EXACT and layer.input_max <= BFLOAT16_EXACT
        self.dtype = torch.float32 if small else torch.float64
        self.weight = torch.from_numpy(layer.weight.reshape(layer.weight.shape[0], -1)).to(device, self.dtype)
        self.bias = torch.from_numpy(layer.bias).to(device, torch.float64)
        self.multiplier = torch.from_numpy(layer.multiplier).to(device, torch.float64)[:, None]
        self.half = float(2 ** (layer.shift - 1))
        self.scale = 2.0**-layer.shift

    def __call__(self, a: Tensor, bias: Tensor | None = None) -> Tensor:
        """Integers [B, in, H, W], any dtype -> requantised, not clamped, in a float dtype that holds them exactly."""
        batch, channels, height, width = a.shape
        bias = self.bias[None] if bias is None else bias.to(torch.float64)
        padded = F.pad(a.to(self.dtype), (1, 1, 1, 1))
        rows = max(1, BAND_BYTES // max(1, batch * channels * 9 * width * self.weight.element_size()))
        bands = []
        for top in range(0, height, rows):
            band = min(rows, height - top)
            columns = F.unfold(padded[:, :, top : top + band + 2], 3)
            sums = torch.matmul(self.weight, columns).to(torch.float64).add_(bias[:, :, None])
            bands.append(sums.mul_(self.multiplier).add_(self.half).mul_(self.scale).floor_())
        out = bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)
        return out.reshape(batch, -1, height, width)
