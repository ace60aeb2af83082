"""The codec as it is trained: float h_s, additive uniform noise, CompressAI's entropy models.

    x -> g_a -> y -> * gain[level] -> + noise or round -> * 1/gain'[level] -> g_s -> x_hat
                        |-> h_a -> z -> entropy bottleneck -> z_hat -> h_s (+ level bias) -> means, log scales
                                                   (and a context model for latents of the second pass)

The mean & scale hyperprior is Minnen et al. 2018; gains a quality level are Cui et al., CVPR 2021. What ships is
made from this by `trainer.export`: h_s becomes integer, the entropy models become tables.
"""

from dataclasses import dataclass

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor, nn
from torch.nn import functional as F

from shared.codec.hyper import KNOWN_TOP, first_pass
from shared.codec.transforms import (
    AnalysisTransform,
    Architecture,
    HyperAnalysisTransform,
    SynthesisTransform,
    between_levels,
    interpolate_levels,
)

LEVELS = 8
SCALE_MIN = 0.11
SCALE_MAX = 256.0
ACT_MAX = 255  # of an integer activation
WEIGHT_MAX = 127

Units = tuple[float, ...]


class HyperSynthesis(nn.Module):
    """Float h_s. The first layer adds a bias a quality level, the one place where h_s sees the quality.

    `units`: what one step of the activations of each hidden layer is worth, the context model's last. With them it
    computes as the integers that it becomes, which gradients pass as if nothing were rounded; without, in floats.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(arch.z, 4 * arch.h, 3, padding=1)
        self.conv2 = nn.Conv2d(arch.h, 4 * arch.h, 3, padding=1)
        self.conv3 = nn.Conv2d(arch.h, 2 * arch.m + arch.context, 3, padding=1)
        self.level_bias = nn.Parameter(torch.zeros(LEVELS, 4 * arch.h))
        self._coding = 2 * arch.m

    def hidden(self, z_hat: Tensor, quality_steps: Tensor, units: Units | None = None) -> tuple[Tensor, Tensor]:
        """Activations after the first and the second layer, [B, H, 2 hz, 2 wz] and [B, H, 4 hz, 4 wz]."""
        bias = between_levels(self.level_bias, quality_steps)
        one = _activation(F.pixel_shuffle(_convolved(z_hat, self.conv1, units, more=bias), 2), units, 0)
        return one, _activation(F.pixel_shuffle(_convolved(one, self.conv2, units, 0), 2), units, 1)

    def forward(
        self, z_hat: Tensor, quality_steps: Tensor, size: tuple[int, int], units: Units | None = None
    ) -> tuple[Tensor, Tensor]:
        """z_hat [B, Z, hz, wz] -> means and log scales [B, 2 M, *size], and what the context model adds to.

        The last layer sees zeros beyond `size`, as it does in the codec.
        """
        _, two = self.hidden(z_hat, quality_steps, units)
        out = _convolved(two[:, :, : size[0], : size[1]], self.conv3, units, 1)
        prior, hidden = out[:, : self._coding], out[:, self._coding :]
        return prior, hidden if units is None else _in_steps(hidden, units[-1])


class ContextModel(nn.Module):
    """What known symbols add to the means and log scales of those beside them; begins by adding nothing."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(arch.m, arch.context, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(arch.context, 2 * arch.m, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, prior: Tensor, known: Tensor, units: Units | None = None) -> Tensor:
        """`prior`: from h_s, [B, c, h, w]; `known`: symbols [B, M, h, w], 0 where unknown -> [B, 2 M, h, w]."""
        return _convolved(self.hidden(prior, known, units), self.conv2, units, -1)

    def hidden(self, prior: Tensor, known: Tensor, units: Units | None = None) -> Tensor:
        """Activations between the two layers, [B, c, h, w]."""
        seen = _convolved(known, self.conv1, units)
        return _activation(prior + (seen if units is None else _in_steps(seen, units[-1])), units, -1)


