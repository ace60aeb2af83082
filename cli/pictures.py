"""Picture files at the command line: the services' own border, with its limits as wide as the codec goes."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.codec.types import Frame

JPEG_START = b"\xff\xd8\xff"


def read_frame(data: bytes) -> "Frame":
    """A JPEG, PNG or WebP file's pixels. Raises InvalidImage, TooLarge."""
    from edge.images import ImageLimits, decode, open_file
    from shared.codec.types import MAX_SIDE

    return decode(open_file(data, ImageLimits(max_pixels=MAX_SIDE * MAX_SIDE)))


def jpeg_size(data: bytes, frame: "Frame") -> tuple[int, bool]:
    """What a picture weighs as JPEG, in bytes, and whether that is its own file: otherwise Pillow at quality 85."""
    if data.startswith(JPEG_START):
        return len(data), True
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame.rgb).save(buffer, "JPEG", quality=85)
    return buffer.tell(), False
