"""A tiny set in COCO's format from scikit-image's photographs, with all that makes real ones awkward.

Objects: person and rocket (box only) in the astronaut, cup with a polygon, cat with a polygon, motorcycle and, as a
run-length, a crowd of people who are not there. Pictures are small, so that a step of training costs little.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

PERSON, MOTORCYCLE, AIRPLANE, CAT, CUP = 1, 4, 5, 17, 47
ASTRONAUT, COFFEE, CHELSEA, MOTOR = 11, 12, 13, 14
SIDE = 160  # pixels, longest side


def write_tiny_coco(folder: Path) -> tuple[Path, Path]:
    """Write `images/` and `annotations.json` under `folder`. Returns both paths."""
    pictures = {
        ASTRONAUT: skimage.data.astronaut(),
        COFFEE: skimage.data.coffee(),
        CHELSEA: skimage.data.chelsea(),
        MOTOR: skimage.data.stereo_motorcycle()[0],
    }
    (folder / "images").mkdir(parents=True)
    images, sizes = [], {}
    for image_id, pixels in pictures.items():
        picture = Image.fromarray(pixels)
        picture.thumbnail((SIDE, SIDE))
        picture.save(folder / "images" / f"{image_id}.jpg", quality=92)
        sizes[image_id] = picture.size
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "width": picture.width, "height": picture.height}
        )
    categories = {PERSON: "person", MOTORCYCLE: "motorcycle", AIRPLANE: "airplane", CAT: "cat", CUP: "cup"}
    document = {
        "images": images,
        "annotations": _annotations(sizes),
        "categories": [{"id": k, "name": v} for k, v in categories.items()],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return folder / "images", path


def _annotations(sizes: dict[int, tuple[int, int]]) -> list[dict[str, Any]]:
    def placed(image_id: int, category: int, corners: tuple[float, ...], **more: Any) -> dict[str, Any]:
        width, height = sizes[image_id]
        x0, y0, x1, y1 = (c * s for c, s in zip(corners, (width, height) * 2, strict=True))
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
        return {"image_id": image_id, "category_id": category, "segmentation": [polygon], **box, **more}

    crowd = np.zeros(sizes[MOTOR][::-1], np.uint8)
    crowd[:20, :30] = 1
    rows = [
        placed(ASTRONAUT, PERSON, (0.04, 0.0, 0.85, 1.0)),
        placed(ASTRONAUT, AIRPLANE, (0.72, 0.0, 1.0, 0.6), segmentation=[], has_mask=False),
        placed(COFFEE, CUP, (0.2, 0.15, 0.72, 0.8)),
        placed(CHELSEA, CAT, (0.05, 0.0, 0.9, 1.0)),
        placed(MOTOR, MOTORCYCLE, (0.08, 0.12, 0.92, 0.92)),
        {
            "image_id": MOTOR,
            "category_id": PERSON,
            "bbox": [0, 0, 30, 20],
            "area": 600,
            "iscrowd": 1,
            "segmentation": {"size": list(crowd.shape), "counts": _runs(crowd)},
        },
    ]
    return [{"id": index, **row} for index, row in enumerate(rows, start=1)]


def _runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length encoding: lengths down the columns, zeros first."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
