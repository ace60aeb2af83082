"""What a coded picture costs: the bits of the picture itself, read from the stream an encoder really wrote.

An anchor's file carries things a transmission sends once (parameter sets) or not at all (delimiters, SEI), so they are
left out of its rate; Sightline's rate keeps its per-frame header. The whole file's size is reported beside it.

* HEVC, Annex B (H.265 table 7-1): VCL NAL units (0..31). Left out: VPS, SPS, PPS, AUD, EOS, EOB, filler, SEI.
* VVC, Annex B (H.266 table 5): VCL NAL units (0..11) and picture headers. Left out: OPI, DCI, VPS, SPS, PPS, APS, AUD,
  EOS, EOB, filler, SEI.
* AV1 (AV1 specification 6.2.2): frame, frame header and tile group OBUs. Left out: sequence header, delimiter,
  metadata, padding.
* JPEG (T.81 table B.1): Huffman tables (made for the picture), scan header, entropy-coded data. Left out: SOI, APPn,
  COM, DQT, SOF, EOI.

A NAL unit counts with its header and emulation prevention, without its start code (a delimiter); an OBU with its header
and size field. Leaving out the VVC adaptation parameter sets, which do carry picture data, favours the anchor by
0.1 to 1 %.
"""

from shared.errors import InvalidInput

_VVC_PICTURE_HEADER = 19
_OBU_COUNTED = frozenset({3, 4, 6, 7, 8})  # frame header, tile group, frame, redundant frame header, tile list
_JPEG_SOI, _JPEG_EOI, _JPEG_SOS, _JPEG_DHT = 0xD8, 0xD9, 0xDA, 0xC4


def nal_units(stream: bytes) -> list[bytes]:
    """The NAL units of an Annex B byte stream, without start codes and trailing zeros.

    Raises InvalidInput where bytes other than zeros stand before the first start code, as they do when an encoder's log
    is mixed into its output.
    """
    starts = []
    at = stream.find(b"\x00\x00\x01")
    if at < 0 or stream[:at].strip(b"\x00"):
        raise InvalidInput(f"not an Annex B stream: begins with {stream[:12]!r}, expected a start code")
    while at >= 0:
        starts.append(at + 3)
        at = stream.find(b"\x00\x00\x01", at + 3)
    ends = [start - 3 for start in starts[1:]] + [len(stream)]
    # A NAL unit never ends in a zero byte, so zeros at its end belong to the next start code.
    return [stream[start:end].rstrip(b"\x00") for start, end in zip(starts, ends, strict=True)]


def hevc_picture_bits(stream: bytes) -> int:
    """Bits of the VCL NAL units of an H.265 stream."""
    return 8 * sum(len(unit) for unit in nal_units(stream) if (unit[0] >> 1) & 0x3F < 32)


def vvc_picture_bits(stream: bytes) -> int:
    """Bits of the VCL NAL units and picture headers of an H.266 stream."""
    units = ((unit[1] >> 3, len(unit)) for unit in nal_units(stream))
    return 8 * sum(size for kind, size in units if kind < 12 or kind == _VVC_PICTURE_HEADER)


def av1_picture_bits(stream: bytes) -> int:
    """Bits of the frame OBUs of an AV1 low-overhead stream. Raises InvalidInput if the OBUs do not add up."""
    total, at = 0, 0
    while at < len(stream):
        header = stream[at]
        if header & 0x82 != 0x02:  # forbidden bit clear, size field present
            raise InvalidInput(f"not an AV1 low-overhead stream: OBU header 0x{header:02x} at byte {at}")
        begin = at
        at += 2 if header & 0x04 else 1
        size, at = _leb128(stream, at)
        at += size
        if at > len(stream):
            raise InvalidInput(f"AV1 stream ends inside an OBU: {len(stream)} bytes, needs {at}")
        if (header >> 3) & 0x0F in _OBU_COUNTED:
            total += at - begin
    return 8 * total


def jpeg_picture_bits(stream: bytes) -> int:
    """Bits of the Huffman tables, scan headers and entropy-coded data of a JPEG file."""
    if stream[:2] != bytes([0xFF, _JPEG_SOI]):
        raise InvalidInput(f"not a JPEG file: begins with {stream[:4]!r}")
    total, at = 0, 2
    while at + 4 <= len(stream):
        kind = stream[at + 1]
        if kind == _JPEG_EOI:
            break
        segment = 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if kind in (_JPEG_DHT, _JPEG_SOS):
            total += segment
        at += segment
        if kind == _JPEG_SOS:
            end = _end_of_scan(stream, at)
            total += end - at
            at = end
    return 8 * total


def _end_of_scan(stream: bytes, at: int) -> int:
    """Where the next marker other than a stuffed 0xFF00 or a restart begins."""
    while True:
        at = stream.find(b"\xff", at)
        if at < 0 or at + 1 >= len(stream):
            return len(stream)
        follower = stream[at + 1]
        if follower != 0 and not 0xD0 <= follower <= 0xD7:
            return at
        at += 2


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    value = 0
    for position in range(8):
        if at >= len(stream):
            raise InvalidInput("AV1 stream ends inside an OBU's size field")
        byte = stream[at]
        at += 1
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at
    raise InvalidInput("AV1 OBU size field longer than 8 bytes")
