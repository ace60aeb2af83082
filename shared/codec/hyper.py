"""The integer entropy model: h_s and the context model, whose every bit both sides must agree on.

They turn hyper-latents, and latents that are already known, into the scale index and the mean that decide how each
latent is coded. A float network would give other last bits on another thread count, instruction set, library version or
GPU, and one differing table index garbles the rest of the stream (Balle et al., "Integer networks for data compression
with latent-variable models", ICLR 2019). So weights and activations are integers, and the arithmetic below is exact on
every machine:

    a0 = clamp(z_hat, -127, 127)                         [Z, hz, wz]
    a1 = requantise(conv1(a0) + bias1 + level_bias)      shuffle 2 -> [h, 2 hz, 2 wz]
    a2 = requantise(conv2(a1) + bias2)                   shuffle 2 -> [h, 4 hz, 4 wz], cropped to [h, hy, wy]
    p1            = round_half_up(multiplier * conv3(a2)) >> shift
    means         = p1[:M]                               int32 [M, hy, wy], in 1/16 quantisation steps
    scale_indexes = clamp(p1[M:], 0, 63)                 uint8 [M, hy, wy]

    requantise(acc) = clamp((acc * multiplier + 2^(shift-1)) >> shift, 0, act_max)

Without a context model that is all. With one, latents come in two passes (`first_pass`): channel c at row i and column
j is of the first where c + i + j is even, so that each of the second has known ones beside it and in its own place
(a checkerboard: He et al., CVPR 2021; alternating by channels: Li et al., DCVC-DC, CVPR 2023). The second pass has

    s  = clamp(symbols of the first pass, -127, 127), 0 elsewhere                           [M, hy, wy]
    a3 = clamp(p1[2 M:] + (round_half_up(multiplier * conv3x3(s)) >> shift), 0, act_max)    [c, hy, wy]
    p2 = p1[:2 M] + (round_half_up(multiplier * conv1x1(a3)) >> shift)

in place of p1[:2 M]; conv3 has c more outputs for it. He et al. mask a convolution over y_hat; symbols served as well.

Exactness. A convolution is unfold + matmul with autocast off (floating-point convolutions may run as Winograd or FFT
and are not exact). Its sums are integers below `bound = max over outputs of (sum |w| * 128)`; a matmul in any order is
exact as long as the bound is below 2^53 in float64, or below 2^24 in float32. Inputs and weights are integers of at
most 8 significant bits, for those survive TF32 and bfloat16 unchanged: the process-wide precision switches (TF32,
oneDNN's bf16 math mode) then cannot touch the result, and no other thread can flip them under us. Or they are
multiplied as bytes into 32-bit sums, which hold any sum of up to 2^16 products. `shared.codec.integers` has the choice
and the layout; all bounds are checked when the parameters are loaded.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.codec.elementwise import coding, known
from shared.codec.integers import SHIFTED, IntegerMatmul, Requantiser, is_compiled_for, rows_of, shuffled
from shared.codec.types import at_quality
from shared.errors import InvalidBundle

SCALE_COUNT = 64
Z_MAX = 127
KNOWN_TOP = 127  # what the context model sees of a symbol
ACT_TOP = 255
MAX_MULTIPLIER = 2**20
MAX_PRODUCTS = 2**16  # of two bytes, whose sum 32 bits hold
MAX_BIAS = 2**40  # with the multipliers and sums of 32 bits, everything stays below 2^62
CONTEXT = "h_s.context."


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """One integer convolution, stride 1, zero padding, and what turns its sums into the next integers.

    `weight`: int8 [out, in, k, k]; `bias`: int64 [out]; `multiplier`: int64 [out], below 2^20; `shift`: bits.
    """

    weight: NDArray[np.int8]
    bias: NDArray[np.int64]
    multiplier: NDArray[np.int64]
    shift: int

    @staticmethod
    def checked(arrays: Mapping[str, NDArray[Any]], prefix: str, i: int, size: int) -> "IntegerLayer":
        """Layer `i` (from 1) of the arrays under `prefix`. Raises InvalidBundle where a sum could not be exact."""
        name = f"{prefix}weight{i}"
        weight = np.asarray(arrays[name])
        if weight.dtype != np.int8 or weight.ndim != 4 or weight.shape[2:] != (size, size):
            raise InvalidBundle(f"{name} must be int8 [out, in, {size}, {size}], got {weight.dtype} {weight.shape}")
        if int(weight[0].size) > MAX_PRODUCTS:
            raise InvalidBundle(f"{name}: expected at most {MAX_PRODUCTS} products a sum, got {weight[0].size}")
        bias = np.asarray(arrays[f"{prefix}bias{i}"], np.int64)
        multiplier = np.asarray(arrays[f"{prefix}multiplier{i}"], np.int64)
        shift = int(np.asarray(arrays[f"{prefix}shift"])[i - 1])
        if bias.shape != weight.shape[:1] or multiplier.shape != weight.shape[:1]:
            raise InvalidBundle(f"{prefix}* layer {i}: biases and multipliers must be as long as its outputs")
        if not (int(multiplier.min()) >= 0 and int(multiplier.max()) < MAX_MULTIPLIER and 1 <= shift <= 40):
            raise InvalidBundle(f"{prefix}* layer {i}: multipliers must be in [0, 2^20) and the shift in [1, 40]")
        if int(np.abs(bias).max()) >= MAX_BIAS:
            raise InvalidBundle(f"{prefix}* layer {i}: biases reach 2^40; times multipliers they would not be exact")
        return IntegerLayer(weight, bias, multiplier, shift)


@dataclass(frozen=True, slots=True)
class IntegerContext:
    """The context model: a 3x3 layer over known symbols and a 1x1 layer. `act_max`: largest activation between."""

    layers: tuple[IntegerLayer, IntegerLayer]
    act_max: int


@dataclass(frozen=True, slots=True)
class IntegerHyperSynthesis:
    """The parameters of h_s and, where there is one, of the context model.

    `level_bias`: int64 [8, out of layer 1], added per quality level, linear between levels. `act_max`: largest
    activation after layers 1 and 2.
    """

    layers: tuple[IntegerLayer, IntegerLayer, IntegerLayer]
    level_bias: NDArray[np.int64]
    act_max: tuple[int, int]
    context: IntegerContext | None = None

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "IntegerHyperSynthesis":
        """Build from the bundle's `h_s.*` arrays and check every bound. Raises InvalidBundle."""
        level_bias = np.asarray(arrays["h_s.level_bias"], np.int64)
        if int(np.abs(level_bias).max()) >= MAX_BIAS:
            raise InvalidBundle("h_s.level_bias must be below 2^40, or it would not be exact times multipliers")
        one, two, three = (IntegerLayer.checked(arrays, "h_s.", i, 3) for i in (1, 2, 3))
        tops = _tops(arrays, "h_s.", 2)
        context = None
        if CONTEXT + "weight1" in arrays:
            layers = (IntegerLayer.checked(arrays, CONTEXT, 1, 3), IntegerLayer.checked(arrays, CONTEXT, 2, 1))
            _check_context(layers, three)
            context = IntegerContext(layers, _tops(arrays, CONTEXT, 1)[0])
        return IntegerHyperSynthesis((one, two, three), level_bias, (tops[0], tops[1]), context)

    def bias_at(self, quality: int) -> NDArray[np.int64]:
        """The first layer's bias at a quality in 1/256 steps, [out]."""
        bias: NDArray[np.int64] = self.layers[0].bias + at_quality(self.level_bias, quality)
        return bias


