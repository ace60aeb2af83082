"""The `.slc` file: what was written is read, whatever else comes is refused with what was expected."""

import struct

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import rans
from shared.codec.bitstream import (
    MODEL_PREFIX_BYTES,
    check_frame,
    check_streams,
    from_bytes,
    payload_crc,
    read_header,
    symbols_crc,
    to_bytes,
)
from shared.codec.tables import from_pmfs
from shared.codec.types import Bitstream
from shared.errors import InvalidBitstream, SightlineError, TooLarge, UnknownModel

MODEL = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
HEADER = 4 + MODEL_PREFIX_BYTES + 2  # magic, version, model, quality: before the varints


def bitstream(**changes: object) -> Bitstream:
    fields = {
        "model_id": MODEL,
        "quality": 1024,
        "height": 480,
        "width": 640,
        "hyper": bytes(range(200)),
        "latents": bytes(range(256)) * 4,
        "symbols_crc": 0xDEADBEEF,
    }
    return Bitstream(**(fields | changes))  # type: ignore[arg-type]


def resealed(data: bytes) -> bytes:
    """With the CRC that its content would have."""
    return data[:-4] + struct.pack("<I", crc32c.crc32c(data[:-4]))


# -- there and back ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(256, 2048),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.binary(max_size=300),
    st.binary(max_size=300),
    st.integers(0, 2**32 - 1),
)
def test_every_bitstream_comes_back(
    quality: int, height: int, width: int, hyper: bytes, latents: bytes, crc: int
) -> None:
    written = bitstream(quality=quality, height=height, width=width, hyper=hyper, latents=latents, symbols_crc=crc)
    assert from_bytes(to_bytes(written), [OTHER, MODEL]) == written


def test_what_is_not_stream_is_at_most_3_percent_of_a_file_of_1200_bytes() -> None:
    """640x480 at quality 1; the streams' own start costs 2 bytes each."""
    data = to_bytes(bitstream(quality=256, hyper=b"h" * 180, latents=b"y" * 990))
    overhead = len(data) - 180 - 990
    assert overhead <= 31
    assert overhead + 4 <= 0.03 * len(data)


def test_a_header_is_read_without_knowing_the_model() -> None:
    header = read_header(to_bytes(bitstream()))
    assert header.model_prefix == MODEL[: 2 * MODEL_PREFIX_BYTES]
    assert (header.version, header.quality, header.height, header.width) == (2, 1024, 480, 640)
    assert (header.hyper_bytes, header.latents_bytes, header.symbols_crc) == (200, 1024, 0xDEADBEEF)


def test_the_file_form_never_changes() -> None:
    written = bitstream(hyper=b"\1\2", latents=b"\3")
    assert to_bytes(written).hex(" ", -4) == "534c4302 01234567 00048005 e003efbe adde0201 01020351 6c8ed5"
    first_version = bytes.fromhex("534c4301 01234567 89ab0004 8005e003 efbeadde 02010102 03f6ae99 fe")
    assert from_bytes(first_version, [MODEL]) == written


# -- refusals, each with what was expected and what came ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least 22 bytes of a .slc file, got 0"),
        (b"SLC\1" + bytes(10), "expected at least 22 bytes of a .slc file, got 14"),
        (b"\x89PNG" + bytes(100), "begins with b'SLC', got b'\\\\x89PN'"),
        (b"SLC\3" + bytes(100), "expected .slc version 1 or 2, got 3"),
        (to_bytes(bitstream())[:-1], "expected 1250 bytes by the file's own lengths, got 1249: it is truncated"),
        (to_bytes(bitstream())[:30], "truncated"),
        (to_bytes(bitstream()) + b"\0", "got 1251: it is followed by other bytes"),
        (to_bytes(bitstream())[:HEADER] + b"\xff" * 40, "varint in its shortest form at byte 10"),
        (to_bytes(bitstream())[:HEADER] + b"\x80\x00" + bytes(40), "varint in its shortest form"),
        (to_bytes(bitstream())[:HEADER] + b"\x80\x80\x80\x80\1" * 2 + b"\0\0", "breaks off after 22 bytes"),
    ],
)
def test_what_is_not_a_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidBitstream, match=message):
        from_bytes(data, [MODEL])


