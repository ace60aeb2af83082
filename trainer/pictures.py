"""Batches of pictures for task networks that have no frozen part worth caching: torchvision's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trainer.data import Example
from trainer.early_cache import View, view_targets


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """`images`: float [3, H, W] in [0, 1] of any sizes. `targets`: torchvision's. `image_ids`: N of COCO's."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    image_ids: tuple[int, ...]

    def losses(self, model: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(self.images, self.targets)
        return losses


class PictureBatches:
    """Draws pictures, mirrored at random. Deterministic given `rng`. `ignore`: the network knows ignored regions."""

    def __init__(
        self,
        examples: list[Example],
        order: Iterator[int],
        size: int,
        rng: np.random.Generator,
        *,
        masks: bool,
        device: str,
        ignore: bool,
    ) -> None:
        self._examples, self._order, self._size, self._rng = examples, order, size, rng
        self._masks, self._device, self._ignore = masks, device, ignore

    def draw(self) -> PictureBatch:
        chosen = [self._examples[next(self._order)] for _ in range(self._size)]
        images, targets = [], []
        for example in chosen:
            mirrored = bool(self._rng.random() < 0.5)
            image = example.read().to(self._device).float() / 255
            images.append(image.flip(2) if mirrored else image)
            view = View(example.height, example.width, mirrored, 0, 0, example.height, example.width)
            target = view_targets(example, view, masks=self._masks)
            if not self._ignore:
                target.pop("ignore")  # torchvision's own transform would not resize it
            targets.append({k: v.to(self._device) for k, v in target.items()})
        return PictureBatch(images, targets, tuple(e.image_id for e in chosen))
