"""MobileNetV2 with a feature pyramid: the trunk of both bundled networks.

MobileNetV2 (arXiv 1801.04381) as in torchvision, with two differences that its ImageNet weights ask for: batch
norm is folded into the convolutions, and the five stride-2 convolutions pad as TensorFlow's SAME does (nothing
at the top and left, one at the bottom and right), the very first with the normalised value of mid-grey.

    image --features[0:7]--> c3 (stride 8) --features[7:14]--> c4 (16) --features[14:19]--> c5 (32)
                              |                                 |                            |
                              p3 <------------ up ------------- p4 <---------- up ---------- p5 --> p6 (64)

Feature pyramid: arXiv 1612.03144. Sides must be multiples of 32, which the networks' resize sees to.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
EARLY_BLOCKS = 7  # features[0:7], frozen in training: generic filters, and their output can be cached
C3_CHANNELS, C4_CHANNELS, C5_CHANNELS = 32, 96, 1280
LEVELS = ("p3", "p4", "p5", "p6")


class SameConv2d(nn.Conv2d):
    """A 3x3 stride-2 convolution with TensorFlow's SAME padding for even sides. `fill`: value padded, by channel."""

    def __init__(self, like: nn.Conv2d, fill: Tensor | None = None) -> None:
        super().__init__(like.in_channels, like.out_channels, 3, stride=2, groups=like.groups, bias=True)
        self.register_buffer("fill", fill, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        fill = self.fill
        if not isinstance(fill, Tensor):
            # float32 also under autocast: oneDNN's bfloat16 backward of a strided depthwise convolution is 20 x slower
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(functional.pad(x, (0, 1, 0, 1)).to(self.weight.dtype))
        fill = fill.view(1, -1, 1, 1)
        return super().forward(functional.pad(x - fill, (0, 1, 0, 1)) + fill)


def _without_norms(module: nn.Sequential) -> nn.Sequential:
    """Replace convolution + batch norm by one convolution with bias, and stride-2 padding by SAME, in place."""
    children = list(module.named_children())
    for (name, child), (next_name, following) in zip(children, [*children, ("", None)][1:], strict=True):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            first = child.in_channels == 3
            fill = (0.5 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD) if first else None
            if child.stride == (2, 2):
                setattr(module, name, SameConv2d(child, fill))
            else:
                size, padding = child.kernel_size[0], child.padding[0]
                plain = nn.Conv2d(
                    child.in_channels, child.out_channels, size, padding=padding, groups=child.groups, bias=True
                )
                setattr(module, name, plain)
            setattr(module, next_name, nn.Identity())
        else:
            _without_norms(cast(nn.Sequential, child))
    return module


def folded_state(classifier_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `MobileNetPyramid.features` from one of `torchvision.models.mobilenet_v2`, norms folded in."""
    state: dict[str, Tensor] = {}
    for key in [k for k in classifier_state if k.startswith("features.") and k.endswith("running_var")]:
        prefix, _, index = key.removesuffix(".running_var").rpartition(".")
        norm = f"{prefix}.{index}"
        convolution = f"{prefix}.{int(index) - 1}"
        scale = classifier_state[f"{norm}.weight"].float()
        scale = scale / (classifier_state[f"{norm}.running_var"].float() + 1e-5).sqrt()
        weight = classifier_state[f"{convolution}.weight"].float() * scale.view(-1, 1, 1, 1)
        bias = classifier_state[f"{norm}.bias"].float() - classifier_state[f"{norm}.running_mean"].float() * scale
        name = convolution.removeprefix("features.")
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    return state


def separable(channels_in: int, channels_out: int) -> nn.Sequential:
    """A 3x3 depthwise and a 1x1 convolution: at stride 8 a full 3x3 would cost more than the backbone."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in), nn.Conv2d(channels_in, channels_out, 1)
    )


class MobileNetPyramid(nn.Module):
    """Normalised images [N, 3, H, W], H and W multiples of 32, to p3..p6 [N, channels, H/8.., W/8..] and c5."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.out_channels = channels
        self.features = _without_norms(mobilenet_v2(weights=None).features)
        self.lateral3 = nn.Conv2d(C3_CHANNELS, channels, 1)
        self.lateral4 = nn.Conv2d(C4_CHANNELS, channels, 1)
        self.lateral5 = nn.Conv2d(C5_CHANNELS, channels, 1)
        self.output3 = separable(channels, channels)
        self.output4 = nn.Conv2d(channels, channels, 3, padding=1)
        self.output5 = nn.Conv2d(channels, channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("features"):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.constant_(cast(Tensor, module.bias), 0.0)

    def early(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to c3 [N, 32, H/8, W/8]."""
        x = images
        for block in self.features[:EARLY_BLOCKS]:
            x = block(x)
        return x

    def late(self, c3: Tensor) -> dict[str, Tensor]:
        """c3 to the pyramid ("p3" .. "p6") and "c5", in the order of LEVELS."""
        c4 = c3
        for block in self.features[EARLY_BLOCKS:14]:
            c4 = block(c4)
        c5 = c4
        for block in self.features[14:]:
            c5 = block(c5)
        top = self.lateral5(c5)
        middle = self.lateral4(c4) + functional.interpolate(top, scale_factor=2.0, mode="nearest")
        bottom = self.lateral3(c3) + functional.interpolate(middle, scale_factor=2.0, mode="nearest")
        p5 = self.output5(top)
        p6 = functional.max_pool2d(p5, 1, stride=2)
        return {"p3": self.output3(bottom), "p4": self.output4(middle), "p5": p5, "p6": p6, "c5": c5}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.late(self.early(images))