def first_pass(channels: int, height: int, width: int) -> NDArray[np.bool_]:
    """Which latents are of the first pass, where a context model codes them in two: [channels, height, width]."""
    c, i, j = np.ogrid[:channels, :height, :width]
    first: NDArray[np.bool_] = (c + i + j) % 2 == 0
    return first


@dataclass(frozen=True, slots=True)
class Prior:
    """What h_s says before a latent is known.

    `parameters`: int32 [B, hy, wy, 2 M + c], means and scale indexes, these not yet clamped, and what the context model
    adds to (c is 0 where there is none). `latents`: M.
    """

    parameters: Tensor
    latents: int

    def coding(self, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means int32 [B, hy, wy, M] in 1/16 steps, and scale indexes uint8 [B, hy, wy, M].

        `more`: int32 [B, hy, wy, 2 M], added for latents of the second pass.
        """
        shape, device = (*self.parameters.shape[:3], self.latents), self.parameters.device
        if is_compiled_for(device):
            means, indexes = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.uint8)
            nothing = np.empty((shape[0], 0, 2 * self.latents), np.int32)
            coding(
                rows_of(self.parameters),
                nothing if more is None else rows_of(more),
                shape[2],
                SCALE_COUNT - 1,
                rows_of(means),
                rows_of(indexes),
            )
            return means, indexes
        parameters = self.parameters[..., : 2 * self.latents]
        if more is not None:
            first = _first_pass(shape[1:], device)
            parameters = parameters + more * (1 - torch.cat([first, first], dim=2))
        means, indexes = parameters.chunk(2, dim=3)
        return means, indexes.clamp(0, SCALE_COUNT - 1).to(torch.uint8)


class HyperSynthesis:
    """Evaluates `IntegerHyperSynthesis` on a device, exactly. Safe to call from several threads."""

    def __init__(self, parameters: IntegerHyperSynthesis, device: torch.device | str = "cpu") -> None:
        self.parameters = parameters
        self.device = torch.device(device)
        pads = (0, -SHIFTED, -SHIFTED)
        self._layers = [_Layer(layer, pad, self.device) for layer, pad in zip(parameters.layers, pads, strict=True)]
        self._outputs = len(parameters.layers[2].weight)
        if parameters.context:
            over_known, after = parameters.context.layers
            self._over_known, self._after = _Layer(over_known, 0, self.device), _Layer(after, -SHIFTED, self.device)
            self._outputs -= len(over_known.weight)
        self._level_bias = functools.cache(functools.partial(at_quality, parameters.level_bias))

    @torch.no_grad()
    def prior(self, z_hat: Tensor, qualities: list[int], size: tuple[int, int]) -> Prior:
        """Hyper-latents to what codes the latents, or the first pass of them.

        `z_hat`: int32 [B, Z, hz, wz]; `qualities`: B integers in 1/256 steps; `size`: (hy, wy), at most 4x z's.
        """
        level = np.stack([self._level_bias(quality) for quality in qualities])
        one, two, three = self._layers
        with torch.autocast(self.device.type, enabled=False):
            a = z_hat.to(self.device).clamp(-Z_MAX, Z_MAX).to(torch.int8).permute(0, 2, 3, 1)
            a = shuffled(one(a, top=self.parameters.act_max[0], more=level))
            a = shuffled(two(a, top=self.parameters.act_max[1]))
            return Prior(three(a[:, : size[0], : size[1]]), self._outputs // 2)

    @torch.no_grad()
    def given(self, prior: Prior, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """What codes the latents once the first pass is known.

        `symbols`: int32 [B, hy, wy, M] on any device; those that are not of the first pass are not looked at. Returns
        means and scale indexes of both passes, as `Prior.coding` does.
        """
        if self.parameters.context is None:
            raise ValueError("expected a bundle with a context model, this one codes all latents in one pass")
        with torch.autocast(self.device.type, enabled=False):
            a = self._over_known(
                self._known(symbols.to(self.device)),
                top=self.parameters.context.act_max,
                onto=prior.parameters[..., self._outputs :],
            )
            return prior.coding(self._after(a))

    def _known(self, symbols: Tensor) -> Tensor:
        """What the context model sees of symbols [B, hy, wy, M]: int8, 0 for those of the second pass."""
        if not is_compiled_for(self.device):
            first = _first_pass(tuple(symbols.shape[1:]), self.device)
            return symbols.clamp(-KNOWN_TOP, KNOWN_TOP).to(torch.int8) * first
        seen = torch.empty(symbols.shape, dtype=torch.int8)
        known(rows_of(symbols), symbols.shape[2], KNOWN_TOP, rows_of(seen))
        return seen


@functools.lru_cache(maxsize=64)
def _first_pass(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """`first_pass` as 0 and 1, int8 [height, width, channels]."""
    height, width, channels = shape
    first = first_pass(channels, height, width).astype(np.int8)
    return torch.from_numpy(first).permute(1, 2, 0).contiguous().to(device)


class _Layer:
    """An integer layer on a device. `pad`: what lies beyond the border, which also says how its input is kept."""

    def __init__(self, layer: IntegerLayer, pad: int, device: torch.device) -> None:
        self._multiply = IntegerMatmul(layer.weight, pad, device)
        bias = layer.bias - pad * layer.weight.astype(np.int64).sum(axis=(1, 2, 3))
        self._requantise = Requantiser(bias, layer.multiplier, layer.shift, device)

    def __call__(
        self,
        a: Tensor,
        *,
        top: int | None = None,
        more: NDArray[np.int64] | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        return self._requantise(self._multiply(a), top=top, more=more, onto=onto)


def _tops(arrays: Mapping[str, NDArray[Any]], prefix: str, number: int) -> tuple[int, ...]:
    tops = tuple(int(v) for v in np.asarray(arrays[prefix + "act_max"]))
    if len(tops) != number or not all(0 <= top <= ACT_TOP for top in tops):
        raise InvalidBundle(f"{prefix}act_max must be {number} integers in [0, {ACT_TOP}], got {list(tops)}")
    return tops


def _check_context(layers: tuple[IntegerLayer, IntegerLayer], last: IntegerLayer) -> None:
    over_known, after = layers
    context = len(over_known.weight)
    outputs = len(last.weight) - context
    expected = ((context, outputs // 2, 3, 3), (outputs, context, 1, 1))
    if (over_known.weight.shape, after.weight.shape) != expected:
        raise InvalidBundle(
            f"{CONTEXT}weight1 and 2 must be {list(expected[0])} and {list(expected[1])} beside this h_s, "
            f"got {list(over_known.weight.shape)} and {list(after.weight.shape)}"
        )
