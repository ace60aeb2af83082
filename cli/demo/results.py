"""What a demo run found out: plain data between the run, the table and the page.

`Found` boxes are corners in pixels of the original picture; times are milliseconds, bytes are whole files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MATCH_IOU = 0.5  # overlap at which a detection counts as the same object, as in AP50

WAY = {
    "edge": ("read", "edge queue", "analyse", "entropy code", "spool"),
    "wire": ("wire and rest",),
    "decoder": ("cloud queue", "entropy decode", "synthesise"),
    "detector": ("detect",),
}
"""Where a frame's time goes, in the order of its way: place -> stages."""
STAGES = tuple(stage for stages in WAY.values() for stage in stages)

Rgb = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Found:
    """One object. `box`: x_min, y_min, x_max, y_max. `score` in [0, 1]."""

    box: tuple[float, float, float, float]
    score: float
    category_id: int
    label: str


@dataclass(frozen=True, slots=True)
class Coded:
    """One picture at one quality, after the way through edge and cloud.

    `rgb`: uint8 [height, width, 3], as decoded. `sent_bytes`: the coded picture's file form. `found`: what
    came back through Subscribe. `stages_ms`: milliseconds of each of STAGES.
    """

    quality: float
    sent_bytes: int
    rgb: Rgb
    found: Sequence[Found]
    stages_ms: Mapping[str, float]
    round_trip_ms: float


@dataclass(frozen=True, slots=True)
class Picture:
    """One input. `jpeg_bytes`: its own file if that is a JPEG (`jpeg_is_own`), otherwise the size at Pillow quality 85.

    `rgb`: uint8 [height, width, 3]. `found`: by the same task model on the original. `coded`: by rising quality.
    """

    source: Path
    rgb: Rgb
    jpeg_bytes: int
    jpeg_is_own: bool
    found: Sequence[Found]
    coded: Sequence[Coded]

    @property
    def title(self) -> str:
        return self.source.stem.replace("_", " ").replace("-", " ").strip().capitalize() or self.source.name

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])

    def bpp(self, coded: Coded) -> float:
        return 8 * coded.sent_bytes / (self.width * self.height)

    def ratio(self, coded: Coded) -> float:
        return self.jpeg_bytes / coded.sent_bytes


@dataclass(frozen=True, slots=True)
class Demo:
    """A whole run. `shown_quality`: the one the table has and the page opens with."""

    pictures: Sequence[Picture]
    qualities: Sequence[float]
    shown_quality: float
    codec: str
    model_id: str
    task: str
    version: str

    def coded(self, quality: float) -> list[Coded]:
        """Every picture at one quality, in the order of `pictures`."""
        return [next(c for c in picture.coded if c.quality == quality) for picture in self.pictures]


def match(before: Sequence[Found], after: Sequence[Found]) -> list[int | None]:
    """For each of `before` the index in `after` of the same object, or None. Same category, overlap of at
    least MATCH_IOU; greedy by falling overlap, so that no object is matched twice."""
    pairs = sorted(
        (
            (overlap(one.box, two.box), i, j)
            for i, one in enumerate(before)
            for j, two in enumerate(after)
            if one.category_id == two.category_id
        ),
        reverse=True,
    )
    matched: list[int | None] = [None] * len(before)
    taken: set[int] = set()
    for iou, i, j in pairs:
        if iou >= MATCH_IOU and matched[i] is None and j not in taken:
            matched[i] = j
            taken.add(j)
    return matched


def overlap(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    union = (one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - both
    return both / union
