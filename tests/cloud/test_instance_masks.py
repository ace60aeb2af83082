"""Masks decided at their boxes' size are those of torchvision's own way, bit by bit."""

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from cloud.tasks.instance_masks import THRESHOLD, DecidedMasks, decided

SIZE = (97, 141)
BOXES = {
    "within": [[10.2, 20.7, 60.1, 90.9]],
    "over every border": [[-7.5, -3.2, 150.0, 120.0]],
    "of no size": [[30.0, 40.0, 30.0, 40.0]],
    "at the last pixel": [[139.6, 95.9, 141.0, 97.0]],
    "many": [[float(x), float(y), x + 3.7 * y, y + 0.9 * x] for x in range(0, 140, 7) for y in range(0, 90, 11)],
    "none": [],
}


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("side", [28, 14])
def test_masks_are_torchvisions(kind: str, side: int) -> None:
    torch.manual_seed(len(kind) + side)
    boxes = torch.tensor(BOXES[kind]).reshape(-1, 4)
    probabilities = torch.rand(len(boxes), 1, side, side)
    expected = paste_masks_in_image(probabilities, boxes, SIZE)[:, 0] > THRESHOLD
    made = decided(probabilities, boxes, SIZE)
    assert made.dtype == torch.bool
    assert torch.equal(made, expected)


def test_a_transform_that_is_adopted_gives_the_same_boxes_and_decided_masks() -> None:
    torch.manual_seed(1)
    plain = GeneralizedRCNNTransform(64, 128, [0.5] * 3, [0.2] * 3).eval()
    boxes, probabilities = torch.tensor(BOXES["many"]) / 3, torch.rand(len(BOXES["many"]), 1, 28, 28)
    [expected] = plain.postprocess([{"boxes": boxes, "masks": probabilities}], [(33, 47)], [SIZE])
    [made] = DecidedMasks.adopt(plain).postprocess([{"boxes": boxes, "masks": probabilities}], [(33, 47)], [SIZE])
    assert torch.equal(made["boxes"], expected["boxes"])
    assert torch.equal(made["masks"], expected["masks"][:, 0] > THRESHOLD)
    [alone] = DecidedMasks.adopt(plain).postprocess([{"boxes": boxes}], [(33, 47)], [SIZE])
    assert list(alone) == ["boxes"]
