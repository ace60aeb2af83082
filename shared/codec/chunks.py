"""A chunk of symbols to words and back, as `shared.codec.rans` defines it: one state, or one and then 32."""

# mypy: ignore-errors
# (Numba infers the types here; mypy knows neither lanes nor intrinsics.)

import numpy as np

from shared.codec.kernels import (
    LOW,
    STATES,
    compiled,
    decode_lanes,
    decode_symbols,
    encode_lanes,
    encode_symbols,
    pop_bits,
    push_bits,
)

STATES_FROM = 1 << 15  # symbols from which a chunk has 32 states
_TAIL = 1024  # symbols that one state codes before the 32 begin
_NO_SEED = LOW << 1  # state that stands for "there was no word left for me"


@compiled
def encode_chunk(symbols, indexes, words, bounds, freqs, cumulative, encode_tables, encode_rows):
    """Code a chunk to the end of `words`: (head, p), or (0, -1) where they are too few."""
    n, p = len(symbols), len(words)
    single = np.zeros(1, np.uint32)
    body = 0 if n < STATES_FROM else (n - _TAIL) // STATES * STATES
    p = encode_symbols(symbols, indexes, body, n, single, words, p, bounds, freqs, cumulative)
    if p < 0:
        return 0, -1
    x = np.int64(single[0])
    if body:
        states, p = _seed(x, words, p)
        p = encode_lanes(
            symbols, indexes, body, states, words, p, bounds, freqs, cumulative, encode_tables, encode_rows
        )
        if p < 0:
            return 0, -1
        x, p = _merge(states, words, p)
    if x >= LOW:
        x, p = push_bits(x, 0, 16, words, p)
        x >>= 16
    return x, p


@compiled
def decode_chunk(
    words, count, x, indexes, symbols, bounds, freqs, cumulative, first_wide, buckets, decode_tables, decode_rows
):
    """Decode a chunk that begins with head `x`: (state, words left), both 0 if it is whole; words left < 0 if not."""
    n, p = len(indexes), 0
    body = 0 if n < STATES_FROM else (n - _TAIL) // STATES * STATES
    x, _, p = pop_bits(x, 0, words, count, p)
    single = np.empty(1, np.uint32)
    if body:
        states, p = _part(x, words, count, p)
        rest = words[p:]
        count -= p
        p = decode_lanes(
            rest, count, states, indexes, symbols, body, bounds, freqs, cumulative,
            first_wide, buckets, decode_tables, decode_rows,
        )  # fmt: skip
        if p < 0:
            return 0, -1
        x, words, count = _unseed(states, rest, count, p)
        if count < 0:
            return 0, -1
        p = 0
    single[0] = x
    p = decode_symbols(words, count, p, single, indexes, symbols, body, n, bounds, freqs, cumulative)
    return np.int64(single[0]), count - p if p >= 0 else -1


@compiled
def _seed(x, words, p):
    states = np.full(STATES, _NO_SEED, np.uint32)
    if x < LOW:
        states[0], states[1] = x + LOW, _NO_SEED + 1
        return states, p
    states[0] = x
    for j in range(1, min(STATES, len(words) - p + 1)):
        states[j] = LOW | np.int64(words[p])
        p += 1
    return states, p


@compiled
def _unseed(states, words, count, p):
    """What `_seed` was given: state, words, how many of them (-1 where no encoder left these states)."""
    x, seeds = np.int64(states[0]), 0
    while seeds < STATES - 1 and LOW <= states[seeds + 1] < 2 * LOW:
        seeds += 1
    merged = np.empty(seeds + count - p, np.uint16)
    for j in range(seeds):
        merged[j] = states[j + 1] & 0xFFFF
    merged[seeds:] = words[p:count]
    unreached = states[1] == _NO_SEED + 1
    sound = x >= LOW and (seeds == STATES - 1 or p == count)
    for j in range(seeds + 1, STATES):
        sound = sound and (states[j] == _NO_SEED or (unreached and j == 1))
    if unreached:
        sound = sound and x < 2 * LOW
        x -= LOW
    return x, merged, len(merged) if sound else -1


@compiled
def _merge(states, words, p):
    """All states in one: (state, p)."""
    x = np.int64(states[0])
    for j in range(STATES - 1, 0, -1):
        state = np.int64(states[j])
        bits = 0
        while state >> (17 + bits):
            bits += 1
        x, p = push_bits(x, state & 0xFFFF, 16, words, p)
        x, p = push_bits(x, (state >> 16) - (1 << bits), bits, words, p)
        x, p = push_bits(x, bits, 4, words, p)
    return x, p


@compiled
def _part(x, words, count, p):
    """The reverse of `_merge`: (states, p)."""
    states = np.empty(STATES, np.uint32)
    for j in range(1, STATES):
        x, bits, p = pop_bits(x, 4, words, count, p)
        x, high, p = pop_bits(x, bits, words, count, p)
        x, low, p = pop_bits(x, 16, words, count, p)
        states[j] = (1 << bits | high) << 16 | low
    states[0] = x
    return states, p
