"""Where latents come from before the first step: linear components of blocks of 16x16 pixels.

* `start_from_blocks`: a fresh codec's short cuts become the principal components of photographs' blocks, so that
  training begins at a block transform codec (27 dB after 74 steps where noise took 2,000 to reach 23).
* `start_levels`: a trained codec's levels are moved, so that its quality 1 begins as what was its quality 3, say.
* `widened`: a trained codec gets more latents, the directions that best predict, linearly, what it leaves out of a
  block (reduced-rank regression; Izenman, J. Multivariate Analysis 5, 1975). Nothing else of its function changes.

A latent is scaled by `GAIN`: latents a unit of orthonormal coefficient. 4.75 makes a quantisation step of 1 the mean
squared error that level 4.5 of 8 aims at.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shared.codec.transforms import STRIDE_Y, between_levels
from trainer.model import TrainableCodec

GAIN = 4.75
BLOCK = 3 * STRIDE_Y * STRIDE_Y  # samples in a block
RIDGE = 1e-6  # of the blocks' covariance, on samples in [0, 1]


@torch.no_grad()
def start_from_blocks(codec: TrainableCodec, pictures: Sequence[Tensor]) -> None:
    """Set the linear short cuts to principal components, and the rest to add nothing, in place.

    `pictures`: float [3, H, W] in [0, 1], sides multiples of 16, with well above 768 blocks in all.
    """
    flat = torch.cat([_blocks(picture) for picture in pictures]).double() - 0.5
    _, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    basis = vectors.flip(1)[:, : codec.arch.m].T.float()
    codec.g_a.short.weight.copy_(GAIN * basis.reshape(-1, 3, STRIDE_Y, STRIDE_Y))
    codec.g_s.short.weight.copy_(basis.T[:, :, None, None] / GAIN)
    for layer in (codec.g_a.short, codec.g_s.short, codec.g_a.last, codec.g_s.last):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    for layer in (codec.g_a.last, codec.g_s.last):  # the bodies learn from the second step on
        nn.init.zeros_(layer.weight)


@torch.no_grad()
def widened(codec: TrainableCodec, m: int, pictures: Sequence[Tensor]) -> TrainableCodec:
    """A codec of `m` latents that does with its first ones what `codec` does. `pictures` as above, sides of 64."""
    old = codec.arch.m
    wide = TrainableCodec(replace(codec.arch, m=m))
    state, own = wide.state_dict(), codec.state_dict()
    for name, value in own.items():
        if state[name].shape == value.shape:
            state[name].copy_(value)
    analysis, synthesis = _missing_components(codec, m - old, pictures)
    new_rows = torch.cat([own["g_a.last.weight"], torch.zeros_like(state["g_a.last.weight"][old:])])
    state["g_a.last.weight"].copy_(new_rows)
    for name in ("g_a.last.bias", "g_a.short.bias"):
        state[name].copy_(torch.cat([own[name], torch.zeros(m - old)]))
    state["g_a.short.weight"].copy_(torch.cat([own["g_a.short.weight"], analysis]))
    state["g_s.short.weight"].copy_(torch.cat([own["g_s.short.weight"], synthesis], 1))
    for name in ("g_s.body.0.weight", "h_a.body.0.weight"):
        state[name].zero_()[:, :old] = own[name]
    for name in ("h_s.conv3.weight", "h_s.conv3.bias"):  # means, then log scales: those of the last latent fit best
        means, scales, hidden = own[name].split([old, old, codec.arch.context])
        more = scales[-1:].expand(m - old, *scales.shape[1:])
        state[name].copy_(torch.cat([means, torch.zeros_like(more), scales, more, hidden]))
    if codec.context is not None:  # which tells the new ones nothing yet, and learns nothing from them
        state["context.conv1.weight"].zero_()[:, :old] = own["context.conv1.weight"]
        for name in ("context.conv2.weight", "context.conv2.bias"):
            means, scales = own[name].chunk(2)
            none = torch.zeros_like(means[:1]).expand(m - old, *means.shape[1:])
            state[name].copy_(torch.cat([means, none, scales, none]))
    for name in ("log_gain", "log_inverse_gain"):
        state[name].copy_(torch.cat([own[name], own[name][:, -1:].expand(-1, m - old)], 1))
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def start_levels(codec: TrainableCodec, qualities: Sequence[float]) -> None:
    """Give each level the gains and the bias of h_s that the codec has at one of `qualities`, in [1, 8], in place."""
    steps = torch.tensor([round(256 * quality) for quality in qualities])
    for table in (codec.log_gain, codec.log_inverse_gain, codec.h_s.level_bias):
        table.copy_(between_levels(table, steps)[:, :, 0, 0])


def _missing_components(codec: TrainableCodec, count: int, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights [count, 3, 16, 16] and [768, count, 1, 1] of the short cuts that best add what `codec` leaves out."""
    seen, left = [], []
    for picture in pictures:
        x = picture[None]
        left.append(_blocks((x - codec.g_s(codec.g_a(x)))[0]))
        seen.append(_blocks(picture))
    x, r = torch.cat(seen).double() - 0.5, torch.cat(left).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x) + RIDGE * torch.eye(BLOCK, dtype=torch.float64))
    whiten = vectors * values.rsqrt() @ vectors.T
    u, d, v = torch.linalg.svd(r.T @ x / len(x) @ whiten)
    analysis = (GAIN * d[:count, None] * v[:count] @ whiten).float()
    synthesis = (u[:, :count] / GAIN).float()
    return analysis.reshape(count, 3, STRIDE_Y, STRIDE_Y), synthesis[:, :, None, None]


def _blocks(picture: Tensor) -> Tensor:
    """[3, H, W] -> [H/16 * W/16, 768], each in the order of the short cuts' weights."""
    tiles = picture.unfold(1, STRIDE_Y, STRIDE_Y).unfold(2, STRIDE_Y, STRIDE_Y)
    return tiles.permute(1, 2, 0, 3, 4).reshape(-1, BLOCK)
