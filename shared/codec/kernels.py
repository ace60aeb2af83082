"""The rANS coder's loops, compiled by Numba: one symbol at a time, and sixteen states at once.

What the bytes mean is said in `shared.codec.rans`, what the tables hold in `shared.codec.tables.Lookup`.
`encode_symbols` and `decode_symbols` are the coder for one state; `encode_lanes` and `decode_lanes` are it for 32, in
two vectors.

Encoding runs from the last symbol to the first and writes words towards the start of its buffer; `p` is the position
of the last word written. Decoding runs forward and `p` is the next word to read.

Memory: indexes are below the number of tables (checked by the caller), so that every look-up is inside its array.
`words` of a decoder is followed by `WORDS_PAD` more elements, and reading goes on only while `p` is inside. An encoder
stops with -1 when fewer than `WORDS_PAD` elements are free. Whatever the bytes, a decoder does a bounded number of
steps a symbol.

Compiled code is cached where Numba finds a folder it may write to: NUMBA_CACHE_DIR, `__pycache__` beside this file, or
the user's cache folder; where there is none, it is compiled again in each process. (Never in a folder for all, such as
/tmp: who writes there first would choose the code that runs here.) Importing compiles nothing.
"""

# mypy: ignore-errors
# (Numba infers the types here; mypy knows neither lanes nor intrinsics.)

import hashlib
from pathlib import Path

import numpy as np
from numba import njit, uint64

from shared.codec.lanes import (
    WIDTH,
    anywhere,
    both,
    choose,
    count,
    last_lanes,
    load_u8,
    load_u16,
    load_u32,
    look_up,
    look_up_by_bytes,
    multiply_shift,
    signed_shift,
    spread,
    squeeze,
    store_u16,
    store_u32,
)
from shared.codec.tables import NARROW_BITS, PRECISION, WIDE_BITS

STATES = 2 * WIDTH
WORDS_PAD = 256  # elements; a group of 16 reads at most 16, and writes at most 16 or, all escaped, 6 each
LOW = 1 << 16  # states are in [2^16, 2^32)
_MASK = (1 << PRECISION) - 1
_ESCAPE_BITS_MAX = 33  # after the leading one: what an int32 can be off a table is less than 2^33
_NARROW_SHIFT, _WIDE_SHIFT = PRECISION - NARROW_BITS, PRECISION - WIDE_BITS


# A cached kernel holds the code of those it calls, but Numba looks at the age of its own file only. So what all of them
# are made from is part of their name.
_NAMES = ("lanes", "kernels", "chunks", "skipping", "elementwise")
_FILES = [Path(__file__).with_name(f"{name}.py") for name in _NAMES]
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()[:12]


def compiled(function):
    function.__qualname__ += f"_{_SOURCES}"
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to cache in
        return njit(**options)(function)


inlined = njit(forceinline=True, error_model="numpy")


@inlined
def address(array):
    return uint64(array.ctypes.data)


# -- one symbol at a time ----------------------------------------------------------------------------------------------


@compiled
def push_bits(x, value, bits, words, p):
    """Put `bits` (0 to 16) bits of `value` into state `x`."""
    if x >> (32 - bits):
        p -= 1
        words[p] = x & 0xFFFF
        x >>= 16
    return x << bits | value, p


@compiled
def pop_bits(x, bits, words, count, p):
    """Take `bits` bits back out of state `x`: (x, value, p)."""
    value = x & ((1 << bits) - 1)
    x >>= bits
    if x < LOW and p < count:
        x = x << 16 | np.int64(words[p])
        p += 1
    return x, value, p


