"""Cityscapes' own folders become an evaluation set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from shared.errors import InvalidInput
from trainer.evaluation.cityscapes import load_cityscapes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two frames of one city, 48x32: a car, a rider on a bicycle and a group of persons; and an empty road."""
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val" / "ulm").mkdir(parents=True)
    street = np.full((32, 48), 7, np.uint16)  # road
    street[4:20, 6:30] = 26_000  # car 0
    street[10:14, 20:30] = 26_001  # car 1, in front of it
    street[2:12, 34:40] = 25_000  # rider
    street[12:20, 34:42] = 33_000  # bicycle
    street[22:30, 2:14] = 24  # persons who cannot be told apart
    for frame, instances in (("000000", street), ("000001", np.full((32, 48), 7, np.uint16))):
        name = f"ulm_{frame}_000019"
        Image.new("RGB", (48, 32), (90, 90, 90)).save(tmp_path / f"leftImg8bit/val/ulm/{name}_leftImg8bit.png")
        Image.fromarray(instances).save(tmp_path / f"gtFine/val/ulm/{name}_gtFine_instanceIds.png")
    return tmp_path


def test_things_become_objects_with_boxes_and_masks(root: Path) -> None:
    pictures = load_cityscapes(root, labels="cityscapes")
    assert [(p.width, p.height, p.path.name) for p in pictures.pictures] == [
        (48, 32, "ulm_000000_000019_leftImg8bit.png"),
        (48, 32, "ulm_000001_000019_leftImg8bit.png"),
    ]
    objects = pictures.pictures[0].objects
    by_label = {int(label): i for i, label in enumerate(objects.labels) if label != 3}
    assert sorted(objects.labels.tolist()) == [1, 2, 3, 3, 8]
    assert objects.boxes[by_label[8]].tolist() == [34, 12, 8, 8]
    assert objects.masks is not None
    assert coco_mask.decode(objects.masks[by_label[2]]).sum() == 60
    cars = [int(coco_mask.decode(objects.masks[i]).sum()) for i in np.flatnonzero(objects.labels == 3)]
    assert cars == [16 * 24 - 40, 40]
    assert pictures.categories[4] == "truck"
    assert len(pictures.categories) == 8


def test_a_group_is_a_crowd_and_an_empty_road_has_nothing(root: Path) -> None:
    street, road = load_cityscapes(root, labels="cityscapes").pictures
    assert street.objects.labels[street.objects.crowd].tolist() == [1]
    assert (len(road.objects.labels), road.objects.boxes.shape, road.objects.masks) == (0, (0, 4), ())


def test_in_cocos_label_space_a_rider_is_a_person(root: Path) -> None:
    pictures = load_cityscapes(root)
    assert pictures.categories == {
        1: "person",
        2: "bicycle",
        3: "car",
        4: "motorcycle",
        6: "bus",
        7: "train",
        8: "truck",
    }
    objects = pictures.pictures[0].objects
    assert sorted(objects.labels.tolist()) == [1, 1, 2, 3, 3]
    assert (objects.labels[~objects.crowd] == 1).sum() == 1


def test_a_folder_without_cityscapes_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="leftImg8bit/val"):
        load_cityscapes(tmp_path)
