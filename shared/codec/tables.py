"""Integer frequency tables: what the rANS coder codes by, made once at export and carried in the weights bundle.

A table maps symbols [offset, offset + n) and an escape to frequencies that are at least 1 and sum to 2^14. The
escape stands for every other int32 (its value follows as Exp-Golomb bits, see `shared.codec.rans`), so nothing is
ever clipped. The encoder and the decoder must hold the same tables, hence they are never computed from floats at run
time: `sha256` over their canonical bytes says which they are.

Two kinds are in use: Gaussians of log-spaced scales for the latents (Minnen et al. 2018, arXiv 1809.02736, eq. 3;
scales as in CompressAI), and one table a channel for the hyper-latents (the factorised prior of arXiv 1802.01436).

Why 14 bits: the states are 32 bits wide and renormalised by 16, so a finer table costs the coder what it gains the
model. Measured rate above the entropy of the exact Gaussian, tables + coder, 4 million symbols a scale:

    precision   scale 0.29        scale 0.79        scale 5.6         scale 108         scale 256
    12 bits     0.067 + 0.000 %   0.017 + 0.000 %   0.005 + 0.000 %   0.066 + 0.000 %   0.173 + 0.000 %
    14 bits     0.016 + 0.008 %   0.003 + 0.013 %   0.001 + 0.006 %   0.013 + 0.004 %   0.032 + 0.003 %
    16 bits     0.004 + 0.143 %   0.001 + 0.173 %   0.000 + 0.101 %   0.003 + 0.057 %   0.007 + 0.048 %
"""

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidBundle

PRECISION = 14  # bits; frequencies of a table sum to 2^14
TOTAL = 1 << PRECISION
MAX_TABLES = 256  # an index is a byte
MAX_ROWS = 1 << 18  # entries of all tables together
NARROW_BITS, WIDE_BITS = 7, 10  # of a slot, that choose its bucket in decoding
_NARROW_SIZE = 24  # entries; tables of more get more buckets
_VALUE_MIN, _VALUE_MAX = -(1 << 15), (1 << 15) - 1  # symbols that have an entry of their own


@dataclass(frozen=True, eq=False)
class EntropyTables:
    """Frequency tables, checked when made. Raises InvalidBundle where they are not as said here.

    `offsets`: int32 [T], smallest symbol of each table. `sizes`: int32 [T], entries of each table, escape included.
    `freqs`: uint16 [sum(sizes)], table after table, in symbol order, the escape last; each >= 1, each table's sum 2^14.
    """

    offsets: NDArray[np.int32]
    sizes: NDArray[np.int32]
    freqs: NDArray[np.uint16]

    def __post_init__(self) -> None:
        offsets, sizes, freqs = self.offsets, self.sizes, self.freqs
        for name, array, dtype in (("offsets", offsets, "i4"), ("sizes", sizes, "i4"), ("freqs", freqs, "u2")):
            if array.ndim != 1 or array.dtype != np.dtype(dtype):
                raise InvalidBundle(
                    f"table {name} must be {np.dtype(dtype)} [n], got {array.dtype} {list(array.shape)}"
                )
        if not 1 <= len(offsets) <= MAX_TABLES or len(sizes) != len(offsets):
            raise InvalidBundle(f"expected 1 to {MAX_TABLES} tables, got {len(offsets)} offsets and {len(sizes)} sizes")
        if sizes.min() < 2 or sizes.astype(np.int64).sum() != len(freqs) or len(freqs) > MAX_ROWS:
            raise InvalidBundle(f"table sizes must be >= 2 and sum to the {len(freqs)} frequencies (<= {MAX_ROWS})")
        last = offsets.astype(np.int64) + sizes - 2
        if offsets.min() < _VALUE_MIN or last.max() > _VALUE_MAX:
            raise InvalidBundle(f"symbols of tables must be in 16 bits, got {offsets.min()} to {last.max()}")
        sums = np.add.reduceat(freqs.astype(np.int64), self.starts)
        if freqs.min() < 1 or (sums != TOTAL).any():
            raise InvalidBundle(f"frequencies must be >= 1 and sum to {TOTAL} in each table")
        for array in (offsets, sizes, freqs):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64 [T]: position of each table's first entry in `freqs`."""
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    @cached_property
    def sha256(self) -> str:
        """Hex digest of precision, number of tables, offsets, sizes and frequencies, all little-endian."""
        digest = hashlib.sha256(np.array([PRECISION, len(self)], "<i4").tobytes())
        for array, dtype in ((self.offsets, "<i4"), (self.sizes, "<i4"), (self.freqs, "<u2")):
            digest.update(array.astype(dtype).tobytes())
        return digest.hexdigest()

    @cached_property
    def cumulative(self) -> NDArray[np.uint16]:
        """uint16 [sum(sizes)]: sum of the frequencies before each entry, within its table."""
        running = np.cumsum(self.freqs, dtype=np.int64) - self.freqs
        return (running - np.repeat(running[self.starts], self.sizes)).astype(np.uint16)

    @cached_property
    def least_bits(self) -> NDArray[np.float64]:
        """float64 [T]: cost of each table's likeliest entry; no symbol costs less."""
        likeliest: NDArray[np.uint16] = np.maximum.reduceat(self.freqs, self.starts)
        return np.asarray(-np.log2(likeliest / TOTAL), np.float64)

    @cached_property
    def lookup(self) -> "Lookup":
        """What the kernels read instead of the arrays above."""
        return _build_lookup(self)

    def to_arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """As they are kept in a bundle: `prefix.offsets`, `prefix.sizes`, `prefix.freqs`."""
        return {f"{prefix}.offsets": self.offsets, f"{prefix}.sizes": self.sizes, f"{prefix}.freqs": self.freqs}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str) -> "EntropyTables":
        """Back from a bundle's arrays. Raises InvalidBundle where one is missing or inconsistent."""
        try:
            parts = [np.array(arrays[f"{prefix}.{name}"]) for name in ("offsets", "sizes", "freqs")]
        except KeyError as error:
            raise InvalidBundle(f"the bundle lacks the entropy tables' array {error}") from error
        return cls(*parts)

    def ideal_bits(self, symbols: NDArray[Any], indexes: NDArray[Any]) -> float:
        """What a perfect coder would spend on `symbols` coded by tables `indexes`, escapes' raw bits included."""
        indexes = np.asarray(indexes, np.int64)
        position = np.asarray(symbols, np.int64) - self.offsets[indexes]
        size = self.sizes[indexes].astype(np.int64) - 1
        escaped = (position < 0) | (position >= size)
        row = self.starts[indexes] + np.where(escaped, size, position)
        bits = -np.log2(self.freqs[row] / TOTAL).sum()
        for p, n in zip(position[escaped].tolist(), size[escaped].tolist(), strict=True):
            order = escape_order(n)
            bits += 2 * (escape_value(p, n) + (1 << order)).bit_length() - 1 - order
        return float(bits)


