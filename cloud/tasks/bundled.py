"""The two small networks that ship with Sightline: Faster R-CNN and Mask R-CNN on MobileNetV2-FPN.

They are torchvision's detectors (`GeneralizedRCNN`, its RPN and RoI heads) around a trunk and heads small enough
to ship: <= 12 MB in fp16. What differs from torchvision's builders, and why:

* `trunk.MobileNetPyramid`: norms folded away, pyramid from stride 8, separable convolutions at the finest level.
* The box head sees 64 channels projected from the pyramid and, beside them, the mean of c5 under the region: the
  ImageNet features know many classes of which the training set has a dozen examples.
* Box regression and masks are class-agnostic, for the same reason.
* Anchors, RPN outputs and box deltas stay float32 under autocast: in bfloat16 boxes are off by up to 8 pixels.
* Resizing is anti-aliased and fixed: short side 320, long side at most 640.
* Crowd regions (`targets[i]["ignore"]`, xyxy) are neither objects nor background in training.

Faster R-CNN: arXiv 1506.01497; Mask R-CNN: arXiv 1703.06870.
"""

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_area

from cloud.tasks.instance_masks import DecidedMasks
from cloud.tasks.roi_align import Reordered, pool_regions, region_means
from cloud.tasks.roi_heads import PartialTruthRoIHeads, overlap_with_ignored
from cloud.tasks.trunk import C5_CHANNELS, IMAGE_MEAN, IMAGE_STD, LEVELS, MobileNetPyramid, separable

NUM_CLASSES = 91  # 0 is background, COCO's 1..90 with gaps, as in torchvision
SHORT_SIDE, LONG_SIDE = 320, 640  # pixels
ANCHOR_SIZES = ((24,), (56,), (120,), (240,))  # pixels, for p3..p6
ASPECT_RATIOS = (0.5, 1.0, 2.0)
LEVEL_LIMITS = (64.0, 128.0)  # a region whose side (square root of area) is below the first is pooled from p3, ...
MASK_WIDTH = 64
POOL_STRIDES = (8, 16, 32)


class AntialiasedTransform(DecidedMasks):
    """torchvision's transform with anti-aliased resizing, differentiable with respect to the image."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        scale = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
        new = (max(1, round(height * scale)), max(1, round(width * scale)))
        if new != (height, width):
            image = functional.interpolate(image[None], size=new, mode="bilinear", antialias=True)[0]
        if target is not None:
            ratio = torch.tensor([new[1] / width, new[0] / height] * 2, dtype=torch.float32, device=image.device)
            target = {k: v * ratio if k in ("boxes", "ignore") else v for k, v in target.items()}
            if "masks" in target:
                masks = functional.interpolate(target["masks"][:, None].float(), size=new, mode="nearest")
                target["masks"] = masks[:, 0].byte()
        return image, target


class RegionHead(nn.Module):
    """RPN head shared by all levels. Returns float32 whatever the autocast type."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.conv = separable(channels, channels)
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, anchors * 4, 1)
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(cast(Tensor, layer.bias), 0.0)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [functional.relu(self.conv(level)) for level in levels]
        return [self.objectness(h).float() for h in hidden], [self.deltas(h).float() for h in hidden]


class Float32Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's anchors, in float32 also where the features are not."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        shapes = [torch.empty(1, device=f.device).expand(f.shape) for f in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, shapes)
        return anchors


class PyramidRPN(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's RPN on p3..p6; what lies mostly in an ignored region is not used as background."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        levels = OrderedDict((k, features[k]) for k in LEVELS)
        proposals: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, levels, targets)
        return proposals

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            if len(target.get("ignore", ())):
                label[(label == 0) & (overlap_with_ignored(anchor, target["ignore"]) > 0.5)] = -1.0
        return labels, matched


class RegionPool(nn.Module):
    """Regions to what the box head reads: 7x7 of 64 projected pyramid channels, and the mean of c5.

    Called as torchvision's RoI heads call `box_roi_pool`; returns [R, 64 * 49 + 1280].
    """

    def __init__(self, channels: int, projected: int = 64, bins: int = 7) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, projected, 1)
        self.bins = bins
        self.out_features = projected * bins * bins + C5_CHANNELS

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        pooled = pool_pyramid([self.project(features[k]) for k in LEVELS[:3]], boxes, self.bins)
        context = region_means(features["c5"], boxes, 1 / 32)
        return torch.cat([pooled.flatten(1), context.to(pooled.dtype)], dim=1)


