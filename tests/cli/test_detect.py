"""Results come in COCO's format, with masks that COCO's own tools read, and pictures are drawn on request."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from cli.detect import DEFAULT_TASK, coco_results, number
from cli.drawing import draw
from cloud.tasks.types import Detections
from shared.codec.bundle import WEIGHTS
from shared.codec.types import Frame
from tests.cli.conftest import Sightline


def test_image_ids_are_cocos_where_files_are_named_so_and_places_otherwise() -> None:
    assert number([Path("x/000000000139.jpg"), Path("y/7.slc")]) == [139, 7]
    assert number([Path("a.jpg"), Path("7.jpg")]) == [1, 2]
    assert number([Path("x/007.jpg"), Path("y/7.jpg")]) == [1, 2]


def test_a_result_is_cocos_with_a_mask_that_its_tools_read(rng: np.random.Generator) -> None:
    masks = torch.from_numpy(rng.random((2, 40, 60)) < 0.3)
    found = Detections(
        boxes=torch.tensor([[1.0, 2.0, 31.5, 22.0], [0.0, 0.0, 60.0, 40.0]]),
        scores=torch.tensor([0.9, 0.25]),
        category_ids=torch.tensor([18, 90]),
        labels=("dog", "toothbrush"),
        masks=masks,
    )
    rows = list(coco_results(found, 42, "dog.jpg"))
    assert rows[0] | {"segmentation": None} == {
        "image_id": 42,
        "file_name": "dog.jpg",
        "category_id": 18,
        "category": "dog",
        "bbox": [1.0, 2.0, 30.5, 20.0],
        "score": 0.9,
        "segmentation": None,
    }
    for row, mask in zip(json.loads(json.dumps(rows)), masks.numpy(), strict=True):
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]).astype(bool), mask)


def test_drawing_marks_the_objects_and_leaves_the_rest(astronaut: Frame) -> None:
    mask = np.zeros((1, 512, 512), bool)
    mask[0, 240:260, 240:260] = True
    drawn = draw(astronaut.rgb, [(200, 200, 300, 300)], [1], ["person 90 %"], mask)
    changed = np.any(drawn != astronaut.rgb, axis=2)
    assert drawn.shape == astronaut.rgb.shape
    assert changed[198:303, 200].mean() > 0.9, "the box's left side"
    assert changed[245:255, 245:255].all(), "the mask"
    assert not changed[320:].any(), "far below the object"
    assert not np.shares_memory(drawn, astronaut.rgb)


def test_nothing_found_draws_nothing(astronaut: Frame) -> None:
    np.testing.assert_array_equal(draw(astronaut.rgb, [], [], []), astronaut.rgb)


def test_an_unknown_task_is_wrong_usage_and_says_what_there_is(sightline: Sightline, pictures: Path) -> None:
    ended = sightline("detect", pictures, "--task", "clairvoyance")
    assert ended.code == 2
    assert DEFAULT_TASK in ended.err


@pytest.mark.skipif(not (WEIGHTS / DEFAULT_TASK).is_dir(), reason="the bundled detector is not in this checkout")
def test_a_person_is_found_in_the_picture_and_in_its_coded_form(
    sightline: Sightline, tmp_path: Path, astronaut: Frame
) -> None:
    Image.fromarray(astronaut.rgb).save(tmp_path / "astronaut.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    sightline("compress", tmp_path / "astronaut.png", "-o", tmp_path / "coded", "-q", "6")
    ended = sightline(
        *("detect", tmp_path, tmp_path / "coded" / "astronaut.slc", "--json"),
    )
    rows = json.loads(ended.out)
    assert ended.code == 1
    assert "broken.jpg" in ended.err
    people = {row["file_name"] for row in rows if row["category"] == "person"}
    assert people == {str(tmp_path / "astronaut.png"), str(tmp_path / "coded" / "astronaut.slc")}
    drawn = sightline("detect", tmp_path / "astronaut.png", "-o", tmp_path / "drawn")
    assert drawn.code == 0
    with Image.open(tmp_path / "drawn" / "astronaut.detections.png") as picture:
        assert picture.size == (512, 512)
