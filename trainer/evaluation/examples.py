"""Example pictures at equal bits: what JPEG, VVC and Sightline leave of a picture, and what a network finds in it.

Only for photographs that may be passed on; pictures derived from COCO may not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from cloud.tasks.types import Detections, TaskModel
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.evaluation.anchors import Anchor, Point, Rgb
from trainer.evaluation.pictures import read_rgb

SHOWN_SCORE = 0.5
JPEG_QUALITIES = range(95, 0, -1)  # fine to coarse
VVC_QPS = range(20, 64)


@dataclass(frozen=True, slots=True)
class Example:
    """One way through: `rgb` as decoded, `bits` it cost."""

    label: str
    bits: int
    rgb: Rgb


def at_most(anchor: Anchor, rgb: Rgb, bits: int, quantisers: Sequence[int], scales: Sequence[int]) -> Example | None:
    """The anchor's costliest coding that costs at most `bits`; `quantisers` from fine to coarse.

    Sizes are tried from large to small, so the picture is made smaller only where no quantiser reaches the budget.
    None if nothing is cheap enough.
    """
    for scale in sorted(scales, reverse=True):
        low, high, best = 0, len(quantisers) - 1, None
        while low <= high:
            middle = (low + high) // 2
            point = Point(quantisers[middle], scale)
            coded = anchor.encode(rgb, point)
            if coded.picture_bits <= bits:
                best, high = (point, coded), middle - 1
            else:
                low = middle + 1
        if best is not None:
            point, coded = best
            decoded = anchor.decode(coded.data, point, *rgb.shape[:2])
            return Example(f"{anchor.name} {point}", coded.picture_bits, decoded)
    return None


def examples_of(
    picture: Path, codec: Codec, quality: float, anchors: Sequence[tuple[Anchor, Sequence[int]]]
) -> list[Example]:
    """The original, Sightline at `quality`, and each anchor (with the quantisers it may take) at no more bits."""
    rgb = read_rgb(picture)
    bitstream = codec.encode(Frame(rgb), quality)
    bits = 8 * len(to_bytes(bitstream))
    ours = Example(f"Sightline q{quality:g}", bits, codec.decode(bitstream).rgb)
    found = [at_most(anchor, rgb, bits, quantisers, anchor.scales) for anchor, quantisers in anchors]
    return [Example("original", 8 * picture.stat().st_size, rgb), *[e for e in found if e is not None], ours]


def draw(example: Example, task: TaskModel) -> Rgb:
    """The decoded picture with what `task` finds in it at `SHOWN_SCORE`."""
    picture = torch.from_numpy(np.ascontiguousarray(example.rgb.transpose(2, 0, 1)))
    [found] = task.predict([picture], min_score=SHOWN_SCORE)
    drawn = picture
    if len(found):
        if found.masks is not None:
            drawn = draw_segmentation_masks(drawn, found.masks, alpha=0.4)
        drawn = draw_bounding_boxes(drawn, found.boxes, labels=_captions(found), colors="yellow", width=3)
    return drawn.permute(1, 2, 0).numpy()


def _captions(found: Detections) -> list[str]:
    return [f"{label} {score:.2f}" for label, score in zip(found.labels, found.scores.tolist(), strict=True)]


def save_panel(rows: Sequence[Sequence[Example]], task: TaskModel, path: Path) -> None:
    """One picture a row, one coding a column, with bits per pixel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(map(len, rows))
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(3.4 * columns, 2.6 * len(rows)), layout="constrained", squeeze=False
    )
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row:
            axes.axis("off")
        for axes, example in zip(axes_row, row, strict=False):
            axes.imshow(draw(example, task))
            pixels = example.rgb.shape[0] * example.rgb.shape[1]
            axes.set_title(f"{example.label}, {example.bits / pixels:.3f} bpp", fontsize=8)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88} if path.suffix in (".jpg", ".jpeg") else None)
    plt.close(figure)
