"""Latents that begin as linear components: a fresh codec is a block transform codec, a widened one loses nothing."""

from dataclasses import replace

import pytest
import skimage.data
import torch
from torch import Tensor

from shared.codec.transforms import Architecture
from trainer.entropy import with_context
from trainer.latents import start_from_blocks, widened
from trainer.model import TrainableCodec

SMALL = Architecture(c4=16, c8=16, c16=16, m=24, z=8, h=8)
LEVEL = torch.tensor([4 * 256])


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    return [torch.from_numpy(p[:256, :384].copy()).permute(2, 0, 1).float() / 255 for p in photographs]


@pytest.fixture
def trained(pictures: list[Tensor]) -> TrainableCodec:
    """Not trained, but no longer linear: what the bodies add is not zero."""
    torch.manual_seed(3)
    codec = TrainableCodec(SMALL)
    start_from_blocks(codec, pictures)
    torch.nn.init.normal_(codec.g_a.last.weight, 0.0, 0.02)
    return codec.eval()


@torch.no_grad()
def error(codec: TrainableCodec, pictures: list[Tensor]) -> float:
    """Mean squared error of pictures that are transformed and back, without quantisation."""
    return sum(float((codec.g_s(codec.g_a(p[None])) - p).square().mean()) for p in pictures) / len(pictures)


def test_a_fresh_codec_leaves_out_just_what_as_many_principal_components_do(pictures: list[Tensor]) -> None:
    codec = TrainableCodec(SMALL)
    start_from_blocks(codec, pictures)
    blocks = torch.cat(
        [p.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 768) for p in pictures]
    )
    values = torch.linalg.eigvalsh((blocks - 0.5).double().T @ (blocks - 0.5).double() / len(blocks)).flip(0)
    assert error(codec, pictures) == pytest.approx(float(values[SMALL.m :].sum()) / 768, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("context", [0, 8])
def test_more_latents_leave_the_first_ones_alone_and_recover_what_was_left_out(
    trained: TrainableCodec, pictures: list[Tensor], context: int
) -> None:
    trained = with_context(trained, context)
    if trained.context is not None:
        torch.nn.init.normal_(trained.context.conv2.weight, 0.0, 0.02)
    trained.eval()
    wide = widened(trained, 40, pictures).eval()
    assert wide.arch == replace(SMALL, m=40, context=context)
    x = pictures[0][None]
    y, more = trained.g_a(x), wide.g_a(x)
    torch.testing.assert_close(more[:, :24], y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide.h_a(more), trained.h_a(y), rtol=1e-4, atol=1e-4)
    assert error(wide, pictures) < 0.8 * error(trained, pictures)
    before, after = trained(x, LEVEL), wide(x, LEVEL)
    torch.testing.assert_close(after.bits_z, before.bits_z)
    assert float(after.bits_y) >= float(before.bits_y)
    steps = torch.tensor([4 * 256])
    zeros = torch.zeros(1, 8, 4, 6)
    for first, second in zip(trained.coding(y, zeros, steps), wide.coding(more, zeros, steps), strict=True):
        torch.testing.assert_close(second[:, :24], first, rtol=1e-4, atol=1e-4)
