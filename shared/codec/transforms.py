"""The float transforms: g_a, h_a and g_s, residual CNNs after arXiv 2108.09993, made lean.

Nothing here decides how a symbol is coded: h_a's output is rounded and sent, g_s runs after decoding. What both
sides must agree on bit by bit is in `shared.codec.hyper`.

            x [3, H, W]
     g_a    unshuffle 4 -> conv -> down -> 2 res @ 1/8 -> down -> res @ 1/16 -> conv  -> (+) -> y [M, H/16, W/16]
              `------------------ linear, 16x16 pixels to M ---------------------------^
     h_a    conv -> down -> down                                                      -> z [Z, H/64, W/64]
     g_s    conv -> res @ 1/16 -> up -> 2 res @ 1/8 -> up -> res @ 1/4 -> conv -> shuffle 4 -> (+) -> x_hat
              `------------------ linear, M to 16x16 pixels ------------------------------------^

The linear short cuts start as the principal components of 16x16 blocks, so that training begins at a block transform
codec instead of at noise; everything else learns what such a codec lacks. They cost 0.4 kMAC a pixel each.

All work is at 1/4 resolution and below: memory traffic and kernel count rule speed there, not multiplications
(Jia et al., DCVC-RT, CVPR 2025). The last layer of g_a and of g_s run in float32 whatever the rest runs in, because
bfloat16 steps by 1 above 128 and would quantise latents and pixels itself.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE_Y = 16  # pixels per latent
STRIDE_Z = 64  # pixels per hyper-latent; the grid of z covers that of y


@dataclass(frozen=True, slots=True)
class Architecture:
    """Channel counts of the codec.

    `c4`, `c8`, `c16`: channels at 1/4, 1/8 and 1/16 resolution. `m`: latent channels. `z`: hyper-latent channels.
    `h`: channels inside h_a and h_s. `context`: channels inside the context model, 0 where there is none.
    """

    c4: int = 64
    c8: int = 128
    c16: int = 144
    m: int = 128
    z: int = 64
    h: int = 64
    context: int = 0

    def as_dict(self) -> dict[str, int]:
        """Without `context` where there is none, as bundles were written before there was one."""
        return {name: value for name, value in asdict(self).items() if name != "context" or value}


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), both 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class _OwnTypeConv(nn.Conv2d):
    """A convolution in the number type of its weights, under autocast and whatever the module before it gives."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def _start_at_unit_gain(body: nn.Sequential) -> None:
    """Weights that keep the signal's variance from layer to layer; the default loses two thirds of it at each."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in body.modules():
        if isinstance(module, ResidualBlock):
            nn.init.normal_(module.conv2.weight, 0.0, 0.1 * module.conv2.weight[0].numel() ** -0.5)


class AnalysisTransform(nn.Module):
    """g_a: x [B, 3, H, W] in [0, 1], sides multiples of 16 -> y [B, M, H/16, W/16], float32."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, arch.c4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(arch.c4, arch.c8, 3, stride=2, padding=1),
            ResidualBlock(arch.c8),
            ResidualBlock(arch.c8),
            nn.Conv2d(arch.c8, arch.c16, 3, stride=2, padding=1),
            ResidualBlock(arch.c16),
        )
        _start_at_unit_gain(self.body)
        self.last = _OwnTypeConv(arch.c16, arch.m, 3, padding=1)
        self.short = _OwnTypeConv(3, arch.m, STRIDE_Y, stride=STRIDE_Y)

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.5
        y: Tensor = self.last(self.body(x)) + self.short(x)
        return y


class SynthesisTransform(nn.Module):
    """g_s: y_hat [B, M, h, w] -> x_hat [B, 3, 16 h, 16 w], float32, not yet clamped to [0, 1]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(arch.m, arch.c16, 3, padding=1),
            ResidualBlock(arch.c16),
            nn.Conv2d(arch.c16, 4 * arch.c8, 1),
            nn.PixelShuffle(2),
            ResidualBlock(arch.c8),
            ResidualBlock(arch.c8),
            nn.Conv2d(arch.c8, 4 * arch.c4, 1),
            nn.PixelShuffle(2),
            ResidualBlock(arch.c4),
        )
        _start_at_unit_gain(self.body)
        self.last = _OwnTypeConv(arch.c4, 48, 3, padding=1)
        self.short = _OwnTypeConv(arch.m, 3 * STRIDE_Y * STRIDE_Y, 1)

    def forward(self, y_hat: Tensor) -> Tensor:
        fine, coarse = self.parts(y_hat)
        return F.pixel_shuffle(fine, 4) + F.pixel_shuffle(coarse, STRIDE_Y) + 0.5

    def parts(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What x_hat is the sum of, pixels as channels: float32 [B, 48, 4 h, 4 w] and [B, 768, h, w]."""
        fine: Tensor = self.last(self.body(y_hat))
        coarse: Tensor = self.short(y_hat)
        return fine.float(), coarse.float()


class HyperAnalysisTransform(nn.Module):
    """h_a: scaled y [B, M, h, w] -> z [B, Z, h/4, w/4], float32."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(arch.m, arch.h, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(arch.h, arch.h, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.last = _OwnTypeConv(arch.h, arch.z, 3, stride=2, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        z: Tensor = self.last(self.body(y))
        return z


def between_levels(table: Tensor, quality_steps: Tensor) -> Tensor:
    """Per-channel values at fractional qualities, linear between the trained levels.

    `table`: float [8, C]; `quality_steps`: int [B] in [256, 2048] -> float [B, C, 1, 1].
    """
    position = (quality_steps - 256).clamp(0, 7 * 256)
    low = (position // 256).clamp(max=6)
    fraction = ((position - low * 256).to(table.dtype) / 256).unsqueeze(1)
    return torch.lerp(table[low], table[low + 1], fraction)[:, :, None, None]


def interpolate_levels(log_gains: Tensor, quality_steps: Tensor) -> Tensor:
    """Gains at fractional qualities, log-linear between the trained levels (Cui et al., CVPR 2021); shapes as above."""
    return between_levels(log_gains, quality_steps).exp()
