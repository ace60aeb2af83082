"""The stream of `shared.codec.rans`, written from its description with Python's integers: slow and plain to see.

Emitted words are kept in a list in the order they are given away; a stream holds them last first.
"""

from collections.abc import Sequence

from shared.codec.tables import EntropyTables

BITS = 14
LOW = 1 << 16
LANES = 32
START = 0x5A17


def encode(symbols: Sequence[int], indexes: Sequence[int], tables: EntropyTables, skip_below: int = 0) -> bytes:
    pairs = [(s, t) for s, t in zip(symbols, indexes, strict=True) if t >= skip_below]
    chunks = [_encode_chunk(part, tables) for part in _cut(pairs)]
    return b"".join([_varint(len(chunk)) for chunk in chunks[:-1]] + chunks)


def decode(data: bytes, indexes: Sequence[int], tables: EntropyTables, skip_below: int = 0) -> list[int]:
    """Only for streams that are sound; whatever is not raises some exception."""
    parts = _cut([t for t in indexes if t >= skip_below])
    lengths = []
    for _ in parts[:-1]:
        value, shift = 0, 0
        while True:
            byte, data = data[0], data[1:]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        lengths.append(value)
    coded: list[int] = []
    for part, length in zip(parts, [*lengths, len(data) - sum(lengths)], strict=True):
        coded += _decode_chunk(data[:length], part, tables)
        data = data[length:]
    values = iter(coded)
    return [next(values) if t >= skip_below else 0 for t in indexes]


