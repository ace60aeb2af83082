"""The accuracy figures are COCO's own, also for resampled sets of images."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shared.errors import InvalidImage, InvalidInput
from trainer.evaluation.bdrate import bootstrap_weights
from trainer.evaluation.evaluation_set import EvaluationSet, load_set
from trainer.evaluation.matching import Found, Kind, average_precision, match, score

SIZE = 96  # pixels a side


def scene(seed: int, images: int = 12, categories: tuple[int, ...] = (1, 3, 18)) -> tuple[dict, dict[int, Found]]:
    """COCO annotations of rectangles (some crowd) and detections around them: moved, missed, doubled and invented."""
    rng = np.random.default_rng(seed)
    annotations, found = [], {}
    for image_id in range(10, 10 + images):
        boxes, scores, labels = [], [], []
        for _ in range(rng.integers(0, 7)):
            label = int(rng.choice(categories))
            x, y, w, h = (int(v) for v in (*rng.integers(0, 60, 2), *rng.integers(6, 36, 2)))
            crowd = int(rng.random() < 0.15)
            mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if crowd:
                runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [0]])))
                counts = np.diff(np.concatenate([[0], runs])).tolist()
                segmentation = {"size": [SIZE, SIZE], "counts": [*counts, SIZE * SIZE - sum(counts)]}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": [x, y, w, h]}
                | {"area": w * h, "iscrowd": crowd, "segmentation": segmentation}
            )
            for _ in range(rng.integers(0, 3)):
                dx, dy = rng.integers(-4, 5, 2)
                boxes.append([max(x + dx, 0), max(y + dy, 0), min(x + w + dy, SIZE), min(y + h + dx, SIZE)])
                scores.append(rng.random())
                labels.append(label if rng.random() < 0.9 else int(rng.choice(categories)))
        for _ in range(rng.integers(0, 3)):
            boxes.append([5, 5, 30, 40])
            scores.append(rng.random())
            labels.append(int(rng.choice(categories)))
        found[image_id] = detections(boxes, scores, labels)
    images_list = [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(10, 10 + images)]
    names = [{"id": c, "name": f"c{c}"} for c in (*categories, 90)]
    return {"images": images_list, "annotations": annotations, "categories": names, "info": {}}, found


def detections(boxes: list, scores: list, labels: list) -> Found:
    masks = np.zeros((SIZE, SIZE, len(boxes)), np.uint8, order="F")
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        masks[int(y0) : int(y1), int(x0) : int(x1), i] = 1
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        tuple(coco_mask.encode(masks)) if boxes else (),
    )


def write_set(folder: Path, document: dict) -> EvaluationSet:
    for image in document["images"]:
        Image.new("RGB", (SIZE, SIZE)).save(folder / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(document))
    return load_set(folder, folder / "instances.json")


def cocoeval(document: dict, found: dict[int, Found], kind: Kind) -> np.ndarray:
    """pycocotools' precision means: [K, 10], NaN for categories without objects."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        results = [
            {"image_id": image_id, "category_id": int(label), "score": float(score_)}
            | {"bbox": [*map(float, box[:2]), *map(float, box[2:] - box[:2])]}
            | ({"segmentation": mask} if kind == "mask" else {})
            for image_id, f in found.items()
            for box, score_, label, mask in zip(f.boxes, f.scores, f.labels, f.masks, strict=True)
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [T, R, K], all areas, 100 detections
    precision = np.where(precision < 0, np.nan, precision)
    return precision.mean(axis=1).T


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_pycocotools(tmp_path: Path, seed: int, kind: Kind) -> None:
    document, found = scene(seed)
    pictures = write_set(tmp_path, document)
    matches = match([p.objects for p in pictures.pictures], [found[p.image_id] for p in pictures.pictures],
                    list(pictures.categories), kind)  # fmt: skip
    expected = cocoeval(document, found, kind)
    np.testing.assert_allclose(average_precision(matches)[0], expected, rtol=0, atol=1e-14)
    figures = score(matches)
    assert figures.ap[0] == pytest.approx(np.nanmean(expected), abs=1e-12)
    assert figures.ap50[0] == pytest.approx(np.nanmean(expected[:, 0]), abs=1e-12)
    assert figures.person_ap[0] == pytest.approx(expected[0].mean(), abs=1e-12)
    assert 0.05 < figures.ap[0] < 0.95


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_a_weighted_draw_equals_pycocotools_on_the_images_really_repeated(tmp_path: Path, kind: Kind) -> None:
    document, found = scene(8)
    pictures = write_set(tmp_path, document)
    weights = bootstrap_weights(len(pictures.pictures), 3)
    matches = match([p.objects for p in pictures.pictures], [found[p.image_id] for p in pictures.pictures],
                    list(pictures.categories), kind)  # fmt: skip
    drawn = average_precision(matches, weights)
    for row, got in zip(weights, drawn, strict=True):
        repeated, again, copies = {**document, "images": [], "annotations": []}, {}, 0
        for picture, times in zip(pictures.pictures, row.tolist(), strict=True):
            for _ in range(times):
                copies += 1
                repeated["images"].append({"id": copies, "width": SIZE, "height": SIZE, "file_name": "x"})
                again[copies] = found[picture.image_id]
                repeated["annotations"] += [
                    {**a, "id": 1000 * copies + a["id"], "image_id": copies}
                    for a in document["annotations"]
                    if a["image_id"] == picture.image_id
                ]
        np.testing.assert_allclose(got, cocoeval(repeated, again, kind), rtol=0, atol=1e-14)