def pool_pyramid(maps: list[Tensor], boxes: list[Tensor], bins: int) -> Tensor:
    """Pool each region from the level its size asks for. `maps`: p3, p4, p5. Returns [sum R_i, bins, bins, C]."""
    limits = torch.tensor(LEVEL_LIMITS, device=boxes[0].device)
    every = torch.cat(boxes)
    level_of = torch.bucketize(box_area(every).clamp(min=0).sqrt(), limits, right=True)
    by_image = torch.split(level_of, [len(b) for b in boxes])
    pooled, order = [], []
    for level, (feature, stride) in enumerate(zip(maps, POOL_STRIDES, strict=True)):
        here = [b[chosen == level] for b, chosen in zip(boxes, by_image, strict=True)]
        pooled.append(pool_regions(feature, here, bins, 1 / stride))
        order.append(torch.where(level_of == level)[0])
    places = torch.argsort(torch.cat(order))
    regions: Tensor = Reordered.apply(torch.cat(pooled), places)
    return regions


class BoxHead(nn.Module):
    """[R, features] to [R, width]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(features, width)
        self.fc7 = nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.fc7(self.drop(functional.relu(self.fc6(x)))))


class BoxPredictor(nn.Module):
    """[R, width] to class logits [R, classes] and one box delta repeated for each class, both float32."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.scores = nn.Linear(width, classes)
        self.deltas = nn.Linear(width, 4)
        self.classes = classes
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x).float(), self.deltas(x).float().repeat(1, self.classes)


class MaskPool(nn.Module):
    """Regions to what the mask head reads, called as torchvision calls `mask_roi_pool`: [R, channels, 14, 14]."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return pool_pyramid([features[k] for k in LEVELS[:3]], boxes, 14).permute(0, 3, 1, 2)


class MaskHead(nn.Sequential):
    """[R, channels, 14, 14] to [R, width, 28, 28]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        for index in range(3):
            self.append(nn.Conv2d(channels if index == 0 else width, width, 3, padding=1))
            self.append(nn.ReLU())
        self.append(nn.ConvTranspose2d(width, width, 2, stride=2))
        self.append(nn.ReLU())
        for module in self:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(cast(Tensor, module.bias), 0.0)


class MaskPredictor(nn.Module):
    """[R, width, 28, 28] to one mask's logits, shown for each class: float32 [R, classes, 28, 28]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Conv2d(width, 1, 1)
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(x).float()
        return logits.expand(-1, self.classes, -1, -1)


class BundledRCNN(GeneralizedRCNN):  # type: ignore[misc]  # torchvision is untyped
    """Faster R-CNN, or with `masks` Mask R-CNN, on MobileNetV2-FPN, with torchvision's calling convention.

    In training it can also be entered behind the frozen part of the trunk (`losses_from_early`).
    """

    def __init__(
        self, num_classes: int = NUM_CLASSES, channels: int = 128, width: int = 512, *, masks: bool = False
    ) -> None:
        trunk = MobileNetPyramid(channels)
        anchors = Float32Anchors(ANCHOR_SIZES, (ASPECT_RATIOS,) * len(ANCHOR_SIZES))
        rpn = PyramidRPN(
            anchors, RegionHead(channels, len(ASPECT_RATIOS)), 0.7, 0.3, 128, 0.5,
            {"training": 300, "testing": 600}, {"training": 300, "testing": 300}, 0.7,
        )  # fmt: skip
        pool = RegionPool(channels)
        heads = PartialTruthRoIHeads(
            pool, BoxHead(pool.out_features, width), BoxPredictor(width, num_classes),
            0.5, 0.5, 64, 0.3, None, 0.02, 0.5, 100,
        )  # fmt: skip
        if masks:
            heads.mask_roi_pool = MaskPool()
            heads.mask_head = MaskHead(channels, MASK_WIDTH)
            heads.mask_predictor = MaskPredictor(MASK_WIDTH, num_classes)
        transform = AntialiasedTransform(SHORT_SIDE, LONG_SIDE, list(IMAGE_MEAN), list(IMAGE_STD))
        super().__init__(trunk, rpn, heads, transform)

    def losses_from_early(
        self, c3: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Training losses from `trunk.early`'s output [N, 32, H/8, W/8]. `sizes`: (height, width) in pixels."""
        count, _, height, width = c3.shape
        images = ImageList(torch.empty(1).expand(count, 3, height * 8, width * 8), sizes)
        features = self.backbone.late(c3)
        proposals, rpn_losses = self.rpn(images, features, targets)
        _, head_losses = self.roi_heads(features, proposals, sizes, targets)
        return {**head_losses, **rpn_losses}
