"""Reading COCO-format sets, and what training sees of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud.tasks.bundled import BundledRCNN
from shared.errors import InvalidImage, InvalidInput
from tests.trainer.coco_set import AIRPLANE, ASTRONAUT, CHELSEA, COFFEE, CUP, MOTOR, PERSON, write_tiny_coco
from trainer.data import Example, epochs, load_coco, repeat_factors, tuning_ids
from trainer.early_cache import EarlyBatches, EarlyFeatures, View, view_targets

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny_coco(tmp_path / "set")


@pytest.fixture
def examples(tiny: tuple[Path, Path]) -> dict[int, Example]:
    return {e.image_id: e for e in load_coco(*tiny)}


def test_a_set_is_read_with_boxes_as_corners_in_pixels(examples: dict[int, Example]) -> None:
    coffee = examples[COFFEE]
    assert coffee.labels.tolist() == [CUP]
    expected = np.array([0.2 * coffee.width, 0.15 * coffee.height, 0.72 * coffee.width, 0.8 * coffee.height])
    np.testing.assert_allclose(coffee.boxes[0], expected, rtol=1e-5)
    assert coffee.read().shape == (3, coffee.height, coffee.width)
    assert coffee.read().dtype == torch.uint8


def test_a_crowd_is_ignored_and_is_no_object(examples: dict[int, Example]) -> None:
    motor = examples[MOTOR]
    assert PERSON not in motor.labels
    assert motor.ignore.tolist() == [[0.0, 0.0, 30.0, 20.0]]


def test_an_object_without_a_mask_says_so_and_so_does_its_image(examples: dict[int, Example]) -> None:
    astronaut = examples[ASTRONAUT]
    assert astronaut.labels.tolist() == [PERSON, AIRPLANE]
    assert [s is not None for s in astronaut.segments] == [True, False]
    assert not astronaut.has_masks
    assert examples[COFFEE].has_masks
    masks = astronaut.masks()
    assert masks[1].sum() == 0
    x0, y0, x1, y1 = astronaut.boxes[0]
    assert masks[0].sum() == pytest.approx((x1 - x0) * (y1 - y0), rel=0.03)


def test_images_are_chosen_and_left_out_by_id(tiny: tuple[Path, Path]) -> None:
    assert [e.image_id for e in load_coco(*tiny, image_ids=[COFFEE, MOTOR], exclude=[MOTOR])] == [COFFEE]
    with pytest.raises(InvalidInput, match=r"lacks 1 of the ids asked for, the first is 99"):
        load_coco(*tiny, image_ids=[COFFEE, 99])
    with pytest.raises(InvalidInput, match="no images left"):
        load_coco(*tiny, exclude=[ASTRONAUT, COFFEE, CHELSEA, MOTOR])


def changed(document: dict[str, Any], change: Change) -> str:
    change(document)
    return json.dumps(document)


BROKEN: dict[str, tuple[Change, str]] = {
    "no images list": (lambda d: d.pop("images"), r"annotations\.json: field 'images' is missing"),
    "images is no list": (lambda d: d.update(images={}), r"field 'images' has the wrong type dict"),
    "empty images": (lambda d: d.update(images=[], annotations=[]), r"no images left to use"),
    "no categories": (lambda d: d.pop("categories"), r"field 'categories' is missing"),
    "no file name": (lambda d: d["images"][1].pop("file_name"), r"images\[1\]: field 'file_name' is missing"),
    "zero width": (lambda d: d["images"][0].update(width=0), r"images\[0\]: field 'width' must be positive, got 0"),
    "height as text": (lambda d: d["images"][0].update(height="9"), r"images\[0\]: field 'height' has the wrong type"),
    "no box": (lambda d: d["annotations"][2].pop("bbox"), r"annotations\[2\]: field 'bbox' is missing"),
    "three numbers": (lambda d: d["annotations"][2].update(bbox=[1, 2, 3]), r"annotations\[2\]: field 'bbox' must be"),
    "text in a box": (lambda d: d["annotations"][2].update(bbox=[1, 2, 3, "4"]), r"field 'bbox' must be four finite"),
    "infinite box": (lambda d: d["annotations"][0].update(bbox=[1, 2, float("inf"), 4]), r"'bbox' must be four finite"),
    "image unknown": (lambda d: d["annotations"][3].update(image_id=7), r"annotations\[3\]: field 'image_id' names 7"),
    "category": (lambda d: d["annotations"][0].update(category_id=91), r"annotations\[0\]: field 'category_id' is 91"),
    "category list": (lambda d: d["categories"][1].update(id=0), r"categories\[1\]: field 'id' is 0, outside"),
    "short polygon": (
        lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
        r"annotations\[0\]: field 'segmentation' must be polygons",
    ),
    "run-length without counts": (
        lambda d: d["annotations"][5].update(segmentation={"size": [10, 10]}),
        r"annotations\[5\]: field 'segmentation' must be polygons",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_annotations_are_refused_naming_file_and_field(tiny: tuple[Path, Path], case: str) -> None:
    images, path = tiny
    change, sentence = BROKEN[case]
    path.write_text(changed(json.loads(path.read_text()), change))
    with pytest.raises(InvalidInput, match=sentence) as caught:
        load_coco(images, path)
    assert "annotations.json" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_annotation_file_is_refused(tiny: tuple[Path, Path], content: bytes | None) -> None:
    images, path = tiny
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"annotations\.json"):
        load_coco(images, path)


def test_a_picture_that_is_missing_or_of_another_size_or_no_picture_is_named(tiny: tuple[Path, Path]) -> None:
    images, path = tiny
    document = json.loads(path.read_text())
    document["images"][0]["width"] += 1
    path.write_text(json.dumps(document))
    (images / f"{COFFEE}.jpg").write_bytes(b"no picture")
    astronaut, coffee, *_ = load_coco(images, path)
    for broken, sentence in ((astronaut, "the annotations say 161x160"), (coffee, "expected a readable picture")):
        for look in (broken.check, broken.read):
            with pytest.raises(InvalidImage, match=rf"{broken.path.name}: {sentence}"):
                look()
    (images / f"{COFFEE}.jpg").unlink()
    with pytest.raises(InvalidImage, match=rf"{COFFEE}\.jpg: .*no such file"):
        load_coco(images, path)


def test_boxes_are_clipped_to_the_image_and_slivers_are_dropped(tiny: tuple[Path, Path]) -> None:
    images, path = tiny
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [-5, -5, 1000, 30]
    document["annotations"][1]["bbox"] = [10, 10, 0.5, 40]
    path.write_text(json.dumps(document))
    astronaut = load_coco(images, path)[0]
    assert astronaut.boxes.tolist() == [[0.0, 0.0, 160.0, 25.0]]


def test_images_with_a_rare_class_are_drawn_more_often(examples: dict[int, Example]) -> None:
    ten = [examples[ASTRONAUT]] * 9 + [examples[COFFEE]]
    factors = repeat_factors(ten, threshold=0.4)
    np.testing.assert_allclose(factors, [1.0] * 9 + [2.0])  # sqrt(0.4 / 0.1)
    order = epochs(ten, factors, np.random.default_rng(0))
    epoch = [next(order) for _ in range(11)]
    assert sorted(epoch) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_the_tuning_split_is_fixed_and_lies_in_the_training_set_only(data_dir: Path | None) -> None:
    assert len(tuning_ids()) == 200
    if data_dir is None:
        pytest.skip("needs the COCO subset, see SIGHTLINE_DATA")
    ids = {
        name: {i["id"] for i in json.loads((data_dir / "coco" / f"instances_{name}.json").read_text())["images"]}
        for name in ("train", "eval")
    }
    assert tuning_ids() <= ids["train"]
    assert not tuning_ids() & ids["eval"]


def test_a_mirrored_and_cropped_view_moves_boxes_and_masks_alike(examples: dict[int, Example]) -> None:
    coffee = examples[COFFEE]
    whole = View(2 * coffee.height, 2 * coffee.width, True, 0, 0, 2 * coffee.height, 2 * coffee.width)
    target = view_targets(coffee, whole, masks=True)
    x0, y0, x1, y1 = 2 * coffee.boxes[0]
    width = 2 * coffee.width
    torch.testing.assert_close(target["boxes"][0], torch.tensor([width - x1, y0, width - x0, y1]).float())
    rows, columns = torch.where(target["masks"][0])
    extent = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    assert (extent - target["boxes"][0]).abs().max() <= 2


def test_an_object_mostly_cut_away_is_ignored_and_not_background(examples: dict[int, Example]) -> None:
    astronaut = examples[ASTRONAUT]  # the airplane is at the right, x from 0.72
    left = View(160, 160, False, 0, 0, 160, 125)
    target = view_targets(astronaut, left)
    assert target["labels"].tolist() == [PERSON]
    assert len(target["ignore"]) == 1
    assert target["ignore"][0, 2] == 125


@pytest.fixture
def small_network() -> BundledRCNN:
    torch.manual_seed(0)
    return BundledRCNN(channels=16, width=32)


def test_cached_features_are_those_of_the_picture(small_network: BundledRCNN, examples: dict[int, Example]) -> None:
    early = EarlyFeatures(small_network, [examples[CHELSEA]], budget_bytes=1 << 20, seed=0)
    early._jitter = lambda image: image  # type: ignore[method-assign]
    c3, height, width = early.get(0, mirrored=True)
    small_network.transform.min_size = (early.short_side(0, True),)
    batch, _ = small_network.transform([examples[CHELSEA].read().flip(2).float() / 255], None)
    assert batch.image_sizes == [(height, width)]
    with torch.no_grad():
        expected = small_network.backbone.early(batch.tensors)[0]
    rows, columns = c3.shape[1:]
    difference = (c3.float() - expected[:, :rows, :columns]).abs().mean() / expected.abs().mean()
    assert difference < 0.03  # bfloat16
    again, _, _ = early.get(0, mirrored=True)
    assert again is c3


def test_a_full_cache_keeps_nothing_more(small_network: BundledRCNN, examples: dict[int, Example]) -> None:
    early = EarlyFeatures(small_network, [examples[CHELSEA]], budget_bytes=1000, seed=0)
    first, _, _ = early.get(0, mirrored=False)
    second, _, _ = early.get(0, mirrored=False)
    assert first is not second


def test_batches_of_views_repeat_with_the_seed_and_name_their_images(
    small_network: BundledRCNN, examples: dict[int, Example]
) -> None:
    def drawn() -> list[tuple[Any, ...]]:
        rng = np.random.default_rng(4)
        chosen = list(examples.values())
        early = EarlyFeatures(small_network, chosen, budget_bytes=1 << 24, seed=4)
        batches = EarlyBatches(early, chosen, epochs(chosen, np.ones(4), rng), 2, rng, masks=True)
        return [(b.image_ids, b.c3.float().sum().item(), b.sizes) for b in (batches.draw() for _ in range(3))]

    first = drawn()
    assert first == drawn()
    for ids, _, sizes in first:
        assert set(ids) <= set(examples)
        assert len(ids) == len(sizes) == 2
