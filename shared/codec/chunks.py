"""A chunk of symbols to words and back, as `shared.codec.rans` defines it: by one state, or by one and then 32."""

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

START = 0x5A17  # state before the first symbol: below its interval, and where no state comes to rest without words
MAY_HAVE_LANES = 1 << 15  # symbols from which a chunk says whether it has 32 states
# 32 states begin once one has given away some words that promise this many for the chunk: 20 bytes are then below 1 %.
_WORDS_GIVEN, _WORDS_PROMISED = 128, 1024
_TAIL_STEP = 1024  # symbols
_LEAST_BODY = 1 << 13  # symbols; for fewer, 32 states gain less than 0.1 ms


@compiled
def encode_chunk(symbols, indexes, words, bounds, encode_tables, encode_rows):
    """Code a chunk to the end of `words`: (head, p), or (0, -1) where they are too few."""
    n, p, x = len(symbols), len(words), START
    body = n
    while body > 0:
        given = len(words) - p
        promising = given >= _WORDS_GIVEN and given * n >= _WORDS_PROMISED * (n - body)
        if promising and body >= _LEAST_BODY and n >= MAY_HAVE_LANES:
            break
        first = (body - 1) // _TAIL_STEP * _TAIL_STEP
        x, p = encode_symbols(symbols, indexes, first, body, x, words, p, bounds, encode_rows)
        if p < 0:
            return 0, -1
        body = first
    if body > 0:
        states = np.empty(STATES, np.uint32)
        states[0] = x
        for j in range(1, STATES):
            states[j] = LOW | np.int64(words[p])
            p += 1
        p = encode_lanes(symbols, indexes, body, states, words, p, bounds, encode_tables, encode_rows)
        if p < 0:
            return 0, -1
        x, p = _merge(states, words, p)
        groups = body // STATES
        x, p = push_bits(x, groups & 0xFFFF, 16, words, p)
        x, p = push_bits(x, groups >> 16, 8, words, p)
    if n >= MAY_HAVE_LANES:
        x, p = push_bits(x, 1 if body > 0 else 0, 1, words, p)
    if x >= LOW:
        p -= 1
        words[p] = x & 0xFFFF
        x >>= 16
    return x, p


@compiled
def decode_chunk(
    words, count, x, indexes, symbols, bounds, freqs, cumulative, first_wide, buckets, decode_tables, decode_rows
):
    """Decode a chunk that begins with head `x`: state and words left, `START` and 0 if it is whole."""
    n, body, p = len(indexes), 0, 0
    x, _, p = pop_bits(x, 0, words, count, p)
    if n >= MAY_HAVE_LANES:
        x, body, p = pop_bits(x, 1, words, count, p)
    if body > 0:
        x, high, p = pop_bits(x, 8, words, count, p)
        x, low, p = pop_bits(x, 16, words, count, p)
        body = (high << 16 | low) * STATES
        if body == 0 or body > n:
            return x, -1
        states, p = _part(x, words, count, p)
        words, count = words[p:], count - p
        p = decode_lanes(
            words, count, states, indexes, symbols, body, bounds, first_wide, buckets, decode_tables, decode_rows
        )
        if p < 0:
            return x, -1
        x, words, count = _with_seeds(states, words, count, p)
        if count < 0:
            return x, -1
        p = 0
    x, p = decode_symbols(words, count, p, x, indexes, symbols, body, n, bounds, freqs, cumulative, first_wide, buckets)
    return x, count - p if p >= 0 else -1


@compiled
def _with_seeds(states, words, count, p):
    """State 0, the words the other states began as and those left of `words`, and how many (-1 if they are none)."""
    joined = np.empty(STATES - 1 + count - p, np.uint16)
    for j in range(1, STATES):
        if not LOW <= states[j] < 2 * LOW:
            return np.int64(states[0]), joined, -1
        joined[j - 1] = states[j] & 0xFFFF
    joined[STATES - 1 :] = words[p:count]
    return np.int64(states[0]), joined, len(joined)


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