def weight_steps(weight: Tensor) -> Tensor:
    """What one step of a weight [out, in, k, k] is worth once it is an integer, by output channel."""
    return weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-6) / WEIGHT_MAX


def _in_steps(values: Tensor, step: Tensor | float) -> Tensor:
    """Rounded to whole steps; gradients pass as if they were not."""
    return values + ((values / step).round() * step - values).detach()


def _convolved(
    x: Tensor, conv: nn.Conv2d, units: Units | None, reads: int | None = None, more: Tensor | None = None
) -> Tensor:
    """`reads`: the hidden layer whose activations x is, None for symbols. `more`: a bias for each picture, [B, out, 1,
    1]. As integers, biases are whole numbers of what one step of a sum is worth."""
    weight, bias = conv.weight, conv.bias
    if units is not None:
        steps = weight_steps(weight.detach())
        worth = steps if reads is None else steps * units[reads]
        weight = _in_steps(weight, steps[:, None, None, None])
        bias = None if bias is None else _in_steps(bias, worth)
        more = None if more is None else _in_steps(more, worth[None, :, None, None])
    made = F.conv2d(x, weight, bias, padding=conv.padding)
    return made if more is None else made + more


def _activation(x: Tensor, units: Units | None, layer: int) -> Tensor:
    a = F.relu(x)
    return a if units is None else _in_steps(a.clamp(max=ACT_MAX * units[layer]), units[layer])