def test_a_changed_byte_is_refused_before_anything_else_is_looked_at() -> None:
    data = bytearray(to_bytes(bitstream()))
    data[HEADER - 1] = 0xFF  # quality, now far too high
    with pytest.raises(InvalidBitstream, match="expected CRC-32C"):
        from_bytes(bytes(data), [])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quality": 255}, InvalidBitstream, r"quality must be in \[256, 2048\].*got 255"),
        ({"quality": 2049}, InvalidBitstream, "got 2049"),
        ({"width": 0}, InvalidBitstream, "got 0x480"),
        ({"height": 0}, InvalidBitstream, "got 640x0"),
        ({"width": 8193}, TooLarge, "at most 8192 pixels, got 8193x480"),
        ({"height": 10**6}, TooLarge, "got 640x1000000"),
        ({"model_id": OTHER}, UnknownModel, f"model fedcba98.*{MODEL}"),
    ],
)
def test_what_no_encoder_writes_is_refused(changes: dict, error: type[SightlineError], message: str) -> None:
    with pytest.raises(error, match=message):
        from_bytes(to_bytes(bitstream(**changes)), [MODEL])


def test_a_service_may_set_its_own_limit_on_pixels() -> None:
    data = to_bytes(bitstream())
    assert from_bytes(data, [MODEL], max_pixels=640 * 480)
    with pytest.raises(TooLarge, match="at most 307199 pixels, got 640x480 = 307200"):
        from_bytes(data, [MODEL], max_pixels=640 * 480 - 1)
    with pytest.raises(TooLarge):
        check_frame(256, 480, 640, max_pixels=1000)


def test_models_that_begin_alike_are_not_guessed_between() -> None:
    twin = MODEL[:-1] + "0"
    with pytest.raises(UnknownModel, match=f"{twin}, {MODEL}"):
        from_bytes(to_bytes(bitstream()), [MODEL, twin])
    with pytest.raises(UnknownModel, match="no model"):
        from_bytes(to_bytes(bitstream()), [])


