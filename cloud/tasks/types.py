"""What a task model takes and gives: the one interface behind which all of them stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor


class TaskKind(StrEnum):
    DETECTION = "detection"
    INSTANCE_SEGMENTATION = "instance_segmentation"
    SEMANTIC_SEGMENTATION = "semantic_segmentation"
    KEYPOINTS = "keypoints"


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What one task model found in one picture, by falling score. All tensors are on the CPU.

    `boxes`: float32 [N, 4], xyxy in pixels of the picture. `scores`: float32 [N], in [0, 1]. `category_ids`: int64
    [N], COCO's (person is 1, gaps kept). `labels`: N names. `masks`: bool [N, height, width]. `keypoints`: float32
    [N, K, 3], x and y in pixels and visibility. Semantic segmentation gives one entry a class that is there.
    """

    boxes: Tensor
    scores: Tensor
    category_ids: Tensor
    labels: tuple[str, ...]
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.category_ids.shape != (count,) or len(self.labels) != count:
            raise ValueError(
                f"{count} scores need as many boxes, ids and labels, got {list(self.boxes.shape)}, "
                f"{list(self.category_ids.shape)}, {len(self.labels)}"
            )
        for name, value in (("masks", self.masks), ("keypoints", self.keypoints)):
            if value is not None and len(value) != count:
                raise ValueError(f"{count} scores need as many {name}, got {len(value)}")

    def __len__(self) -> int:
        return len(self.scores)

    def at_least(self, score: float) -> "Detections":
        """Those that score at least this much."""
        kept = self.scores >= score
        return self if bool(kept.all()) else self.chosen(torch.where(kept)[0])

    def chosen(self, rows: Tensor) -> "Detections":
        """The rows named by `rows`, int64 [M], in that order."""
        return Detections(
            self.boxes[rows],
            self.scores[rows],
            self.category_ids[rows],
            tuple(self.labels[i] for i in rows.tolist()),
            None if self.masks is None else self.masks[rows],
            None if self.keypoints is None else self.keypoints[rows],
        )


class TaskModel(Protocol):
    """A frozen task model.

    `name`: as it was asked for. `model_id`: hex SHA-256 of its weights.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> TaskKind: ...

    @property
    def model_id(self) -> str: ...

    def predict(self, images: Sequence[Tensor], min_score: float = 0.0) -> list[Detections]:
        """`images`: RGB [3, H, W] of any sizes, uint8, or float in [0, 1]. Leaves out what scores below `min_score`.

        Raises InvalidImage for anything else.
        """
        ...


class TrainableThrough(TaskModel, Protocol):
    """A frozen task model through which gradients flow to its input, never to its weights."""

    def training_losses(self, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The network's own training losses, each a float32 scalar, differentiable with respect to `images`.

        `images`: float [N, 3, H, W] in [0, 1]. `targets`: per image "boxes" float32 [K, 4] xyxy in pixels, "labels"
        int64 [K] COCO ids, where known "masks" uint8 [K, H, W] with "has_mask" bool [K], "keypoints" float32
        [K, 17, 3], and "ignore" float32 [M, 4], crowd regions.
        """
        ...

    def features(self, images: Tensor) -> list[Tensor]:
        """Backbone or pyramid features of float [N, 3, H, W] in [0, 1], finest first, differentiable likewise."""
        ...