class _SharedNoise:
    """Additive uniform noise as one process would draw it for the whole batch, of which this process has a share."""

    rank, processes = 0, 1

    def quantize(self, inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        if mode != "noise":
            quantised: Tensor = super().quantize(inputs, mode, means)  # type: ignore[misc]
            return quantised
        axis = 1 if isinstance(self, EntropyBottleneck) else 0  # the prior is asked with [Z, 1, B h w]
        shape = [*inputs.shape[:axis], self.processes, *inputs.shape[axis:]]
        return inputs + torch.rand(shape, device=inputs.device).select(axis, self.rank) - 0.5


class SharedNoisePrior(_SharedNoise, EntropyBottleneck):  # type: ignore[misc]
    pass


class SharedNoiseGaussian(_SharedNoise, GaussianConditional):  # type: ignore[misc]
    pass


@dataclass(frozen=True, slots=True)
class Coded:
    """`y_hat`: latents as g_s gets them, before the gain, [B, M, h, w]. `bits_y`, `bits_z`: bits a picture, [B]."""

    y_hat: Tensor
    bits_y: Tensor
    bits_z: Tensor


@dataclass(frozen=True, slots=True)
class TrainingOutput:
    """`x_hat` [B, 3, H, W]; `bits_y`, `bits_z`: bits a picture, [B] (paper eq. 2); `y` scaled latents [B, M, h, w]."""

    x_hat: Tensor
    bits_y: Tensor
    bits_z: Tensor
    y: Tensor


class TrainableCodec(nn.Module):
    def __init__(self, arch: Architecture | None = None, *, gain_span: float = 12.0) -> None:
        """`gain_span`: ratio of the finest to the coarsest quantisation step at the start of training."""
        super().__init__()
        self.arch = arch or Architecture()
        self.g_a = AnalysisTransform(self.arch)
        self.g_s = SynthesisTransform(self.arch)
        self.h_a = HyperAnalysisTransform(self.arch)
        self.h_s = HyperSynthesis(self.arch)
        self.context = ContextModel(self.arch) if self.arch.context else None
        self.units: Units | None = None  # of h_s and the context model, see there
        self.entropy_bottleneck = SharedNoisePrior(self.arch.z)
        self.gaussian = SharedNoiseGaussian(None, scale_bound=SCALE_MIN)
        start = torch.linspace(-0.5, 0.5, LEVELS) * torch.log(torch.tensor(gain_span))
        self.log_gain = nn.Parameter(start[:, None].repeat(1, self.arch.m))
        self.log_inverse_gain = nn.Parameter(-start[:, None].repeat(1, self.arch.m))

    def share_noise(self, rank: int, processes: int) -> None:
        """Say which share of the whole batch this process has; all processes must be seeded alike each step."""
        for part in (self.entropy_bottleneck, self.gaussian):
            part.rank, part.processes = rank, processes

    def medians(self) -> Tensor:
        """Medians of the factorised prior, [1, Z, 1, 1], without gradient."""
        return self.entropy_bottleneck.quantiles[:, 0, 1].detach()[None, :, None, None]

    def forward(self, x: Tensor, quality_steps: Tensor, *, rounded: float = 0.0) -> TrainingOutput:
        """`rounded`: 0 feeds g_s noisy latents; 1 feeds it rounded ones, straight-through (Minnen & Singh 2020).

        Above 0, h_s sees rounded hyper-latents and `bits_y` are those of the rounded latents. Scales are then fitted to
        what is really coded; y and the means keep the noisy rate's gradient, for rounding has none.
        """
        y = self.g_a(x) * interpolate_levels(self.log_gain, quality_steps)
        coded = self.code(y, quality_steps, rounded=rounded)
        x_hat = self.g_s(coded.y_hat * interpolate_levels(self.log_inverse_gain, quality_steps))
        return TrainingOutput(x_hat=x_hat, bits_y=coded.bits_y, bits_z=coded.bits_z, y=y)

    def code(self, y: Tensor, quality_steps: Tensor, *, rounded: float = 0.0) -> Coded:
        """The entropy model alone. `y`: scaled latents [B, M, h, w]; `rounded` as above."""
        z = self.h_a(y)
        with torch.autocast(y.device.type, enabled=False):  # a difference of two sigmoids: bfloat16 would lose it
            z_hat, z_likelihoods = self.entropy_bottleneck(z)
            medians = self.medians()
            if rounded > 0:
                z_hat = z + ((z - medians).round() + medians - z).detach()
            # h_s sees symbols: zero is the median, at the border's zero padding too
            means, log_scales = self.coding(y, z_hat - medians, quality_steps)
        scales = log_scales.clamp(max=5.6).exp()  # the lower bound, with its own gradient rule, is in `gaussian`
        y_hat, likelihoods = self.gaussian(y, scales.detach() if rounded > 0 else scales, means=means)
        bits_y = _bits(likelihoods)
        if rounded > 0:
            residual = y - means
            symbols = residual.detach().round()
            y_hat = torch.lerp(y_hat, y + (symbols - residual.detach()), rounded)
            bits = _bits(self.gaussian(symbols, scales, training=False)[1])
            bits_y = bits + (bits_y - bits_y.detach())
        return Coded(y_hat, bits_y, _bits(z_likelihoods))

    def coding(self, y: Tensor, z_hat: Tensor, quality_steps: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log scales that code `y` [B, M, h, w], each [B, M, h, w]; `z_hat`: symbols of the hyper-latents.

        The context model sees the first pass as it is really coded, rounded.
        """
        prior, hidden = self.h_s(z_hat, quality_steps, (y.shape[2], y.shape[3]), self.units)
        means, log_scales = prior.chunk(2, dim=1)
        if self.context is None:
            return means, log_scales
        first = torch.from_numpy(first_pass(*y.shape[1:])).to(y.device)
        means_then, log_scales_then = (prior + self.context(hidden, self.known(y, means), self.units)).chunk(2, dim=1)
        return torch.where(first, means, means_then), torch.where(first, log_scales, log_scales_then)

    def known(self, y: Tensor, means: Tensor) -> Tensor:
        """The first pass's symbols, 0 elsewhere, without gradient; shapes [B, M, h, w]."""
        first = torch.from_numpy(first_pass(*y.shape[1:])).to(y.device)
        return torch.where(first, (y - means).detach().round(), 0.0).clamp(-KNOWN_TOP, KNOWN_TOP)


def _bits(likelihoods: Tensor) -> Tensor:
    """Code length of each picture's symbols: [B, C, h, w] -> [B]."""
    return -torch.log2(likelihoods).flatten(1).sum(1)
