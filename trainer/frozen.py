"""The frozen task network as a loss: pretrained weights that stay as they are, gradients to the picture only.

`cloud.tasks` sees to the freezing. The networks' own resize is replaced by a chosen scale here: what is trained on are
crops, and a crop has to be seen at the scale at which the network would see it in the whole picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cloud.tasks.checkpoints import freeze
from cloud.tasks.loading import load_task
from cloud.tasks.torchvision_models import TorchvisionDetector, TorchvisionSegmenter
from cloud.tasks.trunk import IMAGE_MEAN, IMAGE_STD, MobileNetPyramid, folded_state
from cloud.tasks.types import TaskKind
from shared.errors import InvalidBundle, InvalidSettings

IMAGENET_TAPS = (3, 6, 13)  # blocks of MobileNetV2: strides 4, 8 and 16
BENEATH_PYRAMID = (13,)  # of those, beside a pyramid: at few bits the earlier ones cost more than they are worth
IMAGENET_SHORT_SIDE = 320  # what detectors on this trunk resize to
REPEATED = ("pool", "p6", "p7")  # pyramid levels made from others: they would count those twice
PAD_TO = 32


class ImageNetFeatures(nn.Module):
    """MobileNetV2's features after the blocks IMAGENET_TAPS: a proxy that knows no task."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        trunk = MobileNetPyramid()
        try:
            trunk.features.load_state_dict(folded_state(load_file(weights)))
        except (OSError, KeyError, RuntimeError) as error:
            raise InvalidBundle(f"{weights}: expected the weights of torchvision's mobilenet_v2: {error}") from error
        self.blocks = trunk.features[: IMAGENET_TAPS[-1] + 1]

    def forward(self, normalised: Tensor) -> dict[str, Tensor]:
        taps = {}
        for i, block in enumerate(self.blocks):
            normalised = block(normalised)
            if i in IMAGENET_TAPS:
                taps[f"block{i}"] = normalised
        return taps


class FrozenNetwork:
    """A task network that looks at pictures [B, 3, H, W] in [0, 1] at a given scale.

    `task`: one of `cloud.tasks`, None for a trunk alone. `short_side`: pixels to which the network resizes what it is
    given. Not an nn.Module, so that it is neither trained, nor saved, nor wrapped with the codec.
    """

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        short_side: int,
        task: TorchvisionDetector | TorchvisionSegmenter | None = None,
    ) -> None:
        self.name, self.short_side, self._task = name, short_side, task
        self.module: nn.Module = trunk if task is None else task.model
        self.trunk = freeze(trunk)
        # A pyramid alone keeps what its own heads ask for; the generic features under it are what others share.
        self._early = (
            {f"block{i}": trunk.features[i] for i in BENEATH_PYRAMID} if isinstance(trunk, MobileNetPyramid) else {}
        )
        transform = getattr(self.module, "transform", None)
        mean, std = getattr(transform, "image_mean", IMAGE_MEAN), getattr(transform, "image_std", IMAGE_STD)
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> None:
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def features(self, images: Tensor, scale: float, like: Tensor | None = None) -> dict[str, Tensor]:
        """Features of the trunk (early ones, and its pyramid, where it has one), differentiable in `images`.

        `like`: pictures of another size of the same scene; these are seen as large as those would be at `scale`.
        """
        sides = (images if like is None else like).shape[2:]
        height, width = (max(PAD_TO, round(side * scale / PAD_TO) * PAD_TO) for side in sides)
        if (height, width) != tuple(images.shape[2:]):
            images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        early: dict[str, Tensor] = {}
        hooks = [
            block.register_forward_hook(lambda _module, _given, out, name=name: early.__setitem__(name, out))
            for name, block in self._early.items()
        ]
        try:
            found = self.trunk((images - self._mean) / self._std)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(found, Mapping):
            return {"features": found}
        return {**early, **{str(k): v for k, v in found.items() if k not in REPEATED}}

    def training_loss(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], scale: float) -> Tensor:
        """Sum of the network's own training losses, a scalar, on pictures resized by `scale`."""
        task = self._through()
        with _ResizingBy(task, images.shape[2:], scale):
            losses = task.training_losses(images, [dict(t) for t in targets])
        return torch.stack([value.float() for value in losses.values()]).sum()

    def detections(self, images: Tensor, scale: float, *, min_score: float = 0.5) -> list[dict[str, Tensor]]:
        """The network's own detections on `images`, as targets for `training_loss`."""
        task = self._through()
        with _ResizingBy(task, images.shape[2:], scale):
            found = task.predict(list(images), min_score)
        targets = []
        for item in found:
            boxes = item.boxes.clone()  # out of inference mode
            kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
            target = {"boxes": boxes[kept], "labels": item.category_ids.clone()[kept]}
            if item.masks is not None:
                target["masks"] = item.masks.clone()[kept].byte()
                target["has_mask"] = torch.ones(len(target["masks"]), dtype=torch.bool)
            if item.keypoints is not None:
                target["keypoints"] = item.keypoints.clone()[kept]
            targets.append(target)
        return targets

    @property
    def wants_masks(self) -> bool:
        """Whether its training loss reads masks."""
        return self._task is not None and self._task.kind in (
            TaskKind.INSTANCE_SEGMENTATION,
            TaskKind.SEMANTIC_SEGMENTATION,
        )

    def _through(self) -> TorchvisionDetector | TorchvisionSegmenter:
        if self._task is None:
            raise InvalidSettings(f"{self.name}: features only, no training loss; use task_loss 'features'")
        return self._task


class _ResizingBy:
    """While open, a network resizes pictures of `size` by `scale` instead of to its own fixed sides."""

    def __init__(self, task: TorchvisionDetector | TorchvisionSegmenter, size: torch.Size, scale: float) -> None:
        short = max(PAD_TO, round(min(size) * scale / PAD_TO) * PAD_TO)
        if isinstance(task, TorchvisionSegmenter):
            self._of: Any = task
            self._asked: dict[str, Any] = {"SHORT_SIDE": short}
        else:
            self._of = task.model.transform
            self._asked = {"min_size": (short,), "max_size": 1 << 20}
            if self._of.fixed_size is not None:  # SSD resizes to a square
                self._asked["fixed_size"] = (short, short)
        self._own = {name: getattr(self._of, name) for name in self._asked}

    def __enter__(self) -> None:
        for name, value in self._asked.items():
            setattr(self._of, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self._own.items():
            setattr(self._of, name, value)


def load_frozen(network: str, weights: Path | None) -> FrozenNetwork:
    """`imagenet` with its `weights`, or a task network by what `cloud.tasks.load_task` takes.

    Raises InvalidSettings for a network that passes no gradients, InvalidBundle for weights that do not fit.
    """
    if network == "imagenet":
        if weights is None:
            raise InvalidSettings("train codec: network 'imagenet' needs 'network_weights', MobileNetV2's weights file")
        return FrozenNetwork(network, ImageNetFeatures(weights), IMAGENET_SHORT_SIDE)
    task = load_task(network, weights="default" if weights is None else weights)
    if isinstance(task, TorchvisionSegmenter):
        return FrozenNetwork(network, task.model.backbone, task.SHORT_SIDE, task)
    if not isinstance(task, TorchvisionDetector):
        raise InvalidSettings(f"{network}: an ONNX network passes no gradients; train through another one")
    transform = task.model.transform
    fixed = transform.fixed_size
    return FrozenNetwork(network, task.model.backbone, min(transform.min_size if fixed is None else fixed), task)
