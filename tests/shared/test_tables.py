"""Entropy tables: as good as integers allow, the same everywhere, and refused when they are not tables."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec.tables import TOTAL, EntropyTables, escape_value, from_pmfs, gaussian_tables, quantise_pmf
from shared.errors import InvalidBundle

SCALES = np.exp(np.linspace(np.log(0.11), np.log(256), 64))


@pytest.fixture(scope="module")
def gaussians() -> EntropyTables:
    return gaussian_tables(SCALES)


def test_gaussian_tables_never_change(gaussians: EntropyTables) -> None:
    assert gaussians.sha256 == "b246ae4f366933abbfd62a5932247c10394368e81f4b4b6ca66cdd58df697db8"


def test_gaussian_tables_cost_less_than_a_thousandth_above_the_gaussian(gaussians: EntropyTables) -> None:
    """Below scale 0.25, where almost nothing is coded, the bound is a ten-thousandth of a bit a symbol."""
    for t, scale in enumerate(SCALES):
        reach = int(12 * scale) + 2
        grid = np.linspace(-reach - 0.5, reach + 0.5, 64 * (2 * reach + 1) + 1)
        density = np.exp(-(grid**2) / (2 * scale**2)) / (scale * np.sqrt(2 * np.pi))
        middle = (density[:-1] + density[1:]) / 2 * np.diff(grid)
        pmf = middle.reshape(2 * reach + 1, 64).sum(1)
        pmf /= pmf.sum()
        symbols = np.arange(-reach, reach + 1)
        entropy = -(pmf[pmf > 0] * np.log2(pmf[pmf > 0])).sum()
        spent = sum(
            p * gaussians.ideal_bits(np.array([s]), np.array([t]))
            for p, s in zip(pmf, symbols, strict=True)
            if p > 1e-9
        )
        assert spent < entropy * 1.001 + 1e-4, f"scale {scale:.2f}: {spent} bits for an entropy of {entropy}"


def test_ideal_bits_count_the_table_and_the_escape(gaussians: EntropyTables) -> None:
    t = 28
    start, size = int(gaussians.starts[t]), int(gaussians.sizes[t])
    last = int(gaussians.offsets[t]) + size - 2
    in_table = -np.log2(int(gaussians.freqs[start + size - 2]) / TOTAL)
    escape = -np.log2(int(gaussians.freqs[start + size - 1]) / TOTAL)
    assert gaussians.ideal_bits(np.array([last]), np.array([t])) == pytest.approx(in_table)
    # 29 entries, order 0: the first beyond the table carries 0, one bit; the fourth carries 6, five bits.
    assert size - 1 == 29
    assert gaussians.ideal_bits(np.array([last + 1]), np.array([t])) == pytest.approx(escape + 1)
    assert gaussians.ideal_bits(np.array([last + 4]), np.array([t])) == pytest.approx(escape + 5)
    # 1,435 entries, order 6: 0 to 63 in seven bits.
    t = 63
    beyond = np.array([int(gaussians.offsets[t]) + int(gaussians.sizes[t]) - 1])
    escape = -np.log2(int(gaussians.freqs[-1]) / TOTAL)
    assert gaussians.ideal_bits(beyond, np.array([t])) == pytest.approx(escape + 7)


@given(st.integers(1, 50), st.integers(-(2**31), 2**31 - 1))
def test_escape_values_are_unlike_for_unlike_symbols(size: int, position: int) -> None:
    if 0 <= position < size:
        return
    value = escape_value(position, size)
    back = size + value // 2 if value % 2 == 0 else -(value + 1) // 2
    assert value >= 0
    assert back == position


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_no_other_frequencies_would_code_shorter(weights: list[float]) -> None:
    pmf = np.array(weights) / max(sum(weights), 1e-9)

    def cost(freqs: tuple[int, ...]) -> float:
        return -float((pmf * np.log2(np.array(freqs))).sum())

    freqs = tuple(quantise_pmf(pmf, precision=4).tolist())
    assert sum(freqs) == 16
    every = (f for f in itertools.product(range(1, 16), repeat=len(pmf)) if sum(f) == 16)
    assert cost(freqs) <= min(map(cost, every)) + 1e-12


def test_pmfs_lose_improbable_ends_to_the_escape() -> None:
    tables = from_pmfs([np.array([1e-9, 0.25, 0.5, 0.2499, 1e-9])], [-7])
    assert tables.offsets.tolist() == [-6]
    assert tables.sizes.tolist() == [4]


def test_a_symbol_that_is_certain_leaves_one_unit_to_the_escape() -> None:
    assert from_pmfs([np.array([1.0])], [5]).freqs.tolist() == [TOTAL - 1, 1]


def test_a_pmf_of_nothing_but_tails_still_makes_a_table() -> None:
    tables = from_pmfs([np.full(10, 1e-7)], [0])
    assert tables.sizes.tolist() == [2]


@pytest.mark.parametrize("pmf", [[-0.1, 0.5], [np.nan], [0.7, 0.7], []])
def test_what_is_not_a_pmf_is_refused(pmf: list[float]) -> None:
    with pytest.raises(ValueError, match="expected probabilities"):
        from_pmfs([np.array(pmf)], [0])


def test_tables_come_back_from_a_bundle_as_they_were(gaussians: EntropyTables) -> None:
    arrays = gaussians.to_arrays("tables.y")
    assert set(arrays) == {"tables.y.offsets", "tables.y.sizes", "tables.y.freqs"}
    assert EntropyTables.from_arrays(arrays, "tables.y").sha256 == gaussians.sha256
    with pytest.raises(InvalidBundle, match="lacks"):
        EntropyTables.from_arrays(arrays, "tables.z")


def test_the_hash_tells_tables_apart() -> None:
    assert len({gaussian_tables([s]).sha256 for s in (1.0, 1.01, 2.0)}) == 3


@pytest.mark.parametrize(
    ("offsets", "sizes", "freqs"),
    [
        ([0], [3], [TOTAL - 1, 1]),  # sizes and frequencies disagree
        ([0], [2], [TOTAL - 2, 1]),  # does not sum up
        ([0, 0], [2, 2], [TOTAL - 1, 1, TOTAL, 0]),  # an entry of 0
        ([0], [1], [TOTAL]),  # no room for an escape
        ([], [], []),
        ([0, 0], [2], [TOTAL - 1, 1]),
        ([32767], [3], [TOTAL - 2, 1, 1]),  # a symbol beyond 16 bits
        ([0] * 257, [2] * 257, [TOTAL - 1, 1] * 257),  # an index is a byte
        ([0], [-2], []),
    ],
)
def test_arrays_that_are_no_tables_are_refused(offsets: list[int], sizes: list[int], freqs: list[int]) -> None:
    with pytest.raises(InvalidBundle):
        EntropyTables(np.array(offsets, np.int32), np.array(sizes, np.int32), np.array(freqs, np.uint16))


def test_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(InvalidBundle, match="uint16"):
        EntropyTables(np.array([0], np.int32), np.array([2], np.int32), np.array([TOTAL - 1, 1], np.int64))


def test_what_the_kernels_read_fits_into_a_core_s_cache(gaussians: EntropyTables) -> None:
    look = gaussians.lookup
    to_encode = look.encode_tables.nbytes + look.encode_rows.nbytes
    to_decode = look.buckets.nbytes + look.decode_tables.nbytes + look.decode_rows.nbytes
    assert to_encode < 2**18
    assert to_decode < 2**19
