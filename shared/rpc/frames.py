"""A coded frame and the fields that carry it in an Upload stream: both ways, once for both ends."""

from sightline.v1 import ingest_pb2

from shared.codec.bitstream import payload_crc
from shared.codec.types import Bitstream


def to_upload(coded: Bitstream, *, source_index: int, seq: int, model_index: int) -> ingest_pb2.FrameUpload:
    """The message; its times, token and the like are for the sender to add."""
    return ingest_pb2.FrameUpload(
        source_index=source_index,
        seq=seq,
        model_index=model_index,
        width=coded.width,
        height=coded.height,
        quality_steps=coded.quality,
        hyper=coded.hyper,
        latents=coded.latents,
        symbols_crc=coded.symbols_crc,
        payload_crc=payload_crc(coded),
    )


def from_upload(frame: ingest_pb2.FrameUpload, model_id: str) -> Bitstream:
    """What the message carries, nothing of it checked; `model_id` is what its model index was announced as."""
    return Bitstream(
        model_id=model_id,
        quality=frame.quality_steps,
        height=frame.height,
        width=frame.width,
        hyper=frame.hyper,
        latents=frame.latents,
        symbols_crc=frame.symbols_crc,
    )
