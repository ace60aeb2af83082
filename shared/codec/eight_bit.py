"""g_a in bytes, for processors that multiply bytes twice as fast as they multiply bfloat16 (VNNI).

Pictures are bytes already; activations become bytes too, those after a ReLU in [0, 255] and the others around 128, each
tensor with one scale; weights are bytes with a scale for each output channel, and sums are exact. The scales come from
the largest activations on real pictures (`ranges`), which a bundle's manifest has as `ranges`; what is larger is
clipped. The short cut from pixels to latents has two bytes a weight; it and the last layer give float32.

A decoder sees of this only other latents, off by 0.002 squared steps of the finest quality, to which rounding them to
integers adds forty times that (docs/architecture.md).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.codec.elementwise import add_scaled, unshuffled
from shared.codec.transforms import STRIDE_Y, AnalysisTransform, ResidualBlock
from shared.errors import InvalidBundle

MARGIN = 1.25  # how much larger activations may become than on the pictures that were measured
ZERO = 128  # the byte that stands for 0 in tensors of both signs
UNSHUFFLE = 4  # pixels a side that become channels
USUAL = 64  # positions a side for which weights are laid out; for other sizes it is as good, or nearly

_Role = Literal["relu", "plain", "added", "out"]


def ranges(g_a: AnalysisTransform, pictures: Iterable[Tensor]) -> list[float]:
    """The largest activation after each layer but the last. `pictures`: [B, 3, H, W] in [0, 1], sides multiples of 16.

    `g_a` in float32.
    """
    largest = [0.0] * (len(list(_layers(g_a))) - 1)
    with torch.no_grad():
        for picture in pictures:
            x = kept = F.pixel_unshuffle(picture - 0.5, UNSHUFFLE)
            for i, (conv, role) in enumerate(_layers(g_a)):
                if role == "out":
                    break
                if role == "relu":
                    kept, x = x, F.relu(conv(x))
                else:
                    x = conv(x) + kept if role == "added" else conv(x)
                largest[i] = max(largest[i], float(x.abs().max()))
    return largest


class EightBitAnalysis:
    """g_a as above. `largest`: what `ranges` gave. Raises InvalidBundle where that does not fit `g_a`."""

    def __init__(self, g_a: AnalysisTransform, largest: Sequence[float]) -> None:
        layers = list(_layers(g_a))
        numbers = [value for value in largest if isinstance(value, float | int) and 0 < value < float("inf")]
        if not len(numbers) == len(largest) == len(layers) - 1:
            raise InvalidBundle(f"ranges of g_a: expected {len(layers) - 1} positive numbers, got {list(largest)}")
        self._layers: list[tuple[_ByteConv, _Role]] = []
        given = kept = _PIXELS
        for (conv, role), top in zip(layers, [*largest, None], strict=True):
            weight, bias = conv.weight.detach().float(), _bias(conv)
            if not self._layers:
                bias = bias + _ON_PIXELS * weight.sum((1, 2, 3))
                shape = (len(weight), 3, UNSHUFFLE, UNSHUFFLE, *weight.shape[2:])
                weight = weight.reshape(shape).permute(0, 2, 3, 1, 4, 5).flatten(1, 3)
            made = None if top is None else _Scale(MARGIN * top / 255, 0) if role == "relu" else _both_signs(top)
            added = kept if role == "added" else None
            self._layers.append((_ByteConv(weight, bias, conv.stride[0], given, made, added), role))
            kept = given
            given = made or given
        self._short = _ShortCut(g_a.short)

    def __call__(self, rgb: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> y float32 [B, M, H/16, W/16], rounded up: the last row and column are repeated."""
        x = kept = pixels = _unshuffled(rgb)
        for conv, role in self._layers:
            if role == "relu":
                kept, x = x, conv(x)
            else:
                x = conv(x, kept) if role == "added" else conv(x)
        return self._short.added_to(x, pixels)


class _Scale:
    """A byte b stands for (b - zero) * step."""

    def __init__(self, step: float, zero: int) -> None:
        self.step, self.zero = step, zero


_PIXELS = _Scale(1 / 255, ZERO)  # which are 128/255 less than they were
_ON_PIXELS = ZERO / 255 - 0.5  # to be added, for g_a takes 0.5 off


def _both_signs(top: float) -> _Scale:
    return _Scale(MARGIN * top / (ZERO - 1), ZERO)


