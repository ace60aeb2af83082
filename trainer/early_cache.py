"""Batches of cached early features, so that an epoch costs only the part of the trunk that is trained.

The first blocks of the bundled trunk are frozen: their output is computed once for an image and once for its mirror
image, each at a scale and with a small change of brightness, contrast and colour drawn for it alone, kept in memory
as bfloat16, and cropped afresh each time at multiples of 8 pixels, where a crop of the features is a crop of the
image but for its border. Two views an image is what pays in a run of ten epochs: computing a view costs half as much
as training on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cloud.tasks.bundled import LONG_SIDE, BundledRCNN
from shared.codec.precision import fast_dtype
from trainer.data import Example

STRIDE = 8
SHORT_SIDES = (224, 320, 416)  # pixels; 320 is what the network sees afterwards
SCALE_ODDS = (0.2, 0.5, 0.3)
CANVAS = {224: (224, 320), 320: (320, 448), 416: (320, 448)}  # short and long side of a batch, multiples of 32
MIN_VISIBLE = 0.35  # an object of which less is left after cropping is ignored, not background


@dataclass(frozen=True, slots=True)
class EarlyBatch:
    """`c3`: bfloat16 [N, 32, h, w]. `sizes`: (height, width) in pixels of the part that is picture. `targets`:
    torchvision's, with "ignore". `image_ids`: N of COCO's."""

    c3: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    image_ids: tuple[int, ...]

    def losses(self, model: BundledRCNN) -> dict[str, Tensor]:
        c3 = self.c3 if torch.is_autocast_enabled("cpu") else self.c3.float()
        return model.losses_from_early(c3, self.sizes, self.targets)


class EarlyFeatures:
    """Early features of `examples`, computed when first asked for. `budget_bytes` bounds what is kept."""

    def __init__(self, model: BundledRCNN, examples: list[Example], *, budget_bytes: int, seed: int) -> None:
        self._model, self._examples = model, examples
        self._kept: dict[tuple[int, bool], Tensor] = {}
        self._room = budget_bytes
        self._rng = np.random.default_rng(seed)
        self._short_sides = self._rng.choice(SHORT_SIDES, (len(examples), 2), p=SCALE_ODDS)

    def short_side(self, index: int, mirrored: bool) -> int:
        """Pixels to which the image's, or its mirror image's, short side is resized."""
        return int(self._short_sides[index, int(mirrored)])

    def get(self, index: int, mirrored: bool) -> tuple[Tensor, int, int]:
        """c3 [32, h, w] of the whole image with the height and width it was resized to, pixels."""
        example = self._examples[index]
        short_side = self.short_side(index, mirrored)
        scale = min(short_side / min(example.height, example.width), LONG_SIDE / max(example.height, example.width))
        height, width = max(1, round(example.height * scale)), max(1, round(example.width * scale))
        key = (index, mirrored)
        if key not in self._kept:
            c3 = self._compute(example, height, width, mirrored)
            size = c3.numel() * c3.element_size()
            if size > self._room:
                return c3, height, width
            self._room -= size
            self._kept[key] = c3
        return self._kept[key], height, width

    @torch.no_grad()
    def _compute(self, example: Example, height: int, width: int, mirrored: bool) -> Tensor:
        image = example.read().float().div_(255)[None]
        image = functional.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
        image = self._jitter(image.flip(3) if mirrored else image)
        mean = image.new_tensor(self._model.transform.image_mean).view(1, 3, 1, 1)
        std = image.new_tensor(self._model.transform.image_std).view(1, 3, 1, 1)
        image = functional.pad((image - mean) / std, (0, -width % 32, 0, -height % 32))
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype(torch.device("cpu")) == torch.bfloat16):
            c3 = self._model.backbone.early(image.contiguous(memory_format=torch.channels_last))
        return c3[0].to(torch.bfloat16)[:, : -(-height // STRIDE), : -(-width // STRIDE)].clone()

    def _jitter(self, image: Tensor) -> Tensor:
        """Brightness, contrast, saturation and colour balance, a small random change of each."""
        brightness, contrast, saturation = (1 + self._rng.uniform(-0.25, 0.25, 3)).tolist()
        balance = image.new_tensor(1 + self._rng.uniform(-0.06, 0.06, 3)).view(1, 3, 1, 1)
        mean = image.mean()
        grey = image.mean(1, keepdim=True)
        image = grey + (image - grey) * saturation
        image = mean + (image - mean) * contrast
        return (image * brightness * balance).clamp(0, 1)


class EarlyBatches:
    """Draws batches of one orientation and canvas each, cropped at random. Deterministic given `rng`."""

    def __init__(
        self,
        early: EarlyFeatures,
        examples: list[Example],
        order: Iterator[int],
        size: int,
        rng: np.random.Generator,
        *,
        masks: bool,
    ) -> None:
        self._early, self._examples, self._order, self._size, self._rng = early, examples, order, size, rng
        self._masks = masks
        self._waiting: dict[tuple[int, int], list[tuple[int, bool]]] = {}

    def draw(self) -> EarlyBatch:
        while True:
            index = next(self._order)
            mirrored = bool(self._rng.random() < 0.5)
            short, long = CANVAS[self._early.short_side(index, mirrored)]
            example = self._examples[index]
            canvas = (short, long) if example.width >= example.height else (long, short)
            group = self._waiting.setdefault(canvas, [])
            group.append((index, mirrored))
            if len(group) == self._size:
                del self._waiting[canvas]
                return self._assemble(group, *canvas)

    def _assemble(self, views: list[tuple[int, bool]], height: int, width: int) -> EarlyBatch:
        c3 = torch.zeros(len(views), 32, height // STRIDE, width // STRIDE, dtype=torch.bfloat16)
        c3 = c3.contiguous(memory_format=torch.channels_last)
        sizes, targets = [], []
        for row, (index, mirrored) in zip(c3, views, strict=True):
            feature, full_height, full_width = self._early.get(index, mirrored)
            top = self._offset(feature.shape[1] - row.shape[1])
            left = self._offset(feature.shape[2] - row.shape[2])
            part = feature[:, top : top + row.shape[1], left : left + row.shape[2]]
            row[:, : part.shape[1], : part.shape[2]] = part
            size = (min(full_height - top * STRIDE, height), min(full_width - left * STRIDE, width))
            view = View(full_height, full_width, mirrored, left * STRIDE, top * STRIDE, *size)
            sizes.append(size)
            targets.append(view_targets(self._examples[index], view, masks=self._masks))
        return EarlyBatch(c3, sizes, targets, tuple(self._examples[i].image_id for i, _ in views))

    def _offset(self, spare: int) -> int:
        return int(self._rng.integers(0, spare + 1)) if spare > 0 else 0


@dataclass(frozen=True, slots=True)
class View:
    """How a picture is shown, all in pixels: resized to full_height x full_width, mirrored, then cropped."""

    full_height: int
    full_width: int
    mirrored: bool
    left: int
    top: int
    height: int
    width: int


def view_targets(example: Example, view: View, *, masks: bool = False) -> dict[str, Tensor]:
    """The example's targets in the view's pixels. Objects that are mostly cut away are ignored."""
    boxes, visible = boxes_in_view(example.boxes, example, view)
    crowds, some = boxes_in_view(example.ignore, example, view)
    kept = visible >= MIN_VISIBLE
    cut = (visible > 0) & ~kept
    target = {
        "boxes": torch.from_numpy(boxes[kept]),
        "labels": torch.from_numpy(example.labels[kept]),
        "ignore": torch.from_numpy(np.concatenate([crowds[some > 0], boxes[cut]])),
    }
    if masks:
        every = torch.from_numpy(example.masks()[kept])[:, None]
        full = functional.interpolate(every.float(), size=(view.full_height, view.full_width), mode="nearest")[:, 0]
        full = full.flip(2) if view.mirrored else full
        target["masks"] = full[:, view.top : view.top + view.height, view.left : view.left + view.width].byte()
        target["has_mask"] = torch.tensor([s is not None for s in example.segments], dtype=torch.bool)[kept]
    return target


def boxes_in_view(
    boxes: NDArray[np.float32], example: Example, view: View
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes in the view's pixels, and the share of each that is in it (0 where less than 2 pixels are left)."""
    scaled = boxes * np.array([view.full_width / example.width, view.full_height / example.height] * 2, np.float32)
    if view.mirrored:
        scaled[:, [0, 2]] = view.full_width - scaled[:, [2, 0]]
    scaled -= np.array([view.left, view.top] * 2, np.float32)
    clipped = scaled.copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, view.width)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, view.height)
    sides, whole = clipped[:, 2:] - clipped[:, :2], scaled[:, 2:] - scaled[:, :2]
    share = sides.prod(1) / np.maximum(whole.prod(1), 1e-6)
    return clipped, np.where((sides >= 2).all(1), share, 0).astype(np.float32)
