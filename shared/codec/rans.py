"""rANS entropy coder (Duda 2013, arXiv 1311.2540) for integer symbols with a frequency table chosen for each.

Format: 32-bit states renormalised by 16-bit words; a state that has a word below it is in [2^16, 2^32).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.codec.tables import PRECISION, EntropyTables
from shared.errors import InvalidBitstream

_LOW = 1 << 16  # states below it take in a word, if there is one left
_MASK = (1 << PRECISION) - 1
_ESCAPE_BITS = 33  # an escaped int32 is less than 2^33 - 1 off its table


def encode(
    symbols: NDArray[np.int32], indexes: NDArray[np.uint8 | np.uint16], tables: EntropyTables, skip_below: int = 0
) -> bytes:
    """Code `symbols` [n], each by the table `indexes` [n] names; where that is below skip_below, they must be 0."""
    symbols, indexes = _coded(symbols, indexes, tables, skip_below)
    room = len(symbols) + 64
    while True:
        words = np.empty(room, np.uint16)
        x, p = _encode_serial(
            symbols, indexes, words, tables.offsets, tables.sizes, tables.starts, tables.freqs, tables.cumulative
        )
        if p >= 0:
            break
        room *= 6
    if x >= _LOW:
        p -= 1
        words[p] = x & 0xFFFF
        x >>= 16
    return int(x).to_bytes((int(x).bit_length() + 7) // 8, "little") + words[p:].astype("<u2").tobytes()


def decode(
    data: bytes, indexes: NDArray[np.uint8 | np.uint16], tables: EntropyTables, skip_below: int = 0
) -> NDArray[np.int32]:
    """Symbols [n] of a stream made by `encode` with the same indexes, tables, skip_below. Raises InvalidBitstream."""
    coded = indexes >= skip_below
    used = np.ascontiguousarray(indexes[coded])
    _check_indexes(used, tables)
    head = (len(data) + 1) % 2 + 1 if data else 0
    x = int.from_bytes(data[:head], "little")
    if head and x < 1 << (8 * head - 8):
        raise InvalidBitstream("expected a stream that starts with a nonzero byte of its state, got zero")
    words = np.frombuffer(data, "<u2", offset=head).astype(np.uint16)
    symbols = np.empty(len(used), np.int32)
    x, p = _decode_serial(
        words, x, used, symbols, tables.offsets, tables.sizes, tables.starts, tables.freqs, tables.cumulative
    )
    if x != 0 or p != len(words):
        raise InvalidBitstream(
            f"expected the stream to end after {len(used)} symbols with state 0 and no words left, "
            f"got state {x} and {len(words) - p} of {len(words)} words left"
        )
    out = np.zeros(len(indexes), np.int32)
    out[coded] = symbols
    return out


def _coded(
    symbols: NDArray[np.int32], indexes: NDArray[np.uint8 | np.uint16], tables: EntropyTables, skip_below: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8 | np.uint16]]:
    coded = indexes >= skip_below
    if symbols[~coded].any():
        raise ValueError("symbols of skipped tables must be 0")
    used = np.ascontiguousarray(indexes[coded])
    _check_indexes(used, tables)
    return np.ascontiguousarray(symbols[coded]), used


def _check_indexes(indexes: NDArray[np.uint8 | np.uint16], tables: EntropyTables) -> None:
    if len(indexes) and indexes.max() >= len(tables):
        raise ValueError(f"expected table indexes below {len(tables)}, got {indexes.max()}")


@njit(cache=True, nogil=True, error_model="numpy")
def _encode_serial(symbols, indexes, words, offsets, sizes, starts, freqs, cumulative):  # type: ignore[no-untyped-def]
    x = 0
    p = len(words)
    for i in range(len(symbols) - 1, -1, -1):
        if p < 8:
            return 0, -1
        t = indexes[i]
        size = np.int64(sizes[t]) - 1
        u = np.int64(symbols[i]) - offsets[t]
        row = starts[t] + size
        if 0 <= u < size:
            row = starts[t] + u
        else:
            value = (2 * (u - size) if u >= size else -2 * u - 1) + 1
            bits = 0
            while value >> (bits + 1):
                bits += 1
            # Least significant bit first out means most significant first in; then a one after `bits` zeros.
            for k in range(2 * bits + 1):
                bit = (value >> k) & 1 if k < bits else (1 if k == bits else 0)
                if x >= 1 << 31:
                    p -= 1
                    words[p] = x & 0xFFFF
                    x >>= 16
                x = x << 1 | bit
        freq = np.int64(freqs[row])
        if x >= freq << (32 - PRECISION):
            p -= 1
            words[p] = x & 0xFFFF
            x >>= 16
        x = ((x // freq) << PRECISION) + x % freq + np.int64(cumulative[row])
    return x, p


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_serial(words, x, indexes, symbols, offsets, sizes, starts, freqs, cumulative):  # type: ignore[no-untyped-def]
    p = 0
    if x < _LOW and p < len(words):
        x = x << 16 | np.int64(words[p])
        p += 1
    for i in range(len(symbols)):
        t = indexes[i]
        slot = x & _MASK
        low = starts[t]
        high = low + sizes[t] - 1
        while low < high:
            middle = (low + high + 1) >> 1
            if cumulative[middle] <= slot:
                low = middle
            else:
                high = middle - 1  # type: ignore[assignment]
        x = np.int64(freqs[low]) * (x >> PRECISION) + slot - np.int64(cumulative[low])
        if x < _LOW and p < len(words):
            x = x << 16 | np.int64(words[p])
            p += 1
        u = low - starts[t]
        size = np.int64(sizes[t]) - 1
        if u == size:
            bits = 0
            value = 1
            k = -1  # bits still to read; -1 while zeros are counted
            while k != 0:
                bit = x & 1
                x >>= 1
                if x < _LOW and p < len(words):
                    x = x << 16 | np.int64(words[p])
                    p += 1
                if k > 0:
                    value = value << 1 | bit
                    k -= 1
                elif bit:
                    k = bits
                else:
                    bits += 1
                    if bits > _ESCAPE_BITS:
                        return -1, p
            value -= 1
            u = size + (value >> 1) if value & 1 == 0 else -((value + 1) >> 1)
        u += offsets[t]
        if u < -(1 << 31) or u >= 1 << 31:
            return -1, p
        symbols[i] = u
    return x, p