@compiled
def encode_symbols(symbols, indexes, first, last, x, words, p, bounds, encode_rows):
    """Code symbols [first, last) into state `x`: (x, p), p < 0 where there are too few words."""
    for i in range(last - 1, first - 1, -1):
        if p < WORDS_PAD:
            return x, -1
        t = indexes[i]
        entry, size, row = np.int64(symbols[i]) - bounds[t, 0], bounds[t, 1], bounds[t, 2]
        if 0 <= entry < size:
            row += entry
        else:
            row += size
            x, p = _push_escape(x, entry, size, bounds[t, 3], words, p)
        reciprocal, packed = encode_rows[row] & 0xFFFFFFFF, encode_rows[row] >> 32
        freq = packed & _MASK
        if x >= freq << (32 - PRECISION):
            p -= 1
            words[p] = x & 0xFFFF
            x >>= 16
        quotient = np.int64(uint64(x) * uint64(reciprocal) >> uint64((packed >> 28 & 15) + 31))
        quotient -= np.int64(quotient * freq > x)
        x = (quotient << PRECISION) + x - quotient * freq + (packed >> PRECISION & _MASK)
    return x, p


@compiled
def _push_escape(x, entry, size, order, words, p):
    # As the decoder meets it: a zero for each bit after the leading one but `order`, the one, those bits.
    number = (2 * (entry - size) if entry >= size else -2 * entry - 1) + (1 << order)
    bits = 0
    while number >> (bits + 1):
        bits += 1
    for k in range(bits):
        x, p = push_bits(x, number >> k & 1, 1, words, p)
    x, p = push_bits(x, 1, 1, words, p)
    for _ in range(bits - order):
        x, p = push_bits(x, 0, 1, words, p)
    return x, p


@compiled
def decode_symbols(words, count, p, x, indexes, symbols, first, last, bounds, freqs, cumulative, first_wide, buckets):
    """Decode symbols [first, last) from state `x` and `words` [p, count): (x, p), p < 0 for an escape beyond int32."""
    wide_base = (first_wide << NARROW_BITS) - (first_wide << WIDE_BITS)
    for i in range(first, last):
        t = np.int64(indexes[i])
        slot = x & _MASK
        if t < first_wide:
            packed = buckets[(t << NARROW_BITS) + (slot >> _NARROW_SHIFT)]
        else:
            packed = buckets[wide_base + (t << WIDE_BITS) + (slot >> _WIDE_SHIFT)]
        value, freq = packed >> 48, packed >> PRECISION & _MASK
        rest = slot - (packed & _MASK)
        escaped = False
        if rest >= freq:
            value, rest, freq = value + 1, rest - freq, packed >> 32 & _MASK
            if rest >= freq:
                row = _row_of_slot(slot, bounds[t, 2], bounds[t, 1], cumulative)
                rest, freq = slot - np.int64(cumulative[row]), np.int64(freqs[row])
                value, escaped = bounds[t, 0] + row - bounds[t, 2], row == bounds[t, 2] + bounds[t, 1]
        x = freq * (x >> PRECISION) + rest
        if x < LOW and p < count:
            x = x << 16 | np.int64(words[p])
            p += 1
        if escaped:
            x, entry, p = _pop_escape(x, bounds[t, 1], bounds[t, 3], words, count, p)
            value = bounds[t, 0] + entry
            if p < 0 or value < -(1 << 31) or value >= 1 << 31:
                return x, -1
        symbols[i] = value
    return x, p


@compiled
def _row_of_slot(slot, start, size, cumulative):
    low, high = start, start + size
    while low < high:  # the last row that begins at or before the slot
        middle = (low + high + 1) >> 1
        if np.int64(cumulative[middle]) <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def _pop_escape(x, size, order, words, count, p):
    bits = order
    while True:
        x, bit, p = pop_bits(x, 1, words, count, p)
        if bit:
            break
        bits += 1
        if bits > _ESCAPE_BITS_MAX:
            return x, 0, -1
    number = 1
    for _ in range(bits):
        x, bit, p = pop_bits(x, 1, words, count, p)
        number = number << 1 | bit
    number -= 1 << order
    return x, (-((number + 1) >> 1) if number & 1 else size + (number >> 1)), p


