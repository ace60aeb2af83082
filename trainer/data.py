"""COCO-format data for training: read once, checked before the first step, typed after that.

Invariants: every box has positive size and lies in its image; every category id is in the label space; images
named in the committed tuning split never reach a training set. Errors name the file and the field.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shared.errors import InvalidImage, InvalidInput

TUNING_SPLIT = Path(__file__).with_name("tuning_split.json")
COCO_CATEGORY_IDS = frozenset(range(1, 91))


@dataclass(frozen=True, slots=True)
class Example:
    """One annotated image.

    `boxes`: float32 [N, 4], xyxy in pixels. `labels`: int64 [N], category ids. `ignore`: float32 [K, 4], crowd
    regions. `segments`: per object its COCO segmentation (polygons or run-length), None where there is no mask.
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.float32]
    segments: tuple[Any, ...]
    has_masks: bool

    def read(self) -> Tensor:
        """The picture as uint8 [3, height, width], RGB. Raises InvalidImage."""
        try:
            with Image.open(self.path) as image:
                rgb = np.array(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidImage(f"{self.path}: expected a readable picture, got {error}") from error
        self._require_size(rgb.shape[1], rgb.shape[0])
        return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()

    def check(self) -> None:
        """Read the picture's header only. Raises InvalidImage."""
        try:
            with Image.open(self.path) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidImage(f"{self.path}: expected a readable picture, got {error}") from error
        self._require_size(width, height)

    def _require_size(self, width: int, height: int) -> None:
        if (width, height) != (self.width, self.height):
            raise InvalidImage(
                f"{self.path}: the annotations say {self.width}x{self.height}, the picture is {width}x{height}"
            )

    def masks(self) -> NDArray[np.uint8]:
        """Object masks, uint8 [N, height, width]; all zero where an object has none."""
        from pycocotools import mask as coco_mask

        masks = np.zeros((len(self.segments), self.height, self.width), np.uint8)
        for row, segment in zip(masks, self.segments, strict=True):
            if segment is None:
                continue
            coded = coco_mask.frPyObjects(segment, self.height, self.width)
            decoded = coco_mask.decode(coded)
            row[:] = decoded.any(axis=2) if decoded.ndim == 3 else decoded
        return masks


def _field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise InvalidInput(f"{where}: field '{name}' is missing")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidInput(f"{where}: field '{name}' has the wrong type {type(value).__name__}")
    return value


def read_annotations(path: Path) -> dict[str, Any]:
    """The parsed COCO annotations, their three lists checked. Raises InvalidInput."""
    try:
        document = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: expected COCO annotations in JSON, got {error}") from error
    for name in ("images", "annotations", "categories"):
        _field(document, name, list, str(path))
    return dict(document)


def load_coco(
    images_dir: Path,
    annotations_json: Path,
    *,
    image_ids: Collection[int] | None = None,
    exclude: Collection[int] = (),
    label_space: Collection[int] = COCO_CATEGORY_IDS,
) -> list[Example]:
    """Read a COCO-format set.

    `image_ids`: only these (all must be there). `exclude`: never these. Objects without a usable mask carry None.
    Raises InvalidInput naming file and field, InvalidImage where a picture is missing.
    """
    images_dir, annotations_json = Path(images_dir), Path(annotations_json)
    document = read_annotations(annotations_json)
    _check_categories(document["categories"], label_space, annotations_json)
    chosen = _chosen_images(document["images"], annotations_json, image_ids, set(exclude))
    if not chosen:
        raise InvalidInput(f"{annotations_json}: no images left to use, 'images' has {len(document['images'])}")
    objects: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in chosen}
    every_id = {image["id"] for image in document["images"]}
    for index, annotation in enumerate(document["annotations"]):
        where = f"{annotations_json}: annotations[{index}]"
        image_id = _field(annotation, "image_id", int, where)
        if image_id not in every_id:
            raise InvalidInput(f"{where}: field 'image_id' names {image_id}, which 'images' does not have")
        if image_id in objects:
            _check_annotation(annotation, label_space, where)
            objects[image_id].append(annotation)
    return [_example(images_dir, image, objects[image_id]) for image_id, image in chosen.items()]


def _check_categories(categories: list[Any], label_space: Collection[int], path: Path) -> None:
    for index, category in enumerate(categories):
        category_id = _field(category, "id", int, f"{path}: categories[{index}]")
        if category_id not in label_space:
            raise InvalidInput(
                f"{path}: categories[{index}]: field 'id' is {category_id}, outside the label space "
                f"{min(label_space)}..{max(label_space)}"
            )


