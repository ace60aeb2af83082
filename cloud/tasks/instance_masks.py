"""Instance masks at a picture's size, decided before they are laid there.

torchvision lays every mask's probabilities into a float32 picture of its own, and whoever wants masks compares them
all: for a hundred masks of 1920x1080 that is 830 MB written, read and copied. Here each is compared with the threshold
at the size of its box, and one byte a pixel is laid. The masks are the same, bit by bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from cloud.tasks.adopting import Adopting

THRESHOLD = 0.5


class DecidedMasks(Adopting, GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's transform, which gives "masks" as bool [N, height, width] instead of float32 [N, 1, ...]."""

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        if self.training:
            return result
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, own, size in zip(result, masks, original_image_sizes, strict=True):
            if own is not None:
                found["masks"] = decided(own, found["boxes"], size)
        return result


def decided(probabilities: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """`probabilities` [N, 1, M, M] within `boxes` [N, 4], xyxy in pixels -> bool [N, *size], as torchvision's
    `paste_masks_in_image` and a comparison give it."""
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=probabilities.device)
    padded, scale = expand_masks(probabilities, padding=1)
    corners: Any = expand_boxes(boxes, scale).to(torch.int64).tolist()
    for mask, probability, (left, top, right, bottom) in zip(masks, padded, corners, strict=True):
        own = functional.interpolate(
            probability[None], size=(max(bottom - top + 1, 1), max(right - left + 1, 1)), mode="bilinear"
        )[0, 0]
        x0, x1 = max(left, 0), min(right + 1, width)
        y0, y1 = max(top, 0), min(bottom + 1, height)
        mask[y0:y1, x0:x1] = own[y0 - top : y1 - top, x0 - left : x1 - left] > THRESHOLD
    return masks
