"""rANS entropy coder (Duda, arXiv 1311.2540) for integers, each coded by the frequency table its index names.

    stream    length of chunk varint, for all chunks but the last; chunks
    chunk     head (0 to 2 bytes), words (uint16 each), all little-endian

Symbols with an index below `skip_below` are not in the stream; they are 0. The n others are cut into equal chunks (the
last may be shorter), 2 from 2^19 and 4 from 2^22, so that cores can share a frame. Chunks know nothing of each other.

A state x codes a symbol of frequency f and cumulative frequency c, of a table whose total is 2^14, by

    x -> (x // f) 2^14 + x % f + c,    first giving its low word to the stream where x >= f 2^18

which keeps it in [2^16, 2^32). The decoder undoes it, last coded first, and takes a word in where x < 2^16 and there is
one left. Raw bits (of escapes: `tables.escape_value` in an Exp-Golomb code of `tables.escape_order`) use the same
state, as equally frequent symbols.

**One state** begins at 0x5A17, below its interval: smaller states code less exactly, larger ones only cost more. The
head is the final state's upper half without leading zero bytes. That costs 2 bytes above the ideal code length; but one
state is one chain of operations, each waiting for the last.

**32 states**, symbol i in state i mod 32, are stepped sixteen at once. An encoder may use them in chunks of 2^15
symbols or more; this one does where one state's first words promise 2 kB. Their flush is not paid: the last symbols,
down to a multiple of 32, are coded by one state; the last 31 words it gave away are taken back and become the states 1
to 31, as 2^16 + word. State 0 goes on from where it is. In the end states 31 to 1 are put into state 0 as raw bits: 16
low ones, the k others below the leading one, k in 4 bits; then the number of symbols so coded, over 32, in 24 bits.
That leaves 20 bytes instead of 124. Raw bits of escapes come after the sixteen symbols, i div 16, they are among.

A chunk of 2^15 symbols or more has one more bit put last, whether it has 32 states.

**Two passes**, of which the second's indexes follow from the first's symbols, share one state where the first has fewer
than 2^15 symbols: all of the second are put first, then all of the first, and they end as one chunk of one state. Else
they are two streams, before them the first's length as a varint.

A decoded chunk must end with state 0x5A17 and with every word used, or it is not what an encoder made. A chunk of no
symbols is no bytes.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shared.codec.chunks import MAY_HAVE_LANES, START, decode_chunk, encode_chunk
from shared.codec.kernels import LOW, WORDS_PAD, decode_symbols, encode_symbols
from shared.codec.lanes import WIDTH
from shared.codec.skipping import put_coded, take_coded, take_coded_indexes
from shared.codec.tables import EntropyTables, from_pmfs
from shared.errors import InvalidBitstream


def encode(
    symbols: NDArray[np.int32],
    indexes: NDArray[np.uint8],
    tables: EntropyTables,
    skip_below: int = 0,
    *,
    pool: Executor | None = None,
) -> bytes:
    """Code `symbols` [n], each by the table that `indexes` [n] names. Any int32 can be coded.

    Symbols with an index below `skip_below` are left out and must be 0. `pool` shares the chunks of a large frame out;
    it must not be one that the call itself runs in. Raises ValueError where the arguments do not fit each other.
    """
    symbols, indexes = _coded(symbols, indexes, tables, skip_below)
    spans = _chunks(len(symbols))
    chunks = list((pool.map if pool else map)(lambda span: _encode_chunk(symbols[span], indexes[span], tables), spans))
    return join(chunks)


def decode(
    data: bytes,
    indexes: NDArray[np.uint8],
    tables: EntropyTables,
    skip_below: int = 0,
    *,
    pool: Executor | None = None,
) -> NDArray[np.int32]:
    """The symbols [n] that `encode` was given, from the same indexes, tables and skip_below.

    Raises InvalidBitstream for bytes that no encoder made; takes bounded time and memory for any bytes.
    """
    indexes, coded = _coded_indexes(indexes, tables, skip_below)
    symbols = np.empty(len(coded) + WIDTH, np.int32)
    spans = _chunks(len(coded))
    parts = split(data, len(spans))
    tasks = [(part, coded[span], symbols[span], tables) for part, span in zip(parts, spans, strict=True)]
    for _ in (pool.map if pool else map)(lambda task: _decode_chunk(*task), tasks):
        pass
    return _with_skipped(symbols, len(coded), indexes, skip_below)


def encode_passes(
    first: tuple[NDArray[np.int32], NDArray[np.uint8]],
    second: tuple[NDArray[np.int32], NDArray[np.uint8]],
    tables: EntropyTables,
    skip_below: int = 0,
) -> bytes:
    """Code two passes, symbols [n] and indexes [n] each, so that the second's indexes may follow from the first's
    symbols: `PassDecoder` reads them. Raises as `encode` does."""
    passes = [_coded(*part, tables, skip_below) for part in (first, second)]
    if len(passes[0][0]) >= MAY_HAVE_LANES:
        return join([encode(*part, tables) for part in passes])
    if not any(len(symbols) for symbols, _ in passes):
        return b""
    look = tables.lookup
    room = sum(len(symbols) for symbols, _ in passes) + 4 * WORDS_PAD
    while True:
        words = np.empty(room, np.uint16)
        x, p = START, room
        for symbols, indexes in reversed(passes):
            if p >= 0:
                x, p = encode_symbols(symbols, indexes, 0, len(symbols), x, words, p, look.bounds, look.encode_rows)
        if p >= 0:
            return _flushed(x, words, p)
        room *= 6


class PassDecoder:
    """Reads what `encode_passes` wrote: `first`, then `second`. Raises InvalidBitstream for bytes it did not write."""

    def __init__(self, data: bytes, tables: EntropyTables, skip_below: int = 0) -> None:
        self._data, self._tables, self._skip_below = data, tables, skip_below
        self._second: bytes | None = None
        self._state, self._at = START, 0
        self._words, self._count = np.zeros(WORDS_PAD, np.uint16), 0

    def first(self, indexes: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The first pass's symbols [n]."""
        indexes, coded = _coded_indexes(indexes, self._tables, self._skip_below)
        if len(coded) >= MAY_HAVE_LANES:
            one, self._second = split(self._data, 2)
            return decode(one, indexes, self._tables, self._skip_below)
        if self._data:
            self._state, self._words, self._count = _opened(self._data)
        if self._state < LOW and self._count:
            self._state, self._at = self._state << 16 | int(self._words[0]), 1
        return self._next(indexes, coded)

    def second(self, indexes: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The second pass's symbols [n], which must be all that is left."""
        if self._second is not None:
            return decode(self._second, indexes, self._tables, self._skip_below)
        symbols = self._next(*_coded_indexes(indexes, self._tables, self._skip_below))
        if self._state != START or self._at != self._count:
            raise InvalidBitstream(
                f"expected two passes to use up {len(self._data)} bytes and leave state {START:#x}, got state "
                f"{self._state:#x} and {self._count - self._at} words left"
            )
        return symbols

    def _next(self, indexes: NDArray[np.uint8], coded: NDArray[np.uint8]) -> NDArray[np.int32]:
        symbols = np.empty(len(coded) + WIDTH, np.int32)
        look = self._tables.lookup
        x, self._at = decode_symbols(
            self._words, self._count, self._at, self._state, coded, symbols, 0, len(coded),
            look.bounds, look.freqs, look.cumulative, look.first_wide, look.buckets,
        )  # fmt: skip
        self._state = int(x)
        if self._at < 0:
            raise InvalidBitstream("expected escapes that an encoder writes, got one beyond 32 bits")
        return _with_skipped(symbols, len(coded), indexes, self._skip_below)


def join(parts: Sequence[bytes]) -> bytes:
    """The lengths of all parts but the last, then the parts: how chunks are put together, and streams."""
    return b"".join([*map(_length, parts[:-1]), *parts])


def warm_up() -> None:
    """Compile the kernels, or load them from Numba's cache: seconds or tenths of one, else spent on the first frame."""
    tables = from_pmfs([np.array([1.0])], [0])
    zero = np.zeros(1, np.uint8)
    decode(encode(zero.astype(np.int32), zero, tables, 1), zero, tables, 1)


def _coded(
    symbols: NDArray[np.int32], indexes: NDArray[np.uint8], tables: EntropyTables, skip_below: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """What is left when the skipped ones are taken out."""
    symbols, indexes = np.ascontiguousarray(symbols, np.int32), _checked(indexes, tables)
    if symbols.shape != indexes.shape:
        raise ValueError(f"expected as many symbols as indexes, got {symbols.shape} and {indexes.shape}")
    if skip_below <= 0:
        return symbols, indexes
    coded_symbols = np.empty(len(symbols) + WIDTH, np.int32)
    coded_indexes = np.empty(len(symbols) + WIDTH, np.uint8)
    n = take_coded(symbols, indexes, skip_below, coded_symbols, coded_indexes)
    if n < 0:
        raise ValueError(f"symbols with an index below {skip_below} are not coded and must be 0")
    return coded_symbols[:n], coded_indexes[:n]


def _coded_indexes(
    indexes: NDArray[np.uint8], tables: EntropyTables, skip_below: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All indexes, checked, and those of the symbols that are coded."""
    indexes = _checked(indexes, tables)
    if skip_below <= 0:
        return indexes, indexes
    coded = np.empty(len(indexes) + WIDTH, np.uint8)
    return indexes, coded[: take_coded_indexes(indexes, skip_below, coded)]


def _with_skipped(
    symbols: NDArray[np.int32], coded: int, indexes: NDArray[np.uint8], skip_below: int
) -> NDArray[np.int32]:
    """The `coded` symbols, which WIDTH more elements follow, among the skipped ones."""
    if skip_below <= 0:
        return symbols[:coded]
    out = np.empty(len(indexes), np.int32)
    put_coded(symbols, indexes, skip_below, out)
    return out


def _checked(indexes: NDArray[np.uint8], tables: EntropyTables) -> NDArray[np.uint8]:
    if indexes.dtype != np.uint8 or indexes.ndim != 1:
        raise ValueError(f"expected indexes as uint8 [n], got {indexes.dtype} {list(indexes.shape)}")
    if indexes.size and indexes.max() >= len(tables):  # the kernels rely on it
        raise ValueError(f"expected indexes below the number of tables, {len(tables)}, got {indexes.max()}")
    return np.ascontiguousarray(indexes)


def _chunks(n: int) -> list[slice]:
    number = 1 if n < 1 << 19 else 2 if n < 1 << 22 else 4
    size = -(-n // number)
    return [slice(first, last) for first, last in pairwise([*(size * k for k in range(number)), n])]


def _encode_chunk(symbols: NDArray[np.int32], indexes: NDArray[np.uint8], tables: EntropyTables) -> bytes:
    if not len(symbols):
        return b""
    look = tables.lookup
    room = len(symbols) + 4 * WORDS_PAD  # 14 bits each and what the states hold, if none is an escape
    while True:
        words = np.empty(room, np.uint16)
        x, p = encode_chunk(symbols, indexes, words, look.bounds, look.encode_tables, look.encode_rows)
        if p >= 0:
            return _chunk(int(x), words[p:])
        room += 6 * len(symbols)  # 81 bits each, if all are escapes


def _flushed(x: int, words: NDArray[np.uint16], p: int) -> bytes:
    """A chunk of one state that ends as `x`, with the words from `p` on."""
    if x >= LOW:
        p, x = p - 1, int(x)
        words[p], x = x & 0xFFFF, x >> 16
    return _chunk(int(x), words[p:])


def _chunk(head: int, words: NDArray[np.uint16]) -> bytes:
    return head.to_bytes((head.bit_length() + 7) // 8, "little") + words.astype("<u2", copy=False).tobytes()


def _opened(data: bytes) -> tuple[int, NDArray[np.uint16], int]:
    """Head, words and how many there are; `WORDS_PAD` more elements follow."""
    head = 2 - len(data) % 2 if data else 0
    x, count = int.from_bytes(data[:head], "little"), (len(data) - head) // 2
    if head and x >> (8 * head - 8) == 0:
        raise InvalidBitstream("expected a stream that begins with its state's first nonzero byte, got zero")
    words = np.zeros(count + WORDS_PAD, np.uint16)
    words[:count] = np.frombuffer(data, "<u2", offset=head)
    return x, words, count


def _decode_chunk(data: bytes, indexes: NDArray[np.uint8], symbols: NDArray[np.int32], tables: EntropyTables) -> None:
    if not len(indexes) and not data:
        return
    look = tables.lookup
    x, words, count = _opened(data)
    left, p = decode_chunk(
        words, count, x, indexes, symbols, look.bounds, look.freqs, look.cumulative,
        look.first_wide, look.buckets, look.decode_tables, look.decode_rows,
    )  # fmt: skip
    if left != START or p != 0:
        what = "an escape or a state that no encoder writes" if p < 0 else f"state {left:#x} and {p} words left"
        raise InvalidBitstream(
            f"expected {len(indexes)} symbols to use up {len(data)} bytes and leave state {START:#x}, got {what}"
        )


def _length(chunk: bytes) -> bytes:
    value, out = len(chunk), bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def split(data: bytes, number: int) -> list[bytes]:
    """The `number` parts that `join` was given. Raises InvalidBitstream."""
    lengths, position = [], 0
    for _ in range(number - 1):
        value, shift = 0, 0
        while True:
            if position >= len(data) or shift > 28:
                raise InvalidBitstream(f"expected {number - 1} chunk lengths before the chunks, got {data[:20].hex()}")
            byte = data[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                break
        lengths.append(value)
    rest = len(data) - position - sum(lengths)
    if rest < 0:
        raise InvalidBitstream(f"expected chunks of {lengths} bytes and one more, got {len(data)} bytes in all")
    ends = np.cumsum([position, *lengths, rest]).tolist()
    return [data[first:last] for first, last in pairwise(ends)]
