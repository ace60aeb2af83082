"""Exact integer layers on a device: what `shared.codec.hyper` computes with, each the same function everywhere.

Activations are kept as a - 128 in [-128, 127], channels last, and a layer's bias makes up for it: sum w a =
sum w (a - 128) + 128 sum w. So every factor is an integer of at most 8 significant bits. Where the processor multiplies
bytes into 32-bit sums (VNNI), a convolution is an int8 matmul; elsewhere one in float32 or float64, which is exact as
`shared.codec.hyper` says. Requantising is int64 arithmetic.
"""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared.codec.elementwise import requantise

SHIFTED = 128  # what activations are kept less
FLOAT32_EXACT = 2**24
BAND_BYTES = 64 * 2**20  # an unfolded band of rows stays below this, so that memory does not grow with the frame


class IntegerMatmul:
    """A convolution as a matmul: integers [B, H, W, in] -> sums [B, H, W, out], exact.

    `weight`: int8 [out, in, k, k], k odd. `pad`: what lies beyond the border, as activations are kept.
    """

    def __init__(self, weight: NDArray[np.int8], pad: int, device: torch.device) -> None:
        out, _, self.size, _ = weight.shape
        rows = weight.transpose(2, 3, 1, 0).reshape(-1, out)  # as `_columns` orders what they meet
        self.pad = pad
        if device.type == "cpu" and has_int8_matmul():
            self.dtype = torch.int8
        elif SHIFTED * int(np.abs(rows.astype(np.int64)).sum(axis=0).max()) < FLOAT32_EXACT:
            self.dtype = torch.float32
        else:
            self.dtype = torch.float64
        self.weight = torch.from_numpy(np.ascontiguousarray(rows)).to(device, self.dtype)

    def __call__(self, a: Tensor) -> Tensor:
        """`a`: int8. Returns int32."""
        batch, height, width, _ = a.shape
        reach = self.size // 2
        padded = F.pad(a, (0, 0, reach, reach, reach, reach), value=self.pad) if reach else a
        rows = max(1, BAND_BYTES // max(1, batch * width * self.weight.shape[0] * self.weight.element_size()))
        bands = [
            self._multiply(self._columns(padded[:, top : top + min(rows, height - top) + 2 * reach]))
            for top in range(0, height, rows)
        ]
        return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)

    def _columns(self, padded: Tensor) -> Tensor:
        """[B, H + k - 1, W + k - 1, in] -> [B, H, W, k k in], ordered by row, column and channel of the window."""
        if self.size == 1:
            return padded
        height, width = (side - self.size + 1 for side in padded.shape[1:3])
        moves = [(dy, dx) for dy in range(self.size) for dx in range(self.size)]
        return torch.cat([padded[:, dy : dy + height, dx : dx + width] for dy, dx in moves], dim=3)

    def _multiply(self, columns: Tensor) -> Tensor:
        flat = columns.reshape(-1, columns.shape[3])
        if self.dtype == torch.int8:
            sums: Tensor = torch._int_mm(flat, self.weight)
        else:
            sums = torch.matmul(flat.to(self.dtype), self.weight).to(torch.int32)
        return sums.reshape(*columns.shape[:3], -1)


class Requantiser:
    """What turns a layer's sums into the next integers: clamp((sums + bias) * multiplier / 2^shift, rounded half up).

    `bias`, `multiplier`: int64 [out]. Everything stays below 2^63, which the parameters' check makes sure of.
    """

    def __init__(
        self, bias: NDArray[np.int64], multiplier: NDArray[np.int64], shift: int, device: torch.device
    ) -> None:
        self.bias, self.multiplier, self.shift, self.device = bias, multiplier, shift, device

    def __call__(
        self,
        sums: Tensor,
        *,
        top: int | None = None,
        more: NDArray[np.int64] | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """`sums`: int32 [B, H, W, out]. `more`: int64 [B, out] added to the bias. `onto`: int32 as `sums`, added last.

        Returns activations clamped to [0, top] as they are kept, int8; or, without `top`, int32 as they are.
        """
        batch, _, _, out = sums.shape
        bias = np.broadcast_to(self.bias, (batch, out)) if more is None else self.bias + more
        if is_compiled_for(self.device):
            flat = rows_of(sums)
            made = np.empty(flat.shape, np.int32 if top is None else np.int8)
            added = np.empty((batch, 0, out), np.int32) if onto is None else rows_of(onto)
            low, high, off = (-(2**31), 2**31 - 1, 0) if top is None else (0, top, SHIFTED)
            requantise(flat, np.ascontiguousarray(bias), self.multiplier, self.shift, added, low, high, off, made)
            return torch.from_numpy(made.reshape(sums.shape))
        biases, multiplier = (torch.from_numpy(v.copy()).to(self.device) for v in (bias, self.multiplier))
        exact = (sums.to(torch.int64) + biases[:, None, None]) * multiplier + (1 << self.shift - 1) >> self.shift
        if onto is not None:
            exact = exact.clamp(-(2**31), 2**31 - 1).to(torch.int32) + onto
        return (
            exact.clamp(-(2**31), 2**31 - 1).to(torch.int32)
            if top is None
            else (exact.clamp(0, top) - SHIFTED).to(torch.int8)
        )


def is_compiled_for(device: torch.device) -> bool:
    """Whether the kernels of `shared.codec.elementwise` do the work there; elsewhere torch does the same."""
    return device.type == "cpu"


def rows_of(a: Tensor) -> NDArray[Any]:
    """[B, H, W, N] as [B, H W, N], for a kernel."""
    flat: NDArray[Any] = a.contiguous().numpy().reshape(a.shape[0], -1, a.shape[3])
    return flat


def shuffled(a: Tensor) -> Tensor:
    """Pixel shuffle by 2, channels last: [B, H, W, 4 C] -> [B, 2 H, 2 W, C]; channel 4 c + 2 dy + dx goes to c."""
    batch, height, width, channels = a.shape
    parts = a.reshape(batch, height, width, channels // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, 2 * height, 2 * width, channels // 4)


@functools.cache
def has_int8_matmul() -> bool:
    """Whether this processor's int8 matmul is fast, and exact where it is most likely not to be.

    Without VNNI a library may add pairs of products in 16 bits, which saturate: so the largest products are tried.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    generator = np.random.default_rng(0)
    for rows, inner, out in ((1, 64, 3), (37, 576, 320), (300, 1440, 96)):
        a, b = generator.integers(-128, 128, (rows, inner)), generator.integers(-127, 128, (inner, out))
        for left, right in ((a, b), (np.full_like(a, -128), np.full_like(b, -127)), (np.full_like(a, 127), b)):
            made = torch._int_mm(torch.from_numpy(left.astype(np.int8)), torch.from_numpy(right.astype(np.int8)))
            if not np.array_equal(made.numpy(), left @ right):
                return False
    return True
