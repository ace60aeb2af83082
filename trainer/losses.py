"""The three terms of L_total = w_rate L_rate + w_mse L_mse + w_task L_task (arXiv 2108.09993, eq. 3).

`L_rate`: bits of latents and hyper-latents per pixel (eq. 2). `L_mse`: mean squared error of pixels in [0, 1].
`L_task`, by choice:

* features: distance of the frozen network's features of x_hat to those of x, per tap divided by the tap's variance,
  mean over taps. Needs no labels; a fraction of the whole network's cost (TransTIC, ICCV 2023).
* ground-truth: the frozen network's own training loss on x_hat with the annotations (the paper's).
* self-labels: the same with the network's own detections on x as annotations.

The decoded picture is clamped to [0, 1] straight-through: a hard clamp has no gradient where it acts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.frozen import FrozenNetwork
from trainer.schedule import TERMS, GradientBalance, Weights


@dataclass(frozen=True, slots=True)
class Terms:
    """Values of the three terms for each picture of a batch, float32 [B]; `task` None where it has no weight.

    `rate`: bits per pixel. `weighted`: the terms' contributions to the loss, scalars, by name.
    """

    rate: Tensor
    mse: Tensor
    task: Tensor | None
    weighted: Mapping[str, Tensor]

    def total(self, balance: GradientBalance) -> Tensor:
        """L_total, each weighted term times its balance factor."""
        return torch.stack([balance.factor(name) * value for name, value in self.weighted.items()]).sum()


class _WeightedGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied picture by picture."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradients[0] * weights.view(-1, 1, 1, 1), None


def clamp_straight_through(images: Tensor) -> Tensor:
    """Clamped to [0, 1], with the gradient of the identity."""
    return images + (images.clamp(0, 1) - images).detach()


class TaskLoss:
    """The task term through a frozen network. `kind`: features, ground-truth or self-labels.

    `variances`: of each tap over some clean pictures, measured once by `calibrate` before the first step, so that all
    processes and a resumed run divide by the same numbers.
    """

    def __init__(self, network: FrozenNetwork, kind: str) -> None:
        self.network, self.kind = network, kind
        self.variances: dict[str, float] = {}

    @torch.no_grad()
    def calibrate(self, images: Tensor, scale: float) -> None:
        """Measure the taps' variances on pictures [B, 3, H, W] in [0, 1]."""
        found = self.network.features(images, scale)
        self.variances = {name: max(1e-6, float(value.float().var())) for name, value in found.items()}

    def distances(self, x: Tensor, x_hat: Tensor, scale: float) -> Tensor:
        """Feature distance of each picture, float32 [B]. `scale` is of `x_hat`; `x` may be of another size."""
        with torch.no_grad():
            wanted = self.network.features(x, scale, like=x_hat)
        return self.distances_to(wanted, x_hat, scale)

    def distances_to(self, wanted: Mapping[str, Tensor], x_hat: Tensor, scale: float) -> Tensor:
        """Distance of x_hat's features to `wanted`, those of the clean pictures at the same scale, float32 [B]."""
        got = self.network.features(clamp_straight_through(x_hat), scale)
        each = [
            (got[name].float() - wanted[name].float()).square().flatten(1).mean(1) / variance
            for name, variance in self.variances.items()
        ]
        return torch.stack(each).mean(0)

    def __call__(
        self, x: Tensor, x_hat: Tensor, weights: Tensor, targets: Sequence[Mapping[str, Tensor]] | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The weighted term, a scalar, and each picture's value, [B] (of the batch, where the network gives no other).

        A detector's loss is one number for a batch; the pictures' weights then act on their gradients. `x` may be
        larger than `x_hat` where features are compared.
        """
        if self.kind == "features":
            values = self.distances(x, x_hat, scale)
            return (weights * values).mean(), values
        if self.kind == "self-labels":
            targets = self.network.detections(x, scale)
        if targets is None:
            raise ValueError("ground-truth loss without targets")
        images = _WeightedGradient.apply(clamp_straight_through(x_hat), weights)
        value = self.network.training_loss(images, targets, scale)
        return value + (weights.mean() - 1) * value.detach(), value.detach().expand(len(x))


def codec_terms(
    x: Tensor,
    x_hat: Tensor,
    bits: Tensor,
    weights: Weights,
    task: TaskLoss | None,
    targets: Sequence[Mapping[str, Tensor]] | None,
    scale: float,
    original: Tensor | None = None,
) -> Terms:
    """The three terms for a batch. `x`, `x_hat`: [B, 3, H, W] in [0, 1]. `bits`: of each picture, [B].

    `original`: what x was before it was resized, whose features are what is wanted; None is x.
    """
    rate = bits / (x.shape[2] * x.shape[3])
    mse = (x_hat.float() - x).square().flatten(1).mean(1)
    weighted = {"rate": (weights.rate * rate).mean(), "mse": (weights.mse * mse).mean()}
    values = None
    if task is not None and float(weights.task.max()) > 0:
        wanted = x if original is None else original
        weighted["task"], values = task(wanted, x_hat, weights.task, targets, scale)
    return Terms(rate, mse, values, weighted)


def gradient_norms(terms: Terms, y: Tensor) -> dict[str, float]:
    """Norms of the weighted terms' gradients at the latents `y`, where all three meet. Keeps the graph."""
    norms = {}
    for name in TERMS:
        if name in terms.weighted:
            (gradient,) = torch.autograd.grad(terms.weighted[name], y, retain_graph=True)
            norms[name] = float(gradient.float().norm())
    return norms
