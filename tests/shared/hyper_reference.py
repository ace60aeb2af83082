"""h_s once more, as plainly as it can be written: the reference that the fast one must equal bit for bit.

`dtype=object` computes with Python's unbounded integers; int64 is the same arithmetic where nothing can overflow.
"""

import numpy as np
from numpy.typing import NDArray

from shared.codec.hyper import KNOWN_TOP, SCALE_COUNT, Z_MAX, IntegerHyperSynthesis, IntegerLayer

Ints = NDArray[np.generic]


def reference_hyper_synthesis(
    parameters: IntegerHyperSynthesis, z_hat: Ints, quality: int, size: tuple[int, int], dtype: type = np.int64
) -> tuple[Ints, Ints]:
    """z_hat [Z, hz, wz] -> means [M, hy, wy] in 1/16 steps, scale indexes [M, hy, wy]."""
    out = _first(parameters, z_hat, quality, size, dtype)
    context = len(parameters.context.layers[0].weight) if parameters.context else 0
    return _coding(out[: len(out) - context])


def reference_given(
    parameters: IntegerHyperSynthesis,
    z_hat: Ints,
    quality: int,
    symbols: NDArray[np.int32],
    dtype: type = np.int64,
) -> tuple[Ints, Ints]:
    """The same with a context model and the first pass's `symbols` [M, hy, wy] known, latent by latent."""
    assert parameters.context is not None
    out = _first(parameters, z_hat, quality, symbols.shape[1:], dtype)
    first, hidden = out[: 2 * len(symbols)], out[2 * len(symbols) :]
    known = np.zeros(symbols.shape, dtype)
    for c, i, j in np.ndindex(*symbols.shape):
        if (c + i + j) % 2 == 0:
            known[c, i, j] = min(max(int(symbols[c, i, j]), -KNOWN_TOP), KNOWN_TOP)
    over_known, after = parameters.context.layers
    hidden = np.clip(hidden + _layer(over_known, known, over_known.bias, dtype), 0, parameters.context.act_max)
    second = first + _layer(after, hidden, after.bias, dtype)
    means, indexes = (np.array(part) for part in _coding(first))
    for made, then in zip((means, indexes), _coding(second), strict=True):
        for c, i, j in np.ndindex(*symbols.shape):
            if (c + i + j) % 2:
                made[c, i, j] = then[c, i, j]
    return means, indexes


def _first(parameters: IntegerHyperSynthesis, z_hat: Ints, quality: int, size: tuple[int, ...], dtype: type) -> Ints:
    """What h_s's last layer makes of z_hat."""
    a = np.clip(z_hat.astype(dtype), -Z_MAX, Z_MAX)
    for i, layer in enumerate(parameters.layers[:2]):
        bias = parameters.bias_at(quality) if i == 0 else layer.bias
        a = _shuffle(np.clip(_layer(layer, a, bias, dtype), 0, parameters.act_max[i]))
    a = a[:, : size[0], : size[1]]
    return _layer(parameters.layers[2], a, parameters.layers[2].bias, dtype)


def _coding(parameters: Ints) -> tuple[Ints, Ints]:
    half = len(parameters) // 2
    return parameters[:half], np.clip(parameters[half:], 0, SCALE_COUNT - 1)


def _layer(layer: IntegerLayer, a: Ints, bias: Ints, dtype: type) -> Ints:
    _, height, width = a.shape
    size = layer.weight.shape[2]
    reach = size // 2
    padded = np.zeros((a.shape[0], height + 2 * reach, width + 2 * reach), dtype)
    padded[:, reach : reach + height, reach : reach + width] = a
    weight = layer.weight.astype(dtype)
    sums = np.zeros((weight.shape[0], height, width), dtype)
    for dy in range(size):
        for dx in range(size):
            window = padded[:, dy : dy + height, dx : dx + width].reshape(a.shape[0], -1)
            sums += np.dot(weight[:, :, dy, dx], window).reshape(-1, height, width)
    sums += bias.astype(dtype)[:, None, None]
    return (sums * layer.multiplier.astype(dtype)[:, None, None] + (1 << (layer.shift - 1))) >> layer.shift


def _shuffle(a: Ints) -> Ints:
    channels, height, width = a.shape
    return a.reshape(channels // 4, 2, 2, height, width).transpose(0, 3, 1, 4, 2).reshape(channels // 4, 2 * height, -1)