def test_ten_thousand_damaged_files_are_refused() -> None:
    data, rng = to_bytes(bitstream()), np.random.default_rng(0)
    for _ in range(10_000):
        kind, at = rng.integers(4), int(rng.integers(len(data)))
        bad = bytearray(data)
        if kind == 0:
            bad[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            bad[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            other = int(rng.integers(len(data)))
            bad[at], bad[other] = bad[other], bad[at]
        if bytes(bad) != data:
            with pytest.raises(InvalidBitstream):
                from_bytes(bytes(bad), [MODEL])


def test_damaged_files_with_a_mended_checksum_are_refused_or_keep_within_the_limits() -> None:
    data, rng, accepted = to_bytes(bitstream(hyper=b"h" * 9, latents=b"y" * 9)), np.random.default_rng(1), 0
    for _ in range(10_000):
        bad = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            bad[int(rng.integers(len(bad)))] = int(rng.integers(256))
        try:
            read = from_bytes(resealed(bytes(bad)), [MODEL])
        except (InvalidBitstream, TooLarge, UnknownModel):
            continue
        accepted += 1
        assert 256 <= read.quality <= 2048
        assert 1 <= read.width <= 8192
        assert 1 <= read.height <= 8192
        assert len(read.hyper) + len(read.latents) <= len(bad)
    assert accepted > 100  # damage to sizes, streams and symbols_crc is for the decoder to find


# -- checks that every carrier uses ------------------------------------------------------------------------------------


def test_checksums_are_castagnoli_s() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, 32 of ones."""
    assert crc32c.crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c.crc32c(b"\xff" * 32) == 0x62A8AB43


def test_the_payload_s_checksum_is_as_the_wire_contract_says() -> None:
    b = bitstream()
    fields = struct.pack("<5I", b.width, b.height, b.quality, b.symbols_crc, len(b.hyper))
    assert payload_crc(b) == crc32c.crc32c(fields + b.hyper + b.latents)
    moved = bitstream(hyper=b.hyper + b.latents[:1], latents=b.latents[1:])
    assert payload_crc(moved) != payload_crc(b)


def test_the_symbols_checksum_sees_every_symbol_and_field() -> None:
    z, y = np.arange(24, dtype=np.int32).reshape(2, 3, 4), np.arange(-96, 0, dtype=np.int32).reshape(2, 6, 8)
    crc = symbols_crc(256, 10, 20, z, y)
    assert crc == crc32c.crc32c(struct.pack("<3I", 256, 10, 20) + z.tobytes() + y.tobytes())
    assert crc == symbols_crc(256, 10, 20, np.asfortranarray(z), y)
    changed = y.copy()
    changed[1, 5, 7] += 1
    others = [(257, 10, 20, z, y), (256, 20, 10, z, y), (256, 10, 20, z + 1, y), (256, 10, 20, z, changed)]
    assert crc not in {symbols_crc(*other) for other in others}


def test_a_few_bytes_cannot_claim_a_large_frame() -> None:
    tables = from_pmfs([np.array([0.9]), np.array([0.99])], [0, 0])
    shape_z, shape_y = (2, 128, 128), (64, 512, 512)
    least = (0.152 + 0.0145) * 128 * 128 / 8
    with pytest.raises(
        InvalidBitstream, match=r"expected 3\d\d to .* bytes of hyper-latents.*8192x8192.*got 40 and 10"
    ):
        check_streams(bitstream(height=8192, width=8192, hyper=bytes(40), latents=bytes(10)), tables, shape_z, shape_y)
    check_streams(bitstream(height=8192, width=8192, hyper=bytes(int(least)), latents=b""), tables, shape_z, shape_y)


def test_more_bytes_than_the_symbols_could_cost_are_refused() -> None:
    tables = from_pmfs([np.array([0.9])], [0])
    with pytest.raises(InvalidBitstream, match="bytes of hyper-latents"):
        check_streams(bitstream(hyper=bytes(2_000)), tables, (1, 1, 1), (1, 4, 4))
    with pytest.raises(InvalidBitstream, match="of latents"):
        check_streams(bitstream(hyper=b"", latents=bytes(2_000)), tables, (1, 1, 1), (1, 4, 4))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 128), st.integers(1, 128))
def test_the_likeliest_picture_of_any_tables_is_never_refused(peaks: list[float], rows: int, columns: int) -> None:
    pmfs = [np.array([(1 - p) / 2, p, (1 - p) / 2]) for p in peaks]
    tables = from_pmfs(pmfs, [-1] * len(peaks))
    shape = (len(peaks), rows, columns)
    modes = np.array([int(tables.offsets[t]) + int(np.argmax(tables.freqs[tables.starts[t] :][: tables.sizes[t] - 1]))
                      for t in range(len(peaks))], np.int32)  # fmt: skip
    indexes = np.repeat(np.arange(len(peaks), dtype=np.uint8), rows * columns)
    hyper = rans.encode(modes[indexes], indexes, tables)
    check_streams(bitstream(hyper=hyper, latents=b""), tables, shape, (8, 4 * rows, 4 * columns))


def test_the_most_expensive_picture_is_never_refused() -> None:
    tables = from_pmfs([np.array([1.0])], [0])
    indexes = np.zeros(500, np.uint8)
    dear = rans.encode(np.full(500, -(2**31), np.int32), indexes, tables)
    check_streams(bitstream(hyper=dear, latents=dear), tables, (1, 20, 25), (1, 20, 25))
