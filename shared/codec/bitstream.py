"""Byte form of a coded frame: the `.slc` file, and the checks any carrier of the two streams makes before work.

    magic "SLC"  version u8  model id, first 4 bytes  quality u16  width varint  height varint
    symbols_crc u32  length of hyper varint  length of latents varint  hyper  latents  crc u32

Integers are little-endian, varints are LEB128 in their shortest form. `crc` is the CRC-32C (Castagnoli, RFC 3720) of
every byte before it and is checked before any other work; `symbols_crc` goes over header fields and decoded symbols
and is checked after, which catches what a sound payload hides: other tables, other arithmetic. What is not stream is
25 to 29 bytes. 4 bytes of the model id tell apart whatever one process loads; should two begin alike, neither is taken.
Version 1, which is read as well, has 6.

Inside an Upload stream the fields travel in protobuf; `payload_crc`, `check_frame` and `check_streams` are for both.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import crc32c
import numpy as np
from numpy.typing import NDArray

from shared.codec.tables import EntropyTables
from shared.codec.types import MAX_SIDE, QUALITY_MAX, QUALITY_MIN, Bitstream
from shared.errors import InvalidBitstream, TooLarge, UnknownModel

MAGIC = b"SLC"
VERSION = 2
PREFIX_BYTES = {1: 6, 2: 4}  # of the model id, by version
MODEL_PREFIX_BYTES = PREFIX_BYTES[VERSION]
MAX_PIXELS = MAX_SIDE * MAX_SIDE

_FIXED = {version: struct.Struct(f"<3sB{prefix}sH") for version, prefix in PREFIX_BYTES.items()}
_SHORTEST = _FIXED[VERSION].size + 1 + 1 + 4 + 1 + 1 + 4
_VARINT_BYTES = 5  # enough for any length that a uint32 can hold
_SYMBOL_BITS_MAX = 81  # an escape of 14 bits and 67 of Exp-Golomb


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before its model is known. `model_prefix`: hex, the first bytes of the model id."""

    version: int
    model_prefix: str
    quality: int
    height: int
    width: int
    symbols_crc: int
    hyper_bytes: int
    latents_bytes: int


def to_bytes(bitstream: Bitstream) -> bytes:
    """The `.slc` form."""
    body = b"".join(
        (
            _FIXED[VERSION].pack(
                MAGIC, VERSION, bytes.fromhex(bitstream.model_id)[:MODEL_PREFIX_BYTES], bitstream.quality
            ),
            _varint(bitstream.width),
            _varint(bitstream.height),
            struct.pack("<I", bitstream.symbols_crc),
            _varint(len(bitstream.hyper)),
            _varint(len(bitstream.latents)),
            bitstream.hyper,
            bitstream.latents,
        )
    )
    return body + struct.pack("<I", crc32c.crc32c(body))


def from_bytes(data: bytes, known_model_ids: Collection[str], *, max_pixels: int = MAX_PIXELS) -> Bitstream:
    """Check and split a `.slc` file. Nothing is decoded and nothing larger than `data` is allocated.

    Raises InvalidBitstream where it is damaged, TooLarge above the limits on sides and pixels, UnknownModel where its
    model is not among `known_model_ids` (hex).
    """
    header, start = _read_header(data)
    check_frame(header.quality, header.height, header.width, max_pixels=max_pixels)
    matches = sorted(i for i in set(known_model_ids) if i.lower().startswith(header.model_prefix))
    if len(matches) != 1:
        known = ", ".join(sorted(known_model_ids)) or "no model"
        raise UnknownModel(f"the file is for model {header.model_prefix}..., expected exactly one match in: {known}")
    middle = start + header.hyper_bytes
    return Bitstream(
        model_id=matches[0],
        quality=header.quality,
        height=header.height,
        width=header.width,
        hyper=bytes(data[start:middle]),
        latents=bytes(data[middle : middle + header.latents_bytes]),
        symbols_crc=header.symbols_crc,
    )


def read_header(data: bytes) -> Header:
    """The header of a whole, undamaged file of any model. Raises InvalidBitstream."""
    return _read_header(data)[0]


