"""The frozen task network as a loss: pretrained weights that stay as they are, gradients to the picture only.

torchvision's detectors give losses in train() only, so for that the model is in train() and every norm and dropout
in eval(); `requires_grad` is off everywhere; `state_hash` is equal before and after a run (tested). The networks'
own resize is replaced by a chosen scale: what is trained are crops, and a crop has to be seen at the scale at which
the network would see it in the whole picture.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cloud.tasks.trunk import IMAGE_MEAN, IMAGE_STD, MobileNetPyramid, folded_state
from shared.errors import InvalidBundle, InvalidSettings

IMAGENET_TAPS = (3, 6, 13)  # blocks of MobileNetV2: strides 4, 8 and 16
IMAGENET_SHORT_SIDE = 320  # what detectors on this trunk resize to
PAD_TO = 32


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of the state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def freeze(module: nn.Module) -> nn.Module:
    """No gradients to the weights, eval() everywhere."""
    module.requires_grad_(False)
    return module.eval()


def train_without_norms(module: nn.Module) -> None:
    """train(), which makes detectors return losses, but every norm and dropout in eval(), so that nothing moves."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
            part.eval()


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
    """A task network that looks at pictures [B, 3, H, W] in [0, 1] at a given scale. Not an nn.Module, so that it is
    neither trained, nor saved, nor wrapped with the codec.
    """

    def __init__(self, module: nn.Module, name: str, *, short_side: int) -> None:
        self.module, self.name, self.short_side = freeze(module), name, short_side
        transform = getattr(module, "transform", None)
        mean = getattr(transform, "image_mean", None) or IMAGE_MEAN
        std = getattr(transform, "image_std", None) or IMAGE_STD
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.trunk: nn.Module = module if isinstance(module, ImageNetFeatures) else cast(nn.Module, module.backbone)

    def to(self, device: torch.device) -> None:
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def features(self, images: Tensor, scale: float) -> dict[str, Tensor]:
        """Features of the trunk (and its pyramid, where it has one), differentiable with respect to `images`."""
        height, width = (max(PAD_TO, round(side * scale / PAD_TO) * PAD_TO) for side in images.shape[2:])
        if (height, width) != tuple(images.shape[2:]):
            images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        found = self.trunk((images - self._mean) / self._std)
        return {str(k): v for k, v in found.items()} if isinstance(found, Mapping) else {"features": found}

    @property
    def gives_losses(self) -> bool:
        """Whether the network has a training loss of its own: torchvision's detectors do."""
        return hasattr(self.module, "transform") and hasattr(self.module.transform, "min_size")

    def training_loss(self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], scale: float) -> Tensor:
        """Sum of the network's own training losses, a scalar, on pictures resized by `scale`."""
        if not self.gives_losses:
            raise InvalidSettings(f"{self.name}: this network gives no training loss; use task_loss 'features'")
        with _resizing_by(self.module, images.shape[2:], scale):
            train_without_norms(self.module)
            try:
                losses = self.module(list(images), [dict(t) for t in targets])
            finally:
                self.module.eval()
        return torch.stack([value.float() for value in losses.values()]).sum()

    @torch.no_grad()
    def detections(self, images: Tensor, scale: float, *, threshold: float = 0.5) -> list[dict[str, Tensor]]:
        """The network's own detections on `images`, as targets for `training_loss`."""
        with _resizing_by(self.module, images.shape[2:], scale):
            found = self.module.eval()(list(images))
        targets = []
        for item in found:
            sure = item["scores"] >= threshold
            boxes = item["boxes"][sure]
            sure_and_sized = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
            target = {"boxes": boxes[sure_and_sized], "labels": item["labels"][sure][sure_and_sized]}
            if "masks" in item:
                target["masks"] = (item["masks"][sure][sure_and_sized][:, 0] > 0.5).byte()
            if "keypoints" in item:
                target["keypoints"] = item["keypoints"][sure][sure_and_sized]
            targets.append(target)
        return targets


class _resizing_by:
    """While open, a detector resizes pictures of `size` by `scale` instead of to its own fixed sides."""

    def __init__(self, module: nn.Module, size: torch.Size, scale: float) -> None:
        self._transform: Any = module.transform
        short = max(PAD_TO, round(min(size) * scale / PAD_TO) * PAD_TO)
        self._sides = ((short,), 1 << 20)

    def __enter__(self) -> None:
        transform = self._transform
        self._own = (transform.min_size, transform.max_size, getattr(transform, "fixed_size", None))
        transform.min_size, transform.max_size = self._sides
        if self._own[2] is not None:  # SSD resizes to a square
            transform.fixed_size = (self._sides[0][0], self._sides[0][0])

    def __exit__(self, *_: object) -> None:
        self._transform.min_size, self._transform.max_size, fixed = self._own
        if fixed is not None:
            self._transform.fixed_size = fixed


def load_frozen(network: str, weights: Path | None) -> FrozenNetwork:
    """`imagenet`, or a task network by the name or path that `cloud.tasks.load_task` takes.

    Raises InvalidSettings for a network that gives no gradients, InvalidBundle for weights that do not fit.
    """
    if network == "imagenet":
        if weights is None:
            raise InvalidSettings("train codec: network 'imagenet' needs 'network_weights', MobileNetV2's weights file")
        return FrozenNetwork(ImageNetFeatures(weights), network, short_side=IMAGENET_SHORT_SIDE)
    from cloud.tasks import load_task

    module = load_task(network)
    if not isinstance(module, nn.Module) or not hasattr(module, "backbone"):
        raise InvalidSettings(f"{network}: an ONNX network passes no gradients; train through another one")
    transform = getattr(module, "transform", None)
    short = min(getattr(transform, "min_size", (520,)))  # torchvision's segmentation presets resize to 520
    return FrozenNetwork(module, network, short_side=short)
