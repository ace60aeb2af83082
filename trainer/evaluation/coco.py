"""COCO's detection metric for any task model on any COCO-format set: box and mask AP, by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from cloud.tasks.types import Detections, TaskKind, TaskModel
from trainer.data import Example, load_coco, read_annotations

PERSON = 1


def evaluate_task(
    model: TaskModel,
    images_dir: Path,
    annotations_json: Path,
    image_ids: Collection[int] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Run `model` on the set and score it.

    `image_ids`: only these. `transform`: applied to each picture (uint8 [3, H, W] to the same, or to float in
    [0, 1]) before the model sees it, a codec for instance. Returns "images", "AP", "AP50", "person_AP50" and
    "per_class" (name to AP), and for a model that makes masks the same with "mask_" before, on the images that
    have a mask for every object. A class without an object is left out; a figure without any is NaN.
    """
    examples = load_coco(images_dir, annotations_json, image_ids=image_ids)
    results = detect_all(model, examples, transform, batch_size=batch_size)
    figures = score(results, annotations_json, [e.image_id for e in examples])
    if model.kind is TaskKind.INSTANCE_SEGMENTATION:
        masked = [e.image_id for e in examples if e.has_masks]
        figures |= {f"mask_{k}": v for k, v in score(results, annotations_json, masked, "segm").items()}
    return figures


def detect_all(
    model: TaskModel,
    examples: Sequence[Example],
    transform: Callable[[Tensor], Tensor] | None = None,
    *,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Detections on every example, in COCO's result format."""
    results: list[dict[str, Any]] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        images = [e.read() if transform is None else transform(e.read()) for e in batch]
        for example, found in zip(batch, model.predict(images), strict=True):
            results += coco_results(example.image_id, found)
    return results


def coco_results(image_id: int, found: Detections) -> list[dict[str, Any]]:
    """One picture's detections in COCO's result format; masks as compressed run-lengths."""
    boxes = found.boxes.numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found.scores.tolist(), found.category_ids.tolist(), strict=True)
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": confidence}
        for box, confidence, category in rows
    ]
    if found.masks is not None:
        for result, mask in zip(results, found.masks.numpy(), strict=True):
            result["segmentation"] = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return results


def score(
    results: list[dict[str, Any]], annotations_json: Path, image_ids: Sequence[int], kind: str = "bbox"
) -> dict[str, Any]:
    """COCO's figures for results on these images. `kind`: "bbox" or "segm"."""
    nothing = {"images": len(image_ids), "AP": 0.0, "AP50": 0.0, "person_AP50": 0.0, "per_class": {}}
    chosen = set(image_ids)
    other = (
        "segmentation" if kind == "bbox" else "bbox"
    )  # pycocotools takes a result's area from the box if it is there
    mine = [{k: v for k, v in r.items() if k != other} for r in results if r["image_id"] in chosen]
    if not mine:
        return nothing
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = read_annotations(annotations_json)
        truth.createIndex()
        found = truth.loadRes(mine)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.imgIds = sorted(chosen)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class; all areas, 100 detections
    names = {c["id"]: c["name"] for c in truth.dataset["categories"]}
    categories = evaluation.params.catIds
    per_class = {
        names[c]: float(precision[:, :, k].mean()) for k, c in enumerate(categories) if (precision[:, :, k] > -1).all()
    }
    return {
        "images": len(image_ids),
        "AP": _mean(precision),
        "AP50": _mean(precision[0]),
        "person_AP50": _mean(precision[0, :, categories.index(PERSON)]) if PERSON in categories else float("nan"),
        "per_class": per_class,
    }


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