def check_frame(quality: int, height: int, width: int, *, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse what no encoder writes. `quality` in 1/256 steps. Raises InvalidBitstream, TooLarge."""
    if not QUALITY_MIN <= quality <= QUALITY_MAX:
        raise InvalidBitstream(f"quality must be in [{QUALITY_MIN}, {QUALITY_MAX}] steps of 1/256, got {quality}")
    if width < 1 or height < 1:
        raise InvalidBitstream(f"frame sides must be at least 1 pixel, got {width}x{height}")
    if width > MAX_SIDE or height > MAX_SIDE:
        raise TooLarge(f"frame sides must be at most {MAX_SIDE} pixels, got {width}x{height}")
    if width * height > max_pixels:
        raise TooLarge(f"expected at most {max_pixels} pixels, got {width}x{height} = {width * height}")


def check_streams(
    bitstream: Bitstream, tables_z: EntropyTables, z_shape: tuple[int, int, int], y_shape: tuple[int, int, int]
) -> None:
    """Hold the claimed symbol counts against the streams' lengths, before anything is allocated for them.

    The likeliest symbol of each hyper channel's table still costs a known fraction of a bit, so a hyper stream of few
    bytes cannot be that of a large frame. (Latents may cost nothing: all of them may be skipped.) 3 % and 8 bytes are
    left for how far a coder can come below the ideal length. No symbol costs more than 81 bits. Raises
    InvalidBitstream.
    """
    channels, rows, columns = z_shape
    least = int(0.97 * float(tables_z.least_bits[:channels].sum()) * rows * columns / 8) - 8
    most_z, most_y = (prod(shape) * _SYMBOL_BITS_MAX // 8 + 1024 for shape in (z_shape, y_shape))
    if not least <= len(bitstream.hyper) <= most_z or len(bitstream.latents) > most_y:
        raise InvalidBitstream(
            f"expected {max(least, 0)} to {most_z} bytes of hyper-latents and at most {most_y} of latents for "
            f"{bitstream.width}x{bitstream.height} pixels, got {len(bitstream.hyper)} and {len(bitstream.latents)}"
        )


def payload_crc(bitstream: Bitstream) -> int:
    """CRC-32C over width, height, quality, symbols_crc and length of hyper as uint32, then hyper and latents."""
    fields = (bitstream.width, bitstream.height, bitstream.quality, bitstream.symbols_crc, len(bitstream.hyper))
    return crc32c.crc32c(bitstream.latents, crc32c.crc32c(bitstream.hyper, crc32c.crc32c(struct.pack("<5I", *fields))))


def symbols_crc(quality: int, height: int, width: int, z_hat: NDArray[np.int32], symbols: NDArray[np.int32]) -> int:
    """CRC-32C over quality, height and width as uint32, then hyper-latents and latents as int32, all little-endian."""
    crc = crc32c.crc32c(struct.pack("<3I", quality, height, width))
    for array in (z_hat, symbols):
        crc = crc32c.crc32c(np.ascontiguousarray(array, "<i4").reshape(-1).view(np.uint8), crc)  # type: ignore[arg-type]
    return crc


def _read_header(data: bytes) -> tuple[Header, int]:
    """The header and where the streams begin."""
    if len(data) < _SHORTEST:
        raise InvalidBitstream(f"expected at least {_SHORTEST} bytes of a .slc file, got {len(data)}")
    magic, version = bytes(data[:3]), data[3]
    if magic != MAGIC:
        raise InvalidBitstream(f"expected a .slc file that begins with {MAGIC!r}, got {magic!r}")
    if version not in _FIXED:
        raise InvalidBitstream(f"expected .slc version 1 or {VERSION}, got {version}")
    _, _, prefix, quality = _FIXED[version].unpack_from(data)
    width, position = _read_varint(data, _FIXED[version].size)
    height, position = _read_varint(data, position)
    if len(data) < position + 4:
        raise InvalidBitstream(f"the .slc header breaks off after {len(data)} bytes")
    (crc_of_symbols,) = struct.unpack_from("<I", data, position)
    hyper_bytes, position = _read_varint(data, position + 4)
    latents_bytes, position = _read_varint(data, position)
    expected = position + hyper_bytes + latents_bytes + 4
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "followed by other bytes"
        raise InvalidBitstream(f"expected {expected} bytes by the file's own lengths, got {len(data)}: it is {what}")
    (crc,) = struct.unpack_from("<I", data, expected - 4)
    actual = crc32c.crc32c(memoryview(data)[: expected - 4])
    if crc != actual:
        raise InvalidBitstream(f"expected CRC-32C {crc:08x} as the file says, its content has {actual:08x}")
    header = Header(version, prefix.hex(), quality, height, width, crc_of_symbols, hyper_bytes, latents_bytes)
    return header, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Value and the position after it. Raises InvalidBitstream where it is not a shortest form of at most 5 bytes."""
    value = 0
    for k in range(_VARINT_BYTES):
        if position + k >= len(data):
            raise InvalidBitstream(f"the .slc header breaks off after {len(data)} bytes")
        byte = data[position + k]
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            if byte == 0 and k:
                break
            return value, position + k + 1
    raise InvalidBitstream(f"expected a varint in its shortest form at byte {position} of the .slc header")