# -- sixteen states at once --------------------------------------------------------------------------------------------


@inlined
def _entries(position, symbols, indexes, tables):
    """Of 16 symbols from `position` on, the places in their tables, and what `encode_tables` says of these."""
    offset, packed = look_up_by_bytes(tables, indexes, position)
    return load_u32(symbols, position) - offset, packed


@inlined
def _encode_group(x, entry, packed, words, p, rows):
    """States and `p` after 16 symbols; raw bits of escapes among them are in the states already."""
    size = packed >> 18
    entry = choose(entry < size, entry, size)
    reciprocal, packed = look_up(rows, (packed & 0x3FFFF) + entry)
    freq = packed & _MASK
    full = x >= freq << (32 - PRECISION)
    number = count(full)
    # Right-aligned, so that the store ends where the last one began; what it writes before is overwritten by the next.
    store_u16(words, p - uint64(WIDTH), spread(last_lanes(number), squeeze(full, x)))
    x = choose(full, x >> 16, x)
    quotient = multiply_shift(x, reciprocal, (packed >> 28) + 31)
    rest = x - quotient * freq
    over = rest >= freq  # the quotient is one too large, the rest below 0
    rest = choose(over, rest + freq, rest)
    quotient = choose(over, quotient - 1, quotient)
    return (quotient << PRECISION) + rest + (packed >> PRECISION & _MASK), p - number


@compiled
def _push_escapes(x, position, symbols, indexes, words, p, bounds):
    states, first, p = np.empty(WIDTH, np.uint32), np.int64(position), np.int64(p)
    store_u32(address(states), uint64(0), x)
    for k in range(WIDTH - 1, -1, -1):
        t = indexes[first + k]
        entry, size = np.int64(symbols[first + k]) - bounds[t, 0], bounds[t, 1]
        if not 0 <= entry < size:
            states[k], p = _push_escape(np.int64(states[k]), entry, size, bounds[t, 3], words, p)
    return load_u32(address(states), uint64(0)), uint64(p)


@compiled
def encode_lanes(symbols, indexes, last, states, words, p, bounds, encode_tables, encode_rows):
    """Code symbols [0, last), a multiple of 32, symbol i into state i mod 32: `p`, or -1 where words are too few."""
    symbols_at, indexes_at, words_at = address(symbols), address(indexes), address(words)
    tables_at, rows_at = address(encode_tables), address(encode_rows)
    a, b = load_u32(address(states), uint64(0)), load_u32(address(states), uint64(WIDTH))
    i, p = uint64(last), uint64(p)
    while i > uint64(0):
        if p < uint64(2 * WORDS_PAD):
            return -1
        i -= uint64(WIDTH)
        entry, packed = _entries(i, symbols_at, indexes_at, tables_at)
        if anywhere(entry >= packed >> 18):
            b, p = _push_escapes(b, i, symbols, indexes, words, p, bounds)
        b, p = _encode_group(b, entry, packed, words_at, p, rows_at)
        i -= uint64(WIDTH)
        entry, packed = _entries(i, symbols_at, indexes_at, tables_at)
        if anywhere(entry >= packed >> 18):
            a, p = _push_escapes(a, i, symbols, indexes, words, p, bounds)
        a, p = _encode_group(a, entry, packed, words_at, p, rows_at)
    store_u32(address(states), uint64(0), a)
    store_u32(address(states), uint64(WIDTH), b)
    return np.int64(p)


@inlined
def _search(t, slot, rest, value, freq, tables, rows):
    """Entry by entry upwards in lanes whose slot lies beyond their `value`; and whether one is an escape."""
    row_of_zero, escape = look_up(tables, t)
    open_lanes = rest >= freq
    value = choose(both(open_lanes, value == escape), value - 1, value)  # its frequency is still to be fetched
    while anywhere(open_lanes):  # until the escape's row at the latest, which ends at 2^14
        value = choose(open_lanes, value + 1, value)
        low, _ = look_up(rows, row_of_zero + value)
        rest = choose(open_lanes, slot - (low & _MASK), rest)
        freq = choose(open_lanes, low >> PRECISION & _MASK, freq)
        open_lanes = rest >= freq
    return rest, value, freq, anywhere(value == escape)


