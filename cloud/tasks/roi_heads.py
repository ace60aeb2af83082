"""torchvision's RoI heads for truth that is not complete: crowds that are no background, objects without a mask."""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import box_area

from cloud.tasks.adopting import Adopting

IGNORED_OVERLAP = 0.5  # a box with more of its area in an ignored region is not used as background


def overlap_with_ignored(boxes: Tensor, ignored: Tensor) -> Tensor:
    """Share of each box [N, 4] that lies in any one of the ignored regions [K, 4]: float32 [N], in [0, 1]."""
    if len(ignored) == 0:
        return boxes.new_zeros(len(boxes))
    top_left = torch.maximum(boxes[:, None, :2], ignored[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], ignored[None, :, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(2)
    share: Tensor = (shared / box_area(boxes).clamp(min=1e-6)[:, None]).amax(1)
    return share


class PartialTruthRoIHeads(Adopting, RoIHeads):  # type: ignore[misc]  # torchvision is untyped
    """In training, `targets[i]["ignore"]` [K, 4] (xyxy) is no background, and masks count where "has_mask" says so.

    Without "has_mask" every object has one; without "masks" the mask loss is zero. At inference it is torchvision's.
    """

    def has_mask(self) -> bool:
        return not self.training and super().has_mask()

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        result, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training and self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, image_shapes, targets or [])
        return result, losses

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None) -> Any:
        self._ignored = [t.get("ignore", t["boxes"][:0]) for t in targets or []]
        samples = super().select_training_samples(proposals, targets)
        self._samples = samples  # proposals, matched truth, labels, box targets; the mask loss reads them again
        return samples

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for label, boxes, ignored in zip(labels, proposals, self._ignored, strict=True):
            if len(ignored):
                label[(label == 0) & (overlap_with_ignored(boxes, ignored) > IGNORED_OVERLAP)] = -1
        return matched, labels

    def _mask_loss(
        self, features: dict[str, Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> Tensor:
        proposals, matched, labels, _ = self._samples
        self._samples = None
        chosen_boxes, chosen_truth, masks = [], [], []
        for boxes, truth, label, target in zip(proposals, matched, labels, targets, strict=True):
            masked = torch.zeros(max(1, len(target["labels"])), dtype=torch.bool, device=boxes.device)
            if "masks" in target:
                masked[: len(target["labels"])] = target.get("has_mask", torch.tensor(True))
            rows = torch.where((label > 0) & masked[truth])[0]
            chosen_boxes.append(boxes[rows])
            chosen_truth.append(truth[rows])
            masks.append(target.get("masks", boxes.new_zeros(0, 1, 1)))
        if not any(len(rows) for rows in chosen_truth):
            return next(iter(features.values())).sum().float() * 0
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, chosen_boxes, sizes)))
        used = [i for i, rows in enumerate(chosen_truth) if len(rows)]
        loss: Tensor = maskrcnn_loss(
            logits,
            [chosen_boxes[i] for i in used],
            [masks[i] for i in used],
            [targets[i]["labels"] for i in used],
            [chosen_truth[i] for i in used],
        )
        return loss
