"""torchvision's detectors and segmentation networks, and the bundled ones, frozen, behind one interface.

Frozen means frozen: no parameter asks for a gradient and no buffer changes, also when the networks give their
training losses. torchvision's detectors do that in train() only, so then the model is in train() and every norm
and dropout stays in eval().
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FrozenBatchNorm2d

from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import freeze, state_hash
from cloud.tasks.instance_masks import DecidedMasks
from cloud.tasks.labels import VOC_TO_COCO, label_of
from cloud.tasks.trunk import IMAGE_MEAN, IMAGE_STD
from cloud.tasks.types import Detections, TaskKind
from shared.errors import InvalidImage, InvalidInput

KEYPOINT_CLASSES = 2  # background and person
_FIXED_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, FrozenBatchNorm2d)


def as_floats(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Pictures as float32 in [0, 1] on `device`. Raises InvalidImage."""
    floats = []
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise InvalidImage(f"a task model takes RGB [3, height, width], got {list(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise InvalidImage(f"a task model takes uint8, or float in [0, 1], got {image.dtype}")
        image = image.to(device)
        floats.append(image.float() / 255 if image.dtype == torch.uint8 else image.float())
    return floats


def _training_without_norms(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _FIXED_IN_TRAINING):
            module.eval()


class TorchvisionDetector:
    """Any network of torchvision.models.detection with COCO's label space; implements `TrainableThrough`."""

    def __init__(self, model: nn.Module, name: str, *, device: str = "cpu", model_id: str | None = None) -> None:
        self.model: Any = freeze(model.to(device))
        self.name = name
        self.kind = _kind_of(model)
        self.model_id = model_id or state_hash(model)
        self._device = torch.device(device)
        self._heads: Any = getattr(model, "roi_heads", None)
        if self._heads is not None:
            self._least_score = float(self._heads.score_thresh)
            # quicker by an eighth to a fifth on a CPU, where SSDlite is slower
            self.model.backbone.to(memory_format=torch.channels_last)
        transform: Any = self.model.transform
        if self.kind is TaskKind.INSTANCE_SEGMENTATION and not isinstance(transform, DecidedMasks):
            self.model.transform = transform = DecidedMasks.adopt(transform)
        transform.min_size = (transform.min_size[-1],)  # several sizes mean a random one in train()

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor], min_score: float = 0.0) -> list[Detections]:
        """See `TaskModel.predict`."""
        if not images:
            return []
        self.model.eval()
        if self._heads is not None:  # no masks and keypoints for boxes that are left out
            self._heads.score_thresh = max(self._least_score, _just_below(min_score))
        outputs = (output for batch in self._batches(as_floats(images, self._device)) for output in self.model(batch))
        return [self._detections(output).at_least(min_score) for output in outputs]

    def _batches(self, images: list[Tensor]) -> list[list[Tensor]]:
        """Pictures that go through the network together: of one size, for what is found in one that is padded to the
        size of others depends on theirs. On a CPU each goes alone, which is quicker: a batch is larger than its caches.
        """
        if self._device.type == "cpu":
            return [[image] for image in images]
        return [list(alike) for _, alike in groupby(images, key=lambda image: image.shape)]

    def _detections(self, output: dict[str, Tensor]) -> Detections:
        order = output["scores"].argsort(descending=True, stable=True)
        found = {k: v[order].cpu() for k, v in output.items()}
        return Detections(
            found["boxes"].float(),
            found["scores"].float(),
            found["labels"],
            tuple(label_of(i) for i in found["labels"].tolist()),
            found.get("masks"),
            found.get("keypoints"),
        )

    def training_losses(self, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `TrainableThrough.training_losses`. Raises InvalidInput for targets the network cannot use."""
        prepared = [self._target(target) for target in targets]
        _training_without_norms(self.model)
        try:
            losses: dict[str, Tensor] = self.model(list(images.unbind(0)), prepared)
        finally:
            self.model.eval()
        return losses

    def _target(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        prepared = {k: v.to(self._device) for k, v in target.items()}
        if not isinstance(self.model, BundledRCNN):
            prepared.pop("ignore", None)  # torchvision's own transform would not resize it
        if self.kind is TaskKind.KEYPOINTS:
            if "keypoints" not in prepared:
                raise InvalidInput(f"{self.name}: its losses need 'keypoints' in every target")
            people = prepared["labels"] < KEYPOINT_CLASSES
            prepared = {k: prepared[k][people] for k in ("boxes", "labels", "keypoints")}
        return prepared

    def features(self, images: Tensor) -> list[Tensor]:
        """See `TrainableThrough.features`."""
        batch, _ = self.model.transform(list(images.unbind(0)), None)
        features = self.model.backbone(batch.tensors)
        # pooled extra levels repeat what is there; c5 of the bundled trunk is not of the pyramid
        return [v for k, v in features.items() if k not in ("pool", "p6", "p7", "c5")]


def _just_below(score: float) -> float:
    """The number before it, for a comparison of float32 that leaves it out."""
    return float(np.nextafter(np.float32(score), np.float32(0)))


def _kind_of(model: nn.Module) -> TaskKind:
    if isinstance(model, GeneralizedRCNN):
        if model.roi_heads.has_mask():
            return TaskKind.INSTANCE_SEGMENTATION
        if model.roi_heads.has_keypoint():
            return TaskKind.KEYPOINTS
    return TaskKind.DETECTION


class TorchvisionSegmenter:
    """torchvision's semantic segmentation networks (Pascal VOC's 20 classes); implements `TrainableThrough`.

    Input is resized to a short side of 520, the size the published weights are evaluated at. One detection a class:
    its pixels, their bounding box, and their mean probability as score.
    """

    SHORT_SIDE = 520
    MIN_PIXELS = 64  # at the network's size; fewer are noise at the border of another class

    def __init__(self, model: nn.Module, name: str, *, device: str = "cpu") -> None:
        self.model: Any = freeze(model.to(device))
        self.name = name
        self.kind = TaskKind.SEMANTIC_SEGMENTATION
        self.model_id = state_hash(model)
        self._device = torch.device(device)

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = self.SHORT_SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        return (images - mean) / std

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor], min_score: float = 0.0) -> list[Detections]:
        """See `TaskModel.predict`."""
        self.model.eval()
        return [self._one(image, min_score) for image in as_floats(images, self._device)]

    def _one(self, image: Tensor, min_score: float) -> Detections:
        logits = self.model(self._prepared(image[None]))["out"]
        count = logits.argmax(1).flatten().bincount(minlength=logits.shape[1])
        logits = functional.interpolate(logits.float(), size=image.shape[-2:], mode="bilinear")
        probabilities, classes = logits[0].softmax(0).max(0)
        rows: list[tuple[float, int, Tensor]] = []
        for voc in range(1, logits.shape[1]):
            mask = classes == voc
            if int(count[voc]) < self.MIN_PIXELS or not bool(mask.any()):
                continue
            confidence = float(probabilities[mask].mean())
            if confidence >= min_score:
                rows.append((confidence, VOC_TO_COCO[voc], mask.cpu()))
        rows.sort(key=lambda row: -row[0])
        masks = torch.stack([mask for _, _, mask in rows]) if rows else torch.zeros(0, *image.shape[-2:]).bool()
        ids = [category for _, category, _ in rows]
        return Detections(
            torch.stack([_extent(mask) for mask in masks]) if rows else torch.zeros(0, 4),
            torch.tensor([confidence for confidence, _, _ in rows], dtype=torch.float32),
            torch.tensor(ids, dtype=torch.int64),
            tuple(label_of(i) for i in ids),
            masks,
        )

    def training_losses(self, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See `TrainableThrough.training_losses`: cross entropy against the classes painted from the masks.

        Objects without a mask, and crowds, are painted as "not known" with their box.
        """
        _training_without_norms(self.model)
        try:
            logits = self.model(self._prepared(images))["out"]
        finally:
            self.model.eval()
        size = images.shape[-2:]
        truth = torch.stack([painted_classes(t, size) for t in targets])[:, None].to(self._device)
        truth = functional.interpolate(truth.float(), size=logits.shape[-2:], mode="nearest")[:, 0].long()
        return {"loss_segmentation": functional.cross_entropy(logits.float(), truth, ignore_index=UNKNOWN)}

    def features(self, images: Tensor) -> list[Tensor]:
        """See `TrainableThrough.features`."""
        return list(self.model.backbone(self._prepared(images)).values())


