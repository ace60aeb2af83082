"""The pictures that benchmarks code: Kodak's where they are, else scikit-image's photographs, at any size."""

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.codec.types import Frame
from shared.errors import NotFound

Rgb = NDArray[np.uint8]  # [height, width, 3]
VGA, SMALL, FULL_HD = (480, 640), (384, 640), (1080, 1920)  # height, width


def data_folder() -> Path:
    """Where larger data may lie: SIGHTLINE_DATA, or ../shared/data beside the checkout."""
    return Path(os.environ.get("SIGHTLINE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@cache
def photographs() -> tuple[Rgb, ...]:
    """At least three, landscape, with natural statistics. Raises NotFound."""
    files = sorted((data_folder() / "kodak").glob("*.png"))
    if files:
        found = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        return tuple(rgb for rgb in found if rgb.shape[1] > rgb.shape[0])
    try:
        import skimage.data
    except ImportError as error:
        raise NotFound("photographs: set SIGHTLINE_DATA to a folder with kodak/, or install scikit-image") from error
    return skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()


def picture(size: tuple[int, int], index: int = 0) -> Rgb:
    """A photograph at `size` (height, width): a crop, or a mosaic of photographs where none is so large, since an
    enlarged one would be too smooth."""
    height, width = size
    known = photographs()
    rows = []
    while sum(row.shape[0] for row in rows) < height:
        row: list[Rgb] = []
        while sum(part.shape[1] for part in row) < width:
            row.append(known[index % len(known)])
            index += 1
        lowest = min(part.shape[0] for part in row)
        rows.append(np.concatenate([part[:lowest] for part in row], axis=1)[:, :width])
    return np.ascontiguousarray(np.concatenate(rows)[:height])


def frame(size: tuple[int, int], index: int = 0) -> Frame:
    return Frame(picture(size, index))


def jpeg(rgb: Rgb, quality: int = 85) -> bytes:
    """As a camera would give it."""
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=quality)
    return out.getvalue()


def size_name(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
