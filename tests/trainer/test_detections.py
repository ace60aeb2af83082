"""Detections are kept as they were, and a picture is decoded and looked at once a network."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from cloud.tasks.types import Detections, TaskKind
from trainer.evaluation.detections import DetectionStore, as_found, detect, from_bytes, to_bytes
from trainer.evaluation.matching import Found
from trainer.evaluation.series import Coding, Cost


class BrightSpots:
    """A task model that finds the pixels above a level: one object, its bounding box, its mask."""

    name, kind = "bright-spots", TaskKind.INSTANCE_SEGMENTATION

    def __init__(self, level: int) -> None:
        self.level, self.model_id, self.seen = level, f"bright-{level}", 0

    def predict(self, images, min_score: float = 0.0) -> list[Detections]:
        self.seen += len(images)
        return [self._one(image) for image in images]

    def _one(self, image: torch.Tensor) -> Detections:
        mask = (image > self.level).any(0)
        if not mask.any():
            nothing = torch.zeros(0)
            return Detections(torch.zeros(0, 4), nothing, nothing.long(), (), torch.zeros(0, *mask.shape).bool())
        rows, columns = torch.where(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return Detections(torch.tensor([box]).float(), torch.tensor([0.75]), torch.tensor([1]), ("spot",), mask[None])


def coding(key: str, decoded: list[str]) -> Coding:
    def decode() -> np.ndarray:
        decoded.append(key)
        picture = np.zeros((20, 30, 3), np.uint8)
        picture[2 : 2 + int(key), 5:9] = 200
        return picture

    return Coding(Cost(8 * int(key), 96), key, decode)


def same(a: Found, b: Found) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("boxes", "scores", "labels"))
    return arrays and a.masks == b.masks


def test_detections_survive_the_store_as_they_were(tmp_path: Path) -> None:
    mask = coco_mask.encode(np.asfortranarray(np.eye(40, 30, dtype=np.uint8)))
    values = {
        "none": Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ()),
        "boxes": Found(np.full((2, 4), 1.5, np.float32), np.ones(2, np.float32), np.array([1, 90]), None),
        "masks": Found(np.ones((2, 4), np.float32), np.ones(2, np.float32), np.array([3, 1]), (mask, mask)),
    }
    store = DetectionStore(tmp_path / "cache" / "detections.sqlite")
    store.put("network", values)
    store.close()
    again = DetectionStore(tmp_path / "cache" / "detections.sqlite")
    for key, value in values.items():
        assert same(from_bytes(to_bytes(value)), value)
        kept = again.get("network", key)
        assert kept is not None
        assert same(kept, value)
    assert again.get("other", "boxes") is None
    again.close()


def test_masks_and_boxes_are_the_models_own() -> None:
    picture = coding("6", []).decode()
    [found] = BrightSpots(100).predict([torch.from_numpy(picture.transpose(2, 0, 1).copy())])
    kept = as_found(found, with_masks=True)
    assert kept.boxes.tolist() == [[5, 2, 9, 8]]
    assert kept.masks is not None
    assert coco_mask.decode(kept.masks[0]).sum() == 24
    assert as_found(found, with_masks=False).masks is None


def test_each_picture_is_decoded_once_for_all_networks_and_never_again(tmp_path: Path) -> None:
    store, decoded = DetectionStore(tmp_path / "detections.sqlite"), []
    codings = [coding(str(n), decoded) for n in range(11)]
    first, second = BrightSpots(100), BrightSpots(150)
    with ThreadPoolExecutor(2) as pool:
        advanced = []
        costs, found = detect([first, second], store, codings, pool, advanced.append)
        assert sorted(map(int, decoded)) == list(range(11))
        assert sum(advanced) == 11
        assert [cost.bits for cost in costs] == [8 * n for n in range(11)]
        assert [len(f.scores) for f in found[0]] == [0] + [1] * 10
        _, again = detect([first, second], store, codings, pool)
        assert (len(decoded), first.seen, second.seen) == (11, 11, 11)
        assert all(same(a, b) for a, b in zip(again[0] + again[1], found[0] + found[1], strict=True))
        third = BrightSpots(250)
        assert all(len(f.scores) == 0 for f in detect([first, third], store, codings, pool)[1][1])
        assert (len(decoded), first.seen, third.seen) == (22, 11, 11)
    store.close()