def _cut(items: list) -> list[list]:
    number = 4 if len(items) >= 2**22 else 2 if len(items) >= 2**19 else 1
    size = -(-len(items) // number)
    return [items[k * size : (k + 1) * size] for k in range(number)]


def _encode_chunk(pairs: list[tuple[int, int]], tables: EntropyTables) -> bytes:
    words: list[int] = []
    if not pairs:
        return b""
    x, left = START, len(pairs)
    while left:
        enough = len(words) >= 128 and len(words) * len(pairs) >= 1024 * (len(pairs) - left)
        if len(pairs) >= 2**15 and left >= 2**13 and left % 1024 == 0 and enough:
            break
        left -= 1
        x = _put_symbol(x, *pairs[left], tables, words)
    if left:
        states = [x] + [LOW + words.pop() for _ in range(31)]
        for group in range(left - 16, -1, -16):
            for put in (_put_raw_bits, _put_entry):
                for i in range(group + 15, group - 1, -1):
                    states[i % LANES] = put(states[i % LANES], *pairs[i], tables, words)
        x = states[0]
        for state in states[:0:-1]:
            k = state.bit_length() - 17
            x = _put_bits(x, state % LOW, 16, words)
            x = _put_bits(x, (state >> 16) - (1 << k), k, words)
            x = _put_bits(x, k, 4, words)
        x = _put_bits(x, left // LANES % LOW, 16, words)
        x = _put_bits(x, left // LANES // LOW, 8, words)
    if len(pairs) >= 2**15:
        x = _put_bits(x, 1 if left else 0, 1, words)
    if x >= LOW:
        words.append(x % LOW)
        x //= LOW
    return x.to_bytes((x.bit_length() + 7) // 8, "little") + b"".join(w.to_bytes(2, "little") for w in words[::-1])


def _put_symbol(x: int, symbol: int, t: int, tables: EntropyTables, words: list[int]) -> int:
    return _put_entry(_put_raw_bits(x, symbol, t, tables, words), symbol, t, tables, words)


def _put_raw_bits(x: int, symbol: int, t: int, tables: EntropyTables, words: list[int]) -> int:
    """Of an escape; nothing for a symbol that has an entry."""
    entry, escape = symbol - int(tables.offsets[t]), int(tables.sizes[t]) - 1
    if 0 <= entry < escape:
        return x
    order = max(0, escape.bit_length() - 5)
    number = (1 << order) + (2 * (entry - escape) if entry >= escape else -2 * entry - 1)
    bits = "0" * (number.bit_length() - 1 - order) + f"{number:b}"
    for bit in reversed(bits):
        x = _put_bits(x, int(bit), 1, words)
    return x


def _put_entry(x: int, symbol: int, t: int, tables: EntropyTables, words: list[int]) -> int:
    freqs = tables.freqs[tables.starts[t] :][: tables.sizes[t]].tolist()
    entry, escape = symbol - int(tables.offsets[t]), len(freqs) - 1
    if not 0 <= entry < escape:
        entry = escape
    return _put(x, sum(freqs[:entry]), freqs[entry], words)


def _put(x: int, start: int, freq: int, words: list[int]) -> int:
    if x >= freq << (32 - BITS):
        words.append(x % LOW)
        x //= LOW
    return (x // freq << BITS) + x % freq + start


def _put_bits(x: int, value: int, bits: int, words: list[int]) -> int:
    if x >= 1 << (32 - bits):
        words.append(x % LOW)
        x //= LOW
    return x << bits | value


class _Reader:
    """A state and the words it takes in."""

    def __init__(self, x: int, words: list[int]) -> None:
        self.x, self.words = x, words
        self.fill()

    def fill(self) -> None:
        if self.x < LOW and self.words:
            self.x = self.x << 16 | self.words.pop(0)

    def bits(self, number: int) -> int:
        value = self.x % (1 << number)
        self.x >>= number
        self.fill()
        return value

    def symbol(self, t: int, tables: EntropyTables) -> int:
        return self.raw_bits(self.entry(t, tables), t, tables)

    def entry(self, t: int, tables: EntropyTables) -> int:
        freqs = tables.freqs[tables.starts[t] :][: tables.sizes[t]].tolist()
        slot, entry = self.x % 2**BITS, 0
        while slot >= freqs[entry]:
            slot -= freqs[entry]
            entry += 1
        self.x = freqs[entry] * (self.x >> BITS) + slot
        self.fill()
        return entry

    def raw_bits(self, entry: int, t: int, tables: EntropyTables) -> int:
        """The symbol of an entry, for the escape's with what it carries."""
        escape = int(tables.sizes[t]) - 1
        if entry == escape:
            order = bits = max(0, escape.bit_length() - 5)
            while not self.bits(1):
                bits += 1
            number = 1
            for _ in range(bits):
                number = 2 * number + self.bits(1)
            number -= 1 << order
            entry = escape + number // 2 if number % 2 == 0 else -(number + 1) // 2
        return int(tables.offsets[t]) + entry


def _decode_chunk(data: bytes, indexes: list[int], tables: EntropyTables) -> list[int]:
    if not data and not indexes:
        return []
    head = (2 if len(data) % 2 == 0 else 1) if data else 0
    words = [int.from_bytes(data[k : k + 2], "little") for k in range(head, len(data), 2)]
    reader = _Reader(int.from_bytes(data[:head], "little"), words)
    body, symbols = 0, []
    if len(indexes) >= 2**15 and reader.bits(1):
        body = (reader.bits(8) << 16 | reader.bits(16)) * LANES
        states = []
        for _ in range(LANES - 1):
            k = reader.bits(4)
            high = reader.bits(k)
            states.append((1 << k | high) << 16 | reader.bits(16))
        lanes = [_Reader(x, words) for x in [reader.x, *states]]
        for group in range(0, body, 16):
            places = range(group, group + 16)
            entries = [lanes[i % LANES].entry(indexes[i], tables) for i in places]
            symbols += [lanes[i % LANES].raw_bits(e, indexes[i], tables) for i, e in zip(places, entries, strict=True)]
        reader = _Reader(lanes[0].x, [lane.x - LOW for lane in lanes[1:]] + words)
    symbols += [reader.symbol(t, tables) for t in indexes[body:]]
    if reader.x != START or reader.words:
        raise ValueError(f"state {reader.x} and {len(reader.words)} words left")
    return symbols


def _varint(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])
