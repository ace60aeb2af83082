"""The images an evaluation runs on and what is in them, read once from COCO-format annotations and checked.

Unlike the training reader (`trainer.data`), nothing is dropped or clipped: the metric sees the annotations as
published, crowd regions with their masks included.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from shared.errors import InvalidImage, InvalidInput
from trainer.data import read_annotations
from trainer.evaluation.matching import Objects


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of the set. `file_bytes`: size of its file, the original coding."""

    image_id: int
    path: Path
    width: int
    height: int
    file_bytes: int
    objects: Objects


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """`pictures` by ascending id; `categories`: id to name."""

    name: str
    pictures: tuple[Picture, ...]
    categories: dict[int, str]

    @property
    def pixels(self) -> int:
        return sum(picture.width * picture.height for picture in self.pictures)

    @property
    def has_masks(self) -> bool:
        """True if every object of every image has a mask, so that mask AP means something."""
        return all(picture.objects.masks is not None for picture in self.pictures)


def load_set(images_dir: Path, annotations: Path, image_ids: Collection[int] | None = None) -> EvaluationSet:
    """Read a COCO-format set, or only `image_ids` of it.

    Raises InvalidInput naming file and field, InvalidImage for a picture that is not there.
    """
    document = read_annotations(annotations)
    wanted = None if image_ids is None else set(image_ids)
    records = {image["id"]: image for image in document["images"] if wanted is None or image["id"] in wanted}
    if wanted and (missing := wanted - records.keys()):
        raise InvalidInput(f"{annotations}: 'images' lacks {len(missing)} of the ids asked for, first {min(missing)}")
    if not records:
        raise InvalidInput(f"{annotations}: no images to evaluate, 'images' has {len(document['images'])}")
    by_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in records}
    for position, annotation in enumerate(document["annotations"]):
        try:
            if annotation["image_id"] in by_image:
                by_image[annotation["image_id"]].append(annotation)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{annotations}: annotations[{position}]: field 'image_id' is missing") from error
    pictures = []
    for image_id in sorted(records):
        try:
            pictures.append(_picture(images_dir, records[image_id], by_image[image_id]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{annotations}: image {image_id} or its annotations: {error!r}") from error
    categories = {int(c["id"]): str(c["name"]) for c in document["categories"]}
    return EvaluationSet(annotations.stem, tuple(pictures), categories)


def _picture(images_dir: Path, record: dict[str, Any], annotations: list[dict[str, Any]]) -> Picture:
    path = images_dir / record["file_name"]
    if not path.is_file():
        raise InvalidImage(f"{path} is named by the annotations but is not there")
    width, height = int(record["width"]), int(record["height"])
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, ValueError) as error:
        raise InvalidImage(f"{path} is not a picture that can be read: {error}") from error
    if size != (width, height):
        raise InvalidImage(f"{path}: the annotations say {width}x{height}, the picture is {size[0]}x{size[1]}")
    masks = None
    if all(a.get("has_mask", True) and a.get("segmentation") for a in annotations):
        masks = tuple(_run_length(a["segmentation"], height, width) for a in annotations)
    objects = Objects(
        boxes=np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
        labels=np.array([a["category_id"] for a in annotations], np.int64),
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in annotations], np.bool_),
        masks=masks,
    )
    return Picture(int(record["id"]), path, width, height, path.stat().st_size, objects)


def _run_length(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, run-length counts or an already compressed run-length -> compressed run-length."""
    if isinstance(segmentation, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return dict(segmentation)
