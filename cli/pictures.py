"""Picture files at the command line: the services' own border, with its limits as wide as the codec goes."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.codec.types import Frame

JPEG_START = b"\xff\xd8\xff"
MADE_BY = "Sightline"  # the Software text of a PNG, by which a later run knows its own pictures


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


def encode_png(rgb: "NDArray[np.uint8]") -> bytes:
    """PNG of uint8 [height, width, 3], marked as made here."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", MADE_BY)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", pnginfo=info, compress_level=3)
    return buffer.getvalue()