class _ByteConv:
    """A convolution of bytes. `made`: of what comes out, None for float32. `added`: of what it is added to."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        given: _Scale,
        made: _Scale | None = None,
        added: _Scale | None = None,
    ) -> None:
        self.given, self.made, self.added, self.bias = given, made, added, bias
        self.relu = "relu" if made is not None and made.zero == 0 else "none"
        self.window = ([stride] * 2, [weight.shape[2] // 2] * 2, [1, 1], 1)
        self.steps = _steps(weight)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        whole = (weight / self.steps[:, None, None, None]).round_().to(torch.int8)
        # laid out for no size at all, some weights are put in another order again with every picture
        usual = [1, weight.shape[1], USUAL, USUAL]
        self.weight = torch.ops.onednn.qconv_prepack(whole, self.steps, given.step, given.zero, *self.window, usual)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """uint8 -> uint8, or float32 from the last one. `onto` is overwritten with the sum, and returned."""
        operands = (x, self.given.step, self.given.zero, self.weight, self.steps, self.zeros)
        made = (1.0, 0, torch.float32) if self.made is None else (self.made.step, self.made.zero, torch.uint8)
        run = torch.ops.onednn.qconv2d_pointwise
        out: Tensor
        if onto is None or self.added is None:
            out = run(*operands, self.bias, *self.window, *made, self.relu, [], "")
        else:
            added = (self.added.step, self.added.zero)
            out = run.binary(*operands, onto, self.bias, *self.window, *made, *added, "sum", 1.0, None, [], "")
        return out


class _ShortCut:
    """The short cut from pixels to latents, a matmul, with two bytes a weight: the second has what the first leaves."""

    def __init__(self, conv: nn.Conv2d) -> None:
        side = conv.kernel_size[0] // UNSHUFFLE
        shape = (conv.out_channels, 3, side, UNSHUFFLE, side, UNSHUFFLE)
        weight = conv.weight.detach().float().reshape(shape).permute(0, 2, 4, 3, 5, 1).flatten(1)
        coarse = _steps(weight)
        rest = weight - (weight / coarse[:, None]).round_() * coarse[:, None]
        both, steps = torch.cat([weight, rest]), torch.cat([coarse, _steps(rest)])
        self.side = side
        self.weight = (both / steps[:, None]).round_().to(torch.int8).t().contiguous()
        self.steps = (steps * _PIXELS.step).numpy()
        self.bias = (_bias(conv) + _ON_PIXELS * weight.sum(1)).numpy()

    def added_to(self, y: Tensor, pixels: Tensor) -> Tensor:
        """`y` [B, M, h, w] plus what comes of unshuffled pixels [B, 48, side h, side w]."""
        batch, channels, height, width = y.shape
        rows = pixels.permute(0, 2, 3, 1).reshape(batch, height, self.side, width, self.side * pixels.shape[1])
        flat = rows.transpose(2, 3).reshape(batch * height * width, -1)
        sums = torch._int_mm(flat.bitwise_xor(ZERO).view(torch.int8), self.weight)
        made = y.permute(0, 2, 3, 1).contiguous()
        add_scaled(sums.numpy(), self.steps, self.bias, made.numpy().reshape(-1, channels))
        return made.permute(0, 3, 1, 2)


def _steps(weight: Tensor) -> Tensor:
    """What one in a byte stands for, for each output."""
    return (weight.abs().flatten(1).amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)


def _layers(g_a: AnalysisTransform) -> Iterator[tuple[nn.Conv2d, _Role]]:
    """g_a's convolutions in order: with a ReLU after it, added to what the layer before was given, or neither."""
    modules = list(g_a.body)
    for module, after in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, ResidualBlock):
            yield module.conv1, "relu"
            yield module.conv2, "added"
        elif isinstance(module, nn.Conv2d):
            yield module, "relu" if isinstance(after, nn.ReLU) else "plain"
    yield g_a.last, "out"


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().float()


def _unshuffled(rgb: Tensor) -> Tensor:
    """uint8 [B, 3, h, w] -> [B, 48, H/4, W/4] channels last, by row, column and colour; H and W multiples of 16."""
    batch, _, height, width = rgb.shape
    rows, columns = (STRIDE_Y // UNSHUFFLE * -(-side // STRIDE_Y) for side in (height, width))
    blocks = np.empty((batch, rows, columns, 3 * UNSHUFFLE**2), np.uint8)
    unshuffled(rgb.permute(0, 2, 3, 1).contiguous().numpy(), UNSHUFFLE, blocks)
    return torch.from_numpy(blocks).permute(0, 3, 1, 2)


@functools.cache
def has_byte_convolution() -> bool:
    """Whether this processor convolves bytes fast, and exactly where that is least likely.

    Without VNNI a library may add pairs of products in 16 bits, which saturate: so the largest products are tried.
    """
    if not torch.cpu._is_vnni_supported() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    x = torch.full((1, 48, 5, 7), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for value in (127.0, -127.0):
        weight = torch.full((16, 48, 3, 3), value)
        try:
            made = _ByteConv(weight, torch.zeros(16), 1, _Scale(1.0, 0))(x)
        except (RuntimeError, TypeError):  # a torch of other arguments
            return False
        if not torch.equal(made, F.conv2d(x.double(), weight.double(), padding=1).float()):
            return False
    return True
