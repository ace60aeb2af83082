"""What stands between matmuls and convolutions on a CPU, element by element, compiled by Numba.

Each is one pass over memory where torch takes several. `P` counts positions, row by row.
"""

# mypy: ignore-errors
# (Numba infers the types here.)

import numpy as np
from numba import float32, int32, int64, uint8

from shared.codec.kernels import compiled

INT32_TOP = 2**31 - 1


@compiled
def requantise(sums, bias, multiplier, shift, onto, low, high, off, out):
    """out = clamp(onto + (sums + bias) * multiplier / 2^shift, rounded half up, low, high) - off.

    `sums`: int32 [B, P, N]; `bias`: int64 [B, N]; `multiplier`: int64 [N]; `onto`: int32 [B, P, N], or [B, 0, N] for
    nothing; `out`: int8 or int32 [B, P, N].
    """
    half = int64(1) << (shift - 1)
    for b in range(sums.shape[0]):
        for p in range(sums.shape[1]):
            for n in range(sums.shape[2]):
                exact = ((int64(sums[b, p, n]) + bias[b, n]) * multiplier[n] + half) >> shift
                if onto.shape[1]:
                    exact = int32(min(max(exact, -INT32_TOP - 1), INT32_TOP)) + onto[b, p, n]
                    exact = int64(int32(exact))  # as sums of 32 bits are everywhere
                out[b, p, n] = min(max(exact, low), high) - off


@compiled
def coding(parameters, more, width, top, means, indexes):
    """Parameters int32 [B, P, K >= 2 N] to means int32 [B, P, N] and scale indexes uint8 [B, P, N] in [0, top].

    `more`: int32 [B, P, 2 N], added where a latent is of the second pass (`hyper.first_pass`), or [B, 0, 2 N].
    """
    channels = means.shape[2]
    for b in range(means.shape[0]):
        for p in range(means.shape[1]):
            given, mean, index = parameters[b, p], means[b, p], indexes[b, p]
            if more.shape[1]:
                place, added = int32(p // width + p % width), more[b, p]
                for n in range(channels):
                    second = -((int32(n) + place) & int32(1))  # all bits, or none
                    mean[n] = int32(given[n] + (added[n] & second))
                    at = int32(given[channels + n] + (added[channels + n] & second))
                    index[n] = uint8(min(max(at, int32(0)), int32(top)))
            else:
                for n in range(channels):
                    mean[n] = given[n]
                    index[n] = uint8(min(max(given[channels + n], int32(0)), int32(top)))


@compiled
def rounded(y, means, indexes, mean_step, skip_below, beyond, symbols):
    """symbols = y - means * mean_step, rounded half to even, in [-beyond, beyond]; 0 where index < `skip_below`.

    `y`: float32, `means`: int32, `indexes`: uint8, `symbols`: int32, all [B, P, N]. Returns the largest absolute one.
    """
    step, limit = float32(mean_step), float32(beyond)
    largest = np.zeros(y.shape[2], np.int32)  # for each channel: so it is found by all lanes at once
    for b in range(y.shape[0]):
        for p in range(y.shape[1]):
            values, mean, index, symbol = y[b, p], means[b, p], indexes[b, p], symbols[b, p]
            for n in range(y.shape[2]):
                whole = int32(min(max(np.rint(values[n] - float32(mean[n]) * step), -limit), limit))
                symbol[n] = whole if index[n] >= skip_below else int32(0)
                largest[n] = max(largest[n], abs(symbol[n]))
    return largest.max()


@compiled
def known(symbols, width, top, out):
    """The first pass's symbols, clamped to [-top, top], and 0 for the others: int32 to int8, both [B, P, N]."""
    for b in range(symbols.shape[0]):
        for p in range(symbols.shape[1]):
            place, symbol, made = int32(p // width + p % width), symbols[b, p], out[b, p]
            for n in range(symbols.shape[2]):
                first = ((int32(n) + place) & int32(1)) - int32(1)
                made[n] = min(max(symbol[n], int32(-top)), int32(top)) & first


@compiled
def unshuffled(rgb, side, out):
    """Blocks of side x side pixels as channels, by row, column and colour; beyond the last ones they are repeated.

    `rgb`: uint8 [B, h, w, 3]; `out`: uint8 [B, H, W, 3 side side].
    """
    height, width = rgb.shape[1:3]
    long = 3 * side
    for b in range(out.shape[0]):
        for row in range(out.shape[1] * side):
            line = rgb[b, min(row, height - 1)].reshape(-1)
            first = row % side * long
            for j in range(width // side):
                made, taken = out[b, row // side, j, first : first + long], line[j * long : (j + 1) * long]
                for k in range(long):
                    made[k] = taken[k]
            for column in range(width // side * side, out.shape[2] * side):
                for colour in range(3):
                    value = line[3 * min(column, width - 1) + colour]
                    out[b, row // side, column // side, first + 3 * (column % side) + colour] = value


@compiled
def add_scaled(sums, steps, bias, y):
    """y += bias + sums[:, :N] * steps[:N] + sums[:, N:] * steps[N:].

    `sums`: int32 [P, 2 N]; `steps`: float32 [2 N]; `bias`: float32 [N]; `y`: float32 [P, N].
    """
    channels = y.shape[1]
    for p in range(y.shape[0]):
        given, made = sums[p], y[p]
        for n in range(channels):
            fine = float32(given[channels + n]) * steps[channels + n]
            made[n] += bias[n] + float32(given[n]) * steps[n] + fine


@compiled
def assembled(fine, coarse, out):
    """The pixels of g_s's two parts, in bytes: 255 (fine + coarse + 0.5), rounded half to even, in [0, 255].

    `fine`: float32 [B, H/4, W/4, 48], `coarse`: float32 [B, H/16, W/16, 768], channels by colour, row and column;
    `out`: uint8 [B, h, w, 3], h <= H, w <= W.
    """
    top = float32(255)
    width = out.shape[2]
    for b in range(out.shape[0]):
        for row in range(out.shape[1]):
            line = out[b, row].reshape(-1)
            for j in range((width + 3) // 4):
                one, other = fine[b, row // 4, j], coarse[b, row // 16, j // 4]
                for x in range(min(4, width - 4 * j)):
                    at, other_at = row % 4 * 4 + x, row % 16 * 16 + j % 4 * 4 + x
                    for colour in range(3):
                        value = one[16 * colour + at] + other[256 * colour + other_at] + float32(0.5)
                        line[3 * (4 * j + x) + colour] = uint8(min(max(np.rint(value * top), float32(0)), top))
