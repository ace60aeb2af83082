"""Symbols that are not coded, because their table leaves nothing to tell: taken out before coding, put back after."""

# mypy: ignore-errors
# (Numba infers the types here; mypy knows neither lanes nor intrinsics.)

import numpy as np
from numba import uint64

from shared.codec.kernels import address, compiled
from shared.codec.lanes import (
    WIDTH,
    anywhere,
    choose,
    count,
    load_u8,
    load_u32,
    spread,
    squeeze,
    store_u8,
    store_u32,
)


@compiled
def take_coded(symbols, indexes, skip_below, coded_symbols, coded_indexes):
    """Move the symbols and indexes with an index >= skip_below together; how many, or -1 if a skipped one is not 0.

    `coded_*` have room for 16 more than all.
    """
    n, number = len(indexes), uint64(0)
    symbols_at, indexes_at = address(symbols), address(indexes)
    to_symbols, to_indexes = address(coded_symbols), address(coded_indexes)
    for i in range(0, n - WIDTH + 1, WIDTH):
        t, s = load_u8(indexes_at, uint64(i)), load_u32(symbols_at, uint64(i))
        coded = t >= skip_below
        if anywhere(choose(coded, s & 0, s) >= 1):
            return -1
        if anywhere(coded):
            store_u32(to_symbols, number, squeeze(coded, s))
            store_u8(to_indexes, number, squeeze(coded, t))
            number += count(coded)
    for i in range(n - n % WIDTH, n):
        if indexes[i] >= skip_below:
            coded_symbols[number] = symbols[i]
            coded_indexes[number] = indexes[i]
            number += uint64(1)
        elif symbols[i] != 0:
            return -1
    return np.int64(number)


@compiled
def take_coded_indexes(indexes, skip_below, coded_indexes):
    """`take_coded` of the indexes alone."""
    n, number = len(indexes), uint64(0)
    for i in range(0, n - WIDTH + 1, WIDTH):
        t = load_u8(address(indexes), uint64(i))
        coded = t >= skip_below
        if anywhere(coded):
            store_u8(address(coded_indexes), number, squeeze(coded, t))
            number += count(coded)
    for i in range(n - n % WIDTH, n):
        if indexes[i] >= skip_below:
            coded_indexes[number] = indexes[i]
            number += uint64(1)
    return np.int64(number)


@compiled
def put_coded(coded_symbols, indexes, skip_below, symbols):
    """The reverse of `take_coded`; skipped symbols become 0. `coded_symbols` is followed by 16 more elements."""
    n, number = len(indexes), uint64(0)
    for i in range(0, n - WIDTH + 1, WIDTH):
        coded = load_u8(address(indexes), uint64(i)) >= skip_below
        store_u32(address(symbols), uint64(i), spread(coded, load_u32(address(coded_symbols), number)))
        number += count(coded)
    for i in range(n - n % WIDTH, n):
        symbols[i] = 0
        if indexes[i] >= skip_below:
            symbols[i] = coded_symbols[number]
            number += uint64(1)