UNKNOWN = 255


def painted_classes(target: dict[str, Tensor], size: Sequence[int]) -> Tensor:
    """Targets of instances as one map of VOC classes: uint8 [height, width], 0 background, 255 not known."""
    canvas = torch.zeros(*size, dtype=torch.uint8)
    if "masks" not in target:
        raise InvalidInput("semantic segmentation: its losses need 'masks' in every target")
    known = target.get("has_mask", torch.ones(len(target["labels"]), dtype=torch.bool))
    unknown_boxes = torch.cat([target["boxes"][~known], target.get("ignore", target["boxes"][:0])])
    for x0, y0, x1, y1 in unknown_boxes.round().long().tolist():
        canvas[y0:y1, x0:x1] = UNKNOWN
    areas = target["masks"].flatten(1).sum(1, dtype=torch.int64)
    for index in areas.argsort(descending=True).tolist():  # small objects last, on top of large ones
        category = int(target["labels"][index])
        if known[index]:
            voc = VOC_TO_COCO.index(category) if category in VOC_TO_COCO else 0
            canvas[target["masks"][index].bool()] = voc
    return canvas


def _extent(mask: Tensor) -> Tensor:
    rows, columns = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
    corners = [float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1]
    return torch.tensor(corners, dtype=torch.float32)