@inlined
def _decode_group(x, position, words, p, indexes, symbols, first_wide, buckets, tables, rows):
    """States and `p` after 16 symbols from `position` on, and whether escapes are among them (their bits still in)."""
    t = load_u8(indexes, position)
    slot = x & _MASK
    narrow = t < first_wide
    wide_base = (t << WIDE_BITS) - ((first_wide << WIDE_BITS) - (first_wide << NARROW_BITS))
    bucket = choose(narrow, (t << NARROW_BITS) + (slot >> _NARROW_SHIFT), wide_base + (slot >> _WIDE_SHIFT))
    low, high = look_up(buckets, bucket)
    freq = low >> PRECISION & _MASK
    rest = slot - (low & _MASK)
    value = signed_shift(high, 16)
    further = rest >= freq
    rest = choose(further, rest - freq, rest)
    value = choose(further, value + 1, value)
    freq = choose(further, high & _MASK, freq)
    escapes = False
    if anywhere(rest >= freq):
        rest, value, freq, escapes = _search(t, slot, rest, value, freq, tables, rows)
    x = freq * (x >> PRECISION) + rest
    low_states = x < LOW
    x = choose(low_states, x << 16 | spread(low_states, load_u16(words, p)), x)
    store_u32(symbols, position, value)
    return x, p + count(low_states), escapes


@compiled
def _pop_escapes(x, position, words, count, p, indexes, symbols, bounds):
    states, first, p = np.empty(WIDTH, np.uint32), np.int64(position), np.int64(p)
    store_u32(address(states), uint64(0), x)
    for k in range(WIDTH):
        t = indexes[first + k]
        offset, size = bounds[t, 0], bounds[t, 1]
        if symbols[first + k] == offset + size and p >= 0:
            states[k], entry, p = _pop_escape(np.int64(states[k]), size, bounds[t, 3], words, count, p)
            symbols[first + k] = offset + entry
            if not -(1 << 31) <= offset + entry < 1 << 31:
                p = -1
    return load_u32(address(states), uint64(0)), uint64(p)  # -1 becomes larger than any count


@compiled
def decode_lanes(words, count, states, indexes, symbols, last, bounds, first_wide, buckets, tables, rows):
    """Decode symbols [0, last), a multiple of 32, symbol i from state i mod 32: the next position, or -1."""
    words_at, indexes_at, symbols_at = address(words), address(indexes), address(symbols)
    buckets_at, tables_at, rows_at = address(buckets), address(tables), address(rows)
    a, b = load_u32(address(states), uint64(0)), load_u32(address(states), uint64(WIDTH))
    wide, p, i = uint64(first_wide), uint64(0), uint64(0)
    while i < uint64(last) and p <= uint64(count):
        a, p, escapes = _decode_group(a, i, words_at, p, indexes_at, symbols_at, wide, buckets_at, tables_at, rows_at)
        if escapes:
            a, p = _pop_escapes(a, i, words, count, p, indexes, symbols, bounds)
        i += uint64(WIDTH)
        if p > uint64(count):
            break
        b, p, escapes = _decode_group(b, i, words_at, p, indexes_at, symbols_at, wide, buckets_at, tables_at, rows_at)
        if escapes:
            b, p = _pop_escapes(b, i, words, count, p, indexes, symbols, bounds)
        i += uint64(WIDTH)
    store_u32(address(states), uint64(0), a)
    store_u32(address(states), uint64(WIDTH), b)
    return np.int64(p) if p <= uint64(count) else -1
