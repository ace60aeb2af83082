"""Cityscapes, read by torchvision, as an evaluation set: boxes and masks of the thing classes from gtFine.

An instance image holds `label * 1000 + n` for object n of a thing class, and the bare label for a group whose objects
are not told apart: that is a crowd region in COCO's sense. Two label spaces: "cityscapes" numbers the eight thing
classes from 1, for networks fine-tuned on them; "coco" gives COCO's ids, for networks trained there, and counts riders
as persons, which is what COCO calls them.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.datasets import Cityscapes

from shared.errors import InvalidInput
from trainer.evaluation.evaluation_set import EvaluationSet, Picture
from trainer.evaluation.matching import Objects

LabelSpace = Literal["coco", "cityscapes"]

# Cityscapes' label -> name, id from 1, COCO's id
THINGS = {
    24: ("person", 1, 1),
    25: ("rider", 2, 1),
    26: ("car", 3, 3),
    27: ("truck", 4, 8),
    28: ("bus", 5, 6),
    31: ("train", 6, 7),
    32: ("motorcycle", 7, 4),
    33: ("bicycle", 8, 2),
}


def load_cityscapes(root: Path, split: str = "val", *, labels: LabelSpace = "coco") -> EvaluationSet:
    """Read `root/leftImg8bit/split` and `root/gtFine/split`. Raises InvalidInput if they are not there or empty."""
    try:
        reader = Cityscapes(str(root), split=split, mode="fine", target_type="instance")
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(f"{root}: expected Cityscapes' leftImg8bit/{split} and gtFine/{split}: {error}") from error
    if not reader.images:
        raise InvalidInput(f"{root}: leftImg8bit/{split} has no images")
    column = 2 if labels == "coco" else 1
    categories = {row[column]: row[0] for row in reversed(THINGS.values())}
    pairs = sorted(zip(reader.images, reader.targets, strict=True))
    pictures = tuple(_picture(i, Path(image), Path(target[0]), column) for i, (image, target) in enumerate(pairs, 1))
    return EvaluationSet(f"cityscapes-{split}", pictures, dict(sorted(categories.items())))


def _picture(image_id: int, path: Path, instances: Path, column: int) -> Picture:
    ids = np.asarray(Image.open(instances)).astype(np.int64)
    boxes, labels, crowd, masks = [], [], [], []
    for value in np.unique(ids):
        label = int(value) // 1000 if value >= 1000 else int(value)
        if label not in THINGS:
            continue
        mask = coco_mask.encode(np.asfortranarray(ids == value, dtype=np.uint8))
        boxes.append(coco_mask.toBbox(mask))
        labels.append(THINGS[label][column])
        crowd.append(value < 1000)
        masks.append(mask)
    objects = Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, np.bool_),
        tuple(masks),
    )
    height, width = ids.shape
    return Picture(image_id, path, width, height, path.stat().st_size, objects)
