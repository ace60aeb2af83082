"""The entropy coder: whatever goes in comes out, in as few bytes as the tables allow; nothing else is accepted."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared.codec import rans
from shared.codec.tables import EntropyTables, from_pmfs, gaussian_tables
from shared.errors import InvalidBitstream
from tests.shared import rans_reference

ROOT = Path(__file__).resolve().parents[2]
SCALES = np.exp(np.linspace(np.log(0.11), np.log(256), 64))
TABLES = gaussian_tables(SCALES)
INT32 = (-(2**31), 2**31 - 1)

Coded = tuple[NDArray[np.int32], NDArray[np.uint8]]


def draw(n: int, *, seed: int = 0, spread: float = 16, outliers: int = 0) -> Coded:
    """Symbols of Gaussians whose scale indexes are `spread` wide, and some symbols from anywhere in int32."""
    rng = np.random.default_rng(seed)
    indexes = np.minimum(np.abs(rng.normal(0, spread, n)), 63).astype(np.uint8)
    symbols = np.rint(rng.normal(0, SCALES[indexes])).astype(np.int32)
    symbols[rng.integers(0, max(n, 1), min(outliers, n))] = rng.integers(*INT32, min(outliers, n))
    return symbols, indexes


@st.composite
def small_inputs(draw_from: st.DrawFn) -> Coded:
    n = draw_from(st.integers(0, 300))
    values = st.one_of(st.integers(-3, 3), st.integers(-(2**15), 2**15), st.integers(*INT32), st.sampled_from(INT32))
    symbols = draw_from(hnp.arrays(np.int32, n, elements=values))
    return symbols, draw_from(hnp.arrays(np.uint8, n, elements=st.integers(0, 63)))


@st.composite
def any_tables(draw_from: st.DrawFn) -> EntropyTables:
    weights = draw_from(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=40), min_size=1, max_size=8))
    pmfs = [np.array(w) / max(sum(w), 1e-3) for w in weights]
    return from_pmfs(pmfs, draw_from(st.lists(st.integers(-500, 500), min_size=len(pmfs), max_size=len(pmfs))))


# -- there and back ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(small_inputs(), st.integers(0, 64))
def test_any_int32_comes_back_and_the_bytes_are_the_reference_s(coded: Coded, skip_below: int) -> None:
    symbols, indexes = coded
    symbols = np.where(indexes < skip_below, 0, symbols).astype(np.int32)
    data = rans.encode(symbols, indexes, TABLES, skip_below)
    assert data == rans_reference.encode(symbols.tolist(), indexes.tolist(), TABLES, skip_below)
    decoded = rans.decode(data, indexes, TABLES, skip_below)
    assert decoded.dtype == np.int32
    assert decoded.tolist() == symbols.tolist()


@settings(deadline=None, max_examples=200)
@given(small_inputs(), small_inputs(), st.integers(0, 64))
def test_two_passes_share_one_state_and_come_back_one_after_the_other(
    first: Coded, second: Coded, skip_below: int
) -> None:
    passes = [(np.where(i < skip_below, 0, s).astype(np.int32), i) for s, i in (first, second)]
    data = rans.encode_passes(passes[0], passes[1], TABLES, skip_below)
    joined = [np.concatenate(both).tolist() for both in zip(*passes, strict=True)]
    assert data == rans_reference.encode(joined[0], joined[1], TABLES, skip_below), "as one stream of both"
    decoder = rans.PassDecoder(data, TABLES, skip_below)
    assert decoder.first(passes[0][1]).tolist() == passes[0][0].tolist()
    assert decoder.second(passes[1][1]).tolist() == passes[1][0].tolist()


@pytest.mark.parametrize("sizes", [(0, 0), (0, 9), (9, 0), (2**15 - 1, 2**16), (2**15, 9), (2**16, 2**16)])
def test_passes_of_any_sizes_come_back(sizes: tuple[int, int]) -> None:
    one, two = (draw(n, seed=n, outliers=3) for n in sizes)
    data = rans.encode_passes(one, two, TABLES)
    decoder = rans.PassDecoder(data, TABLES)
    np.testing.assert_array_equal(decoder.first(one[1]), one[0])
    np.testing.assert_array_equal(decoder.second(two[1]), two[0])


@pytest.mark.parametrize("size", [50, 2**15])
def test_damaged_passes_are_refused(size: int) -> None:
    one, two = draw(size, seed=1), draw(size, seed=2)
    data = rans.encode_passes(one, two, TABLES)
    rng = np.random.default_rng(3)
    flipped = [bytearray(data) for _ in range(50)]
    for each in flipped:
        each[int(rng.integers(len(each)))] ^= 1 << int(rng.integers(8))
    for broken in (b"", data[:-1], data[:-2], data + b"\1", data + b"\0\0", *map(bytes, flipped)):
        decoder = rans.PassDecoder(broken, TABLES)
        with pytest.raises(InvalidBitstream):  # noqa: PT012 - whichever of the two sees it
            first = decoder.first(one[1])
            second = decoder.second(two[1])
            if (first.tolist(), second.tolist()) != (one[0].tolist(), two[0].tolist()):
                raise InvalidBitstream("other symbols: what the symbols' CRC is for")


@settings(deadline=None, max_examples=100)
@given(any_tables(), st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_any_tables_serve(tables: EntropyTables, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, len(tables), n).astype(np.uint8)
    symbols = (tables.offsets[indexes] + rng.integers(-3, 43, n)).astype(np.int32)
    data = rans.encode(symbols, indexes, tables)
    assert data == rans_reference.encode(symbols.tolist(), indexes.tolist(), tables)
    assert rans.decode(data, indexes, tables).tolist() == symbols.tolist()


@pytest.mark.parametrize(
    ("n", "spread", "outliers"),
    [
        (2**15 - 1, 16, 0),
        (2**15, 16, 0),
        (2**15 + 1, 60, 0),
        (40_031, 16, 400),
        (50_000, 1, 10),  # one state makes few words and goes on for long
        (33_000, 100, 33_000),  # nothing but escapes
    ],
)
def test_thirty_two_states_write_what_the_reference_does(n: int, spread: float, outliers: int) -> None:
    symbols, indexes = draw(n, spread=spread, outliers=outliers)
    data = rans.encode(symbols, indexes, TABLES)
    assert data == rans_reference.encode(symbols.tolist(), indexes.tolist(), TABLES)
    np.testing.assert_array_equal(rans.decode(data, indexes, TABLES), symbols)


def test_the_reference_reads_what_thirty_two_states_wrote() -> None:
    symbols, indexes = draw(35_000, outliers=50)
    data = rans.encode(symbols, indexes, TABLES)
    assert rans_reference.decode(data, indexes.tolist(), TABLES) == symbols.tolist()


def test_a_large_frame_is_its_chunks_one_after_the_other() -> None:
    n = 2**19 + 77
    symbols, indexes = draw(n)
    half = -(-n // 2)
    first = rans.encode(symbols[:half], indexes[:half], TABLES)
    second = rans.encode(symbols[half:], indexes[half:], TABLES)
    data = rans.encode(symbols, indexes, TABLES)
    assert data.endswith(first + second)
    assert len(data) - len(first + second) == 3  # a varint
    np.testing.assert_array_equal(rans.decode(data, indexes, TABLES), symbols)


def test_threads_make_the_same_bytes_and_symbols() -> None:
    symbols, indexes = draw(2**20 + 5, outliers=100)
    symbols[indexes < 3] = 0
    with ThreadPoolExecutor(2) as pool:
        for skip_below in (0, 3):
            data = rans.encode(symbols, indexes, TABLES, skip_below, pool=pool)
            assert data == rans.encode(symbols, indexes, TABLES, skip_below)
            np.testing.assert_array_equal(rans.decode(data, indexes, TABLES, skip_below, pool=pool), symbols)


def test_many_threads_may_code_at_once() -> None:
    inputs = [draw(n, seed=n) for n in (10, 5_000, 40_000, 70_000) * 4]
    with ThreadPoolExecutor(4) as pool:
        coded = list(pool.map(lambda pair: rans.encode(*pair, TABLES), inputs))
        decoded = list(pool.map(lambda data, pair: rans.decode(data, pair[1], TABLES), coded, inputs))
    for (symbols, _), back in zip(inputs, decoded, strict=True):
        np.testing.assert_array_equal(back, symbols)


# -- what is skipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1_000, 100_003])
@pytest.mark.parametrize("skip_below", [1, 20, 255])
def test_skipped_symbols_cost_nothing_and_decode_as_zero(n: int, skip_below: int) -> None:
    symbols, indexes = draw(n)
    coded = indexes >= skip_below
    symbols[~coded] = 0
    data = rans.encode(symbols, indexes, TABLES, skip_below)
    assert data == rans.encode(symbols[coded], indexes[coded], TABLES)
    np.testing.assert_array_equal(rans.decode(data, indexes, TABLES, skip_below), symbols)


def test_where_all_is_skipped_the_stream_is_empty() -> None:
    indexes = np.zeros(10_000, np.uint8)
    assert rans.encode(np.zeros(10_000, np.int32), indexes, TABLES, 3) == b""
    assert not rans.decode(b"", indexes, TABLES, 3).any()


@pytest.mark.parametrize("position", [0, 17, 31, 1_000, 1_003])
def test_a_skipped_symbol_that_is_not_zero_is_an_error(position: int) -> None:
    symbols, indexes = np.zeros(1_004, np.int32), np.full(1_004, 9, np.uint8)
    symbols[position], indexes[position] = -1, 2
    with pytest.raises(ValueError, match="must be 0"):
        rans.encode(symbols, indexes, TABLES, 3)


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 4, 16, 100])
@pytest.mark.parametrize("n", [1, 10, 300, 4_000, 30_000, 163_840, 1_566_720])
def test_streams_are_within_a_thousandth_and_64_bytes_of_the_ideal(n: int, spread: float) -> None:
    symbols, indexes = draw(n, spread=spread, outliers=n // 1000)
    ideal = TABLES.ideal_bits(symbols, indexes) / 8
    size = len(rans.encode(symbols, indexes, TABLES))
    assert size <= ideal * 1.001 + 64
    if size < 2_000:  # one state
        assert size <= ideal * 1.001 + 3


def test_a_frame_in_which_nothing_happens_is_small_however_large_it_is() -> None:
    n = 2_000_000
    indexes = np.zeros(n, np.uint8)
    data = rans.encode(np.zeros(n, np.int32), indexes, TABLES)
    assert len(data) <= 64
    assert not rans.decode(data, indexes, TABLES).any()


# -- what never changes ------------------------------------------------------------------------------------------------


def test_streams_never_change() -> None:
    digest = hashlib.sha256()
    for n, spread, outliers, skip_below in ((0, 1, 0, 0), (1, 9, 1, 0), (700, 16, 9, 2), (90_000, 16, 50, 3)):
        symbols, indexes = draw(n, seed=n, spread=spread, outliers=outliers)
        symbols[indexes < skip_below] = 0
        data = rans.encode(symbols, indexes, TABLES, skip_below)
        digest.update(len(data).to_bytes(4, "little") + data)
    assert digest.hexdigest() == "8cc633c270e4b4af80af76644265158c488d86b3479dd209359a307ebe171a1c"


_CODE_IN_ANOTHER_PROCESS = """
import hashlib, sys
sys.path.insert(0, {root!r})
from tests.shared.test_rans import TABLES, draw, rans
import numpy as np
symbols, indexes = draw(70_000, outliers=70)
symbols[indexes < 3] = 0
data = rans.encode(symbols, indexes, TABLES, 3)
assert (rans.decode(data, indexes, TABLES, 3) == symbols).all()
print(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.slow
def test_a_processor_without_vectors_makes_the_same_bytes(tmp_path: Path) -> None:
    symbols, indexes = draw(70_000, outliers=70)
    symbols[indexes < 3] = 0
    expected = hashlib.sha256(rans.encode(symbols, indexes, TABLES, 3)).hexdigest()
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    program = _CODE_IN_ANOTHER_PROCESS.format(root=str(ROOT))
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected


@pytest.mark.slow
def test_without_a_folder_to_cache_in_it_compiles_for_itself() -> None:
    program = """
import numba.core.caching as caching
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []  # by the version of Numba
""" + _CODE_IN_ANOTHER_PROCESS.format(root=str(ROOT))
    subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_importing_compiles_nothing() -> None:
    program = """
from shared.codec import chunks, kernels, rans, skipping
from numba.core.dispatcher import Dispatcher
found = [f for m in (chunks, kernels, skipping) for f in vars(m).values() if isinstance(f, Dispatcher)]
assert len(found) > 10
assert not any(f.signatures for f in found)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused() -> None:
    symbols, indexes = draw(100)
    with pytest.raises(ValueError, match="as many symbols"):
        rans.encode(symbols[:50], indexes, TABLES)
    with pytest.raises(ValueError, match="uint8"):
        rans.encode(symbols, indexes.astype(np.int64), TABLES)  # type: ignore[arg-type]
    indexes[7] = 64
    with pytest.raises(ValueError, match="below the number of tables, 64, got 64"):
        rans.encode(symbols, indexes, TABLES)
    with pytest.raises(ValueError, match="below the number of tables"):
        rans.decode(b"", indexes, TABLES)


def corruptions(data: bytes, rng: np.random.Generator, number: int) -> list[bytes]:
    """Bit flips, truncations, extensions, swaps of two bytes, bytes of another stream, plain noise."""
    out = []
    for _ in range(number):
        kind, at, other = rng.integers(6), int(rng.integers(len(data))), int(rng.integers(len(data)))
        changed = bytearray(data)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed += rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            changed[at], changed[other] = changed[other], changed[at]
        elif kind == 4:
            changed[at : at + 16] = rng.bytes(len(changed[at : at + 16]))
        else:
            changed = bytearray(rng.bytes(len(data)))
        out.append(bytes(changed))
    return out


@pytest.mark.parametrize(("n", "number"), [(200, 4_000), (5_000, 1_000), (40_000, 1_000), (2**19, 30)])
@pytest.mark.parametrize("skip_below", [0, 3])
def test_a_damaged_stream_is_refused_or_gives_as_many_symbols(n: int, number: int, skip_below: int) -> None:
    symbols, indexes = draw(n, outliers=n // 500)
    symbols[indexes < skip_below] = 0
    data = rans.encode(symbols, indexes, TABLES, skip_below)
    rng, refused, changed = np.random.default_rng(n), 0, 0
    for bad in corruptions(data, rng, number):
        changed += bad != data
        try:
            decoded = rans.decode(bad, indexes, TABLES, skip_below)
        except InvalidBitstream:
            refused += 1
        else:
            assert decoded.shape == symbols.shape
            assert bad == data or not np.array_equal(decoded, symbols), "two streams for the same symbols"
    # What is not refused changed the raw bits of an escape and nothing else: for the checksums to find.
    assert refused >= 0.85 * changed


def test_noise_of_any_length_is_refused_for_any_number_of_symbols() -> None:
    rng = np.random.default_rng(0)
    _, indexes = draw(2**16)
    for _ in range(500):
        noise, n = rng.bytes(int(rng.integers(0, 4_000))), int(rng.integers(0, 2**16))
        with pytest.raises(InvalidBitstream):
            rans.decode(noise + b"\1", indexes[:n], TABLES)


def test_nothing_decodes_to_many_symbols_in_bounded_time() -> None:
    indexes = np.full(3_000_000, 20, np.uint8)
    for data in (b"", b"\1", b"\0", b"\xff" * 20):
        with pytest.raises(InvalidBitstream):
            rans.decode(data, indexes, TABLES)


def test_a_head_with_a_leading_zero_is_refused() -> None:
    symbols, indexes = draw(1_000)
    data = rans.encode(symbols, indexes, TABLES)
    head = 2 - len(data) % 2
    assert head == 1
    with pytest.raises(InvalidBitstream, match="nonzero"):
        rans.decode(data[:1] + b"\0" + data[1:], indexes, TABLES)


def test_an_escape_beyond_int32_is_refused() -> None:
    """Coded by the reference, which has no such bound."""
    indexes = np.full(10, 20, np.uint8)
    for value in (2**31, -(2**31) - 1, 2**33):
        data = rans_reference.encode([0] * 9 + [value], indexes.tolist(), TABLES)
        with pytest.raises(InvalidBitstream, match="an escape"):
            rans.decode(data, indexes, TABLES)
