"""Sums of an integer layer to the next layer's integers, compiled by Numba."""

# mypy: ignore-errors
# (Numba infers the types here.)

from numba import int64

from shared.codec.kernels import compiled


@compiled
def requantise(sums, bias, multiplier, shift, low, high, off, out):
    """out = clamp((sums + bias) * multiplier / 2^shift, rounded half up, low, high) - off.

    `sums`: int32 [B, P, N]; `bias`: int64 [B, N]; `multiplier`: int64 [N]; `out`: int8 or int32 [B, P, N].
    """
    half = int64(1) << (shift - 1)
    for b in range(sums.shape[0]):
        for p in range(sums.shape[1]):
            for n in range(sums.shape[2]):
                exact = ((int64(sums[b, p, n]) + bias[b, n]) * multiplier[n] + half) >> shift
                out[b, p, n] = min(max(exact, low), high) - off
