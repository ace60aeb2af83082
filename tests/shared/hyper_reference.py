"""h_s once more, as plainly as it can be written: the reference that the fast one must equal bit for bit.

`dtype=object` computes with Python's unbounded integers; int64 is the same arithmetic where nothing can overflow.
"""

import numpy as np
from numpy.typing import NDArray

from shared.codec.hyper import SCALE_COUNT, Z_MAX, IntegerHyperSynthesis, IntegerLayer

Ints = NDArray[np.generic]


def reference_hyper_synthesis(
    parameters: IntegerHyperSynthesis, z_hat: Ints, quality: int, size: tuple[int, int], dtype: type = np.int64
) -> tuple[Ints, Ints]:
    """z_hat [Z, hz, wz] -> means [M, hy, wy] in 1/16 steps, scale indexes [M, hy, wy]."""
    a = np.clip(z_hat.astype(dtype), -Z_MAX, Z_MAX)
    for i, layer in enumerate(parameters.layers):
        bias = parameters.bias_at(quality) if i == 0 else layer.bias
        a = _layer(layer, a, bias, dtype)
        if i < 2:
            a = _shuffle(np.clip(a, 0, parameters.act_max[i]))
        if i == 1:
            a = a[:, : size[0], : size[1]]
    half = len(a) // 2
    return a[:half], np.clip(a[half:], 0, SCALE_COUNT - 1)


def _layer(layer: IntegerLayer, a: Ints, bias: Ints, dtype: type) -> Ints:
    _, height, width = a.shape
    padded = np.zeros((a.shape[0], height + 2, width + 2), dtype)
    padded[:, 1:-1, 1:-1] = a
    weight = layer.weight.astype(dtype)
    sums = np.zeros((weight.shape[0], height, width), dtype)
    for dy in range(3):
        for dx in range(3):
            window = padded[:, dy : dy + height, dx : dx + width].reshape(a.shape[0], -1)
            sums += np.dot(weight[:, :, dy, dx], window).reshape(-1, height, width)
    sums += bias.astype(dtype)[:, None, None]
    return (sums * layer.multiplier.astype(dtype)[:, None, None] + (1 << (layer.shift - 1))) >> layer.shift


def _shuffle(a: Ints) -> Ints:
    channels, height, width = a.shape
    return a.reshape(channels // 4, 2, 2, height, width).transpose(0, 3, 1, 4, 2).reshape(channels // 4, 2 * height, -1)
