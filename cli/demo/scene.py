"""A moving scene made from one photograph: a window that wanders over it, as a camera on a slow pan would see it."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cli.demo.results import Rgb
from cli.pictures import read_frame

SIZE = (640, 480)  # width and height, pixels
ROUND_S = 40.0  # until the scene begins again
NEAREST, FARTHEST = 0.62, 0.98  # of the photograph, seen at once


class Scene:
    """The photograph at `path`. Raises InvalidImage, TooLarge."""

    def __init__(self, path: Path) -> None:
        self._photograph = Image.fromarray(read_frame(path.read_bytes()).rgb)

    def at(self, time_s: float) -> Rgb:
        """What is seen at a time, uint8 [480, 640, 3]; the same every ROUND_S seconds."""
        turn = 2 * math.pi * (time_s % ROUND_S) / ROUND_S
        wide, high = self._photograph.size
        share = FARTHEST - (FARTHEST - NEAREST) * (0.5 - 0.5 * math.cos(2 * turn))
        scale = share * min(wide / SIZE[0], high / SIZE[1])
        width, height = SIZE[0] * scale, SIZE[1] * scale
        left = (wide - width) * (0.5 + 0.5 * math.sin(turn))
        top = (high - height) * (0.5 + 0.5 * math.sin(2 * turn))
        box = (left, top, min(left + width, wide), min(top + height, high))
        return np.asarray(self._photograph.resize(SIZE, Image.Resampling.BILINEAR, box=box))


def camera_names(paths: list[Path]) -> Iterator[str]:
    """A name that a camera may have for each file, from the file's own, no two alike."""
    taken: set[str] = set()
    for path in paths:
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in path.stem)
        name = base = plain.strip("-")[:56] or "camera"
        number = 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        yield name