def test_finding_everything_is_one_and_nothing_is_zero(tmp_path: Path) -> None:
    document, _ = scene(2)
    pictures = write_set(tmp_path, document).pictures
    truth = [p.objects for p in pictures]
    perfect = [
        Found(
            np.concatenate([o.boxes[:, :2], o.boxes[:, :2] + o.boxes[:, 2:]], axis=1)[~o.crowd].astype(np.float32),
            np.ones(int((~o.crowd).sum()), np.float32),
            o.labels[~o.crowd],
            tuple(m for m, crowd in zip(o.masks, o.crowd, strict=True) if not crowd),
        )
        for o in truth
    ]
    nothing = [detections([], [], []) for _ in truth]
    for kind in ("box", "mask"):
        assert score(match(truth, perfect, [1, 3, 18], kind)).ap[0] == pytest.approx(1)
        assert score(match(truth, nothing, [1, 3, 18], kind)).ap[0] == 0


def test_a_set_without_a_category_leaves_it_out_of_the_mean(tmp_path: Path) -> None:
    document, found = scene(3)
    pictures = write_set(tmp_path, document)
    arguments = [p.objects for p in pictures.pictures], [found[p.image_id] for p in pictures.pictures]
    assert score(match(*arguments, [1, 3, 18], "box")).ap == score(match(*arguments, [1, 3, 18, 90], "box")).ap
    assert np.isnan(score(match(*arguments, [90], "box")).ap).all()


def test_missing_annotations_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.json"):
        load_set(tmp_path, tmp_path / "nowhere.json")


def test_malformed_annotations_name_image_and_field(tmp_path: Path) -> None:
    document, _ = scene(1, images=4)
    del document["annotations"][0]["bbox"]
    with pytest.raises(InvalidInput, match=r"image 1\d or its annotations.*bbox"):
        write_set(tmp_path, document)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    document, _ = scene(1)
    (tmp_path / "instances.json").write_text(json.dumps(document))
    with pytest.raises(InvalidImage, match=r"10\.png"):
        load_set(tmp_path, tmp_path / "instances.json")


def test_a_picture_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    document, _ = scene(1)
    write_set(tmp_path, document)
    Image.new("RGB", (SIZE, SIZE - 1)).save(tmp_path / "11.png")
    with pytest.raises(
        InvalidImage, match=rf"11\.png: the annotations say {SIZE}x{SIZE}, the picture is {SIZE}x{SIZE - 1}"
    ):
        load_set(tmp_path, tmp_path / "instances.json")


def test_ids_that_are_not_in_the_set_are_refused(tmp_path: Path) -> None:
    document, _ = scene(1)
    write_set(tmp_path, document)
    assert [p.image_id for p in load_set(tmp_path, tmp_path / "instances.json", [12, 11]).pictures] == [11, 12]
    with pytest.raises(InvalidInput, match="lacks 1 of the ids asked for, first 99"):
        load_set(tmp_path, tmp_path / "instances.json", [11, 99])


def test_an_object_without_a_mask_makes_a_set_without_masks(tmp_path: Path) -> None:
    document, _ = scene(1)
    assert write_set(tmp_path, document).has_masks
    document["annotations"][0] |= {"has_mask": False, "segmentation": []}
    assert not write_set(tmp_path, document).has_masks