def _chosen_images(
    images: list[Any], path: Path, image_ids: Collection[int] | None, exclude: set[int]
) -> dict[int, dict[str, Any]]:
    chosen = {}
    wanted = None if image_ids is None else set(image_ids)
    for index, image in enumerate(images):
        where = f"{path}: images[{index}]"
        image_id = _field(image, "id", int, where)
        _field(image, "file_name", str, where)
        for side in ("width", "height"):
            if _field(image, side, int, where) < 1:
                raise InvalidInput(f"{where}: field '{side}' must be positive, got {image[side]}")
        if (wanted is None or image_id in wanted) and image_id not in exclude:
            chosen[image_id] = image
    if wanted is not None and (missing := wanted - exclude - chosen.keys()):
        raise InvalidInput(f"{path}: 'images' lacks {len(missing)} of the ids asked for, the first is {min(missing)}")
    return chosen


def _check_annotation(annotation: Any, label_space: Collection[int], where: str) -> None:
    category = _field(annotation, "category_id", int, where)
    if category not in label_space:
        raise InvalidInput(
            f"{where}: field 'category_id' is {category}, outside the label space "
            f"{min(label_space)}..{max(label_space)}"
        )
    box = _field(annotation, "bbox", list, where)
    if len(box) != 4 or not all(isinstance(v, int | float) and np.isfinite(v) for v in box):
        raise InvalidInput(f"{where}: field 'bbox' must be four finite numbers x, y, width, height, got {box}")
    if annotation.get("segmentation"):
        _check_segmentation(annotation["segmentation"], where)


def _check_segmentation(segment: Any, where: str) -> None:
    if isinstance(segment, dict):
        counts, size = segment.get("counts"), segment.get("size")
        good = isinstance(counts, str | list) and isinstance(size, list) and len(size) == 2
    else:
        good = isinstance(segment, list) and all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(isinstance(v, int | float) for v in p)
            for p in segment
        )
    if not good:
        raise InvalidInput(
            f"{where}: field 'segmentation' must be polygons of three or more x, y pairs, or a run-length encoding "
            "with 'size' and 'counts'"
        )


def _example(images_dir: Path, image: dict[str, Any], objects: list[dict[str, Any]]) -> Example:
    path = images_dir / image["file_name"]
    if not path.is_file():
        raise InvalidImage(f"{path}: the annotations name this picture, but there is no such file")
    width, height = image["width"], image["height"]
    boxes, labels, ignore, segments = [], [], [], []
    for item in objects:
        x, y, w, h = item["bbox"]
        box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            continue  # COCO has a few boxes below a pixel; no anchor can match them
        if item.get("iscrowd"):
            ignore.append(box)
            continue
        segment = item.get("segmentation")
        boxes.append(box)
        labels.append(item["category_id"])
        segments.append(segment if item.get("has_mask", True) and segment else None)
    complete = all(s is not None for s in segments)
    return Example(
        image["id"],
        path,
        width,
        height,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(ignore, np.float32).reshape(-1, 4),
        tuple(segments),
        bool(image.get("has_masks", complete)) and complete,
    )


def tuning_ids() -> frozenset[int]:
    """Ids of the images on which everything is chosen; never trained on."""
    return frozenset(json.loads(TUNING_SPLIT.read_text())["image_ids"])


def repeat_factors(examples: list[Example], threshold: float) -> NDArray[np.float64]:
    """How often to draw each image so that rare classes are seen: max over its classes of sqrt(t / frequency).

    Repeat factor sampling, LVIS (arXiv 1908.03195), appendix B. `threshold`: frequency below which a class is rare.
    """
    counts: dict[int, int] = {}
    for example in examples:
        for label in set(example.labels.tolist()):
            counts[label] = counts.get(label, 0) + 1
    factor = {c: max(1.0, (threshold * len(examples) / n) ** 0.5) for c, n in counts.items()}
    return np.array([max((factor[c] for c in set(e.labels.tolist())), default=1.0) for e in examples])


def epochs(examples: list[Example], factors: NDArray[np.float64], rng: np.random.Generator) -> Iterator[int]:
    """Indices into `examples` without end: each epoch a fresh permutation, rare ones repeated by their factor."""
    while True:
        times = np.floor(factors + rng.random(len(factors))).astype(int)  # fractional part by chance
        order = np.repeat(np.arange(len(examples)), times)
        rng.shuffle(order)
        yield from order.tolist()
