"""Small videos that tests make themselves, with FFmpeg through PyAV."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def moving_square(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """uint8 [height, width, 3] pictures: a bright square that moves 2 pixels a picture over a dark ground."""
    pictures = []
    for i in range(count):
        rgb = np.full((height, width, 3), 40, np.uint8)
        left = (2 * i) % (width - 16)
        rgb[24:40, left : left + 16] = 220
        pictures.append(rgb)
    return pictures


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: int = 20, **options: str) -> Path:
    """H.264 in MP4, nearly lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4", "preset": "ultrafast", **options})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for rgb in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return path