@dataclass(frozen=True)
class Lookup:
    """The tables as the kernels of `shared.codec.kernels` read them; "row" is a position in `freqs`.

    `bounds`: int64 [T, 4], offset, entries without the escape, first row, order of escapes. `freqs`, `cumulative`:
    uint16 by row.

    For encoding: `encode_tables`: int64 [T], offset (32 bits) | first row (18) | entries without the escape (14).
    `encode_rows`: int64 by row, reciprocal (32) | frequency (14) | cumulative (14) | shift (4), such that
    x * reciprocal >> 31 + shift is x // frequency or one more.

    For decoding, a table's 2^14 slots are cut into 2^7 buckets, or 2^10 from table `first_wide` on. `buckets`: int64,
    for the entry at a bucket's first slot, or the one before the escape: cumulative (14) | frequency (14) | 4 free |
    frequency of the next entry, 0 for the escape's (14) | 2 free | symbol (16, signed). Symbols that lie further on
    than the next entry are searched for through `decode_tables`: int64 [T], row of symbol 0 (32, modulo 2^32) | value
    that stands for the escape (32), and `decode_rows`: int64 by row, cumulative (14) | frequency (14).
    """

    bounds: NDArray[np.int64]
    freqs: NDArray[np.uint16]
    cumulative: NDArray[np.uint16]
    encode_tables: NDArray[np.int64]
    encode_rows: NDArray[np.int64]
    first_wide: int
    buckets: NDArray[np.int64]
    decode_tables: NDArray[np.int64]
    decode_rows: NDArray[np.int64]


def _build_lookup(tables: EntropyTables) -> Lookup:
    u32 = 0xFFFFFFFF
    offsets, sizes, starts = tables.offsets.astype(np.int64), tables.sizes.astype(np.int64) - 1, tables.starts
    freqs, cumulative = tables.freqs.astype(np.int64), tables.cumulative.astype(np.int64)
    shifts = np.ceil(np.log2(freqs)).astype(np.int64)
    reciprocals = -(-(1 << (31 + shifts)) // freqs)
    wide = np.flatnonzero(sizes > _NARROW_SIZE)
    first_wide = int(wide[0]) if len(wide) else len(tables)
    buckets = []
    for t in range(len(tables)):
        bits = NARROW_BITS if t < first_wide else WIDE_BITS
        rows = slice(starts[t], starts[t] + sizes[t])
        entry = np.searchsorted(cumulative[rows], np.arange(1 << bits) << (PRECISION - bits), side="right") - 1
        following = np.append(freqs[rows][1:], 0)
        packed = cumulative[rows] | freqs[rows] << 14 | following << 32 | (offsets[t] + np.arange(sizes[t])) << 48
        buckets.append(packed[entry])
    return Lookup(
        bounds=np.stack([offsets, sizes, starts, np.array([escape_order(int(size)) for size in sizes])], 1),
        freqs=tables.freqs,
        cumulative=tables.cumulative,
        encode_tables=offsets & u32 | (starts | sizes << 18) << 32,
        encode_rows=reciprocals | (freqs | cumulative << 14 | shifts << 28) << 32,
        first_wide=first_wide,
        buckets=np.concatenate(buckets),
        decode_tables=(starts - offsets) & u32 | ((offsets + sizes) & u32) << 32,
        decode_rows=cumulative | freqs << 14,
    )


def escape_value(position: int, size: int) -> int:
    """Number >= 0 that an escape carries for a `position` (symbol - offset) outside [0, size), nearest first."""
    return 2 * (position - size) if position >= size else -2 * position - 1


def escape_order(size: int) -> int:
    """Order of the Exp-Golomb code that a table of `size` entries without the escape has for what it carries.

    A wide table's tails are long: order 0 would cost scale 256 another 0.2 %.
    """
    return max(0, size.bit_length() - 5)


def gaussian_tables(scales: Sequence[float] | NDArray[np.float64]) -> EntropyTables:
    """A table for each scale (standard deviation, in quantisation steps): a Gaussian at 0 integrated over each step."""
    pmfs, offsets = [], []
    for scale in scales:
        reach = math.ceil(10 * float(scale)) + 1
        upper = np.array([math.erfc((k - 0.5) / (scale * math.sqrt(2))) / 2 for k in range(1, reach + 2)])
        side = upper[:-1] - upper[1:]
        pmfs.append(np.concatenate([side[::-1], [1 - 2 * upper[0]], side]))
        offsets.append(-reach)
    return from_pmfs(pmfs, offsets)


def from_pmfs(pmfs: Sequence[NDArray[np.float64]], offsets: Sequence[int]) -> EntropyTables:
    """A table for each probability mass function; `offsets`: the symbol of each one's first entry.

    What a function lacks to 1 is the escape's. Ends that are too improbable for an entry are left to the escape. Raises
    ValueError where probabilities are negative, not finite or above 1 in sum.
    """
    tables, firsts = [], []
    for pmf, offset in zip(pmfs, offsets, strict=True):
        pmf = np.asarray(pmf, np.float64)
        if pmf.ndim != 1 or not len(pmf) or not np.isfinite(pmf).all() or pmf.min() < 0 or pmf.sum() > 1 + 1e-6:
            raise ValueError(f"expected probabilities >= 0 with a sum <= 1, got {pmf!r}")
        # Below half a unit an entry takes more from the others than its symbol saves by not being escaped.
        kept = np.flatnonzero(pmf * TOTAL >= 0.5)
        first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (int(pmf.argmax()),) * 2
        inside = pmf[first : last + 1]
        tables.append(quantise_pmf(np.append(inside, max(0.0, 1 - float(inside.sum())))))
        firsts.append(offset + first)
    return EntropyTables(
        np.array(firsts, np.int32), np.array([len(t) for t in tables], np.int32), np.concatenate(tables)
    )


def quantise_pmf(pmf: NDArray[np.float64], precision: int = PRECISION) -> NDArray[np.uint16]:
    """Frequencies >= 1 with sum 2^precision that minimise the expected code length -sum(pmf log2(freq)).

    The objective is concave in each frequency, so handing out unit after unit to where it saves most is optimal from
    any start that the optimum is nowhere below: there, frequencies are within one of a multiple >= 2^precision - n of
    `pmf`, because at most n units go to entries that deserve less than one. Ties go to the lower entry.
    """
    total = 1 << precision
    if len(pmf) > total:
        raise ValueError(f"{len(pmf)} entries do not fit into {precision} bits")
    pmf = pmf / max(1.0, float(pmf.sum()))
    freqs: list[int] = np.maximum(1, np.floor(pmf * (total - len(pmf))).astype(np.int64) - 1).tolist()

    def saving(i: int) -> float:
        return float(pmf[i]) * math.log2((freqs[i] + 1) / freqs[i])

    heap = [(-saving(i), i) for i in range(len(freqs))]
    heapq.heapify(heap)
    for _ in range(total - sum(freqs)):
        i = heap[0][1]
        freqs[i] += 1
        heapq.heapreplace(heap, (-saving(i), i))
    return np.array(freqs, np.uint16)
