"""RoIAlign as separable interpolation, because the native operator's CPU backward is the brake of training.

Bilinear sampling on a regular grid is separable: a pooled region is ``Wy @ F @ Wx^T`` with one small matrix per
axis, so forward and backward are matrix products. Values are those of ``torchvision.ops.roi_align`` with
``aligned=True`` (Mask R-CNN, arXiv 1703.06870; the half-pixel shift as in Detectron2), which is used itself
wherever no gradient is asked for.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

SAMPLES = 2  # sampling points per bin and axis


def axis_weights(start: Tensor, end: Tensor, size: int, bins: int) -> Tensor:
    """Interpolation weights along one axis.

    `start`, `end`: float32 [R], the regions' sides in feature cells (half-pixel shift applied). `size`: cells of
    the map along the axis. Returns float32 [R, bins, size]; a row sums to 1 where its samples lie on the map.
    """
    steps = (torch.arange(bins * SAMPLES, device=start.device, dtype=start.dtype) + 0.5) / (bins * SAMPLES)
    points = start[:, None] + steps[None, :] * (end - start)[:, None]  # [R, bins * SAMPLES]
    inside = (points >= -1.0) & (points <= size)
    points = points.clamp(0, size - 1)
    cells = torch.arange(size, device=start.device, dtype=start.dtype)
    weights = (1 - (points[..., None] - cells).abs()).clamp_(min=0) * inside[..., None]  # hat function
    return weights.view(len(start), bins, SAMPLES, size).mean(2)


def separable_roi_align(feature: Tensor, boxes: list[Tensor], bins: int, scale: float) -> Tensor:
    """Pool `boxes` from one feature map.

    `feature`: [N, C, H, W]. `boxes`: per image float32 [R_i, 4], xyxy in pixels. `scale`: cells per pixel.
    Returns [sum R_i, bins, bins, C] in image order, differentiable with respect to `feature`.
    """
    channels, height, width = feature.shape[1:]
    pooled = []
    for image, image_boxes in zip(feature.permute(0, 2, 3, 1), boxes, strict=True):
        if len(image_boxes) == 0:
            continue
        x0, y0, x1, y1 = (image_boxes * scale - 0.5).unbind(1)
        rows = axis_weights(y0, y1, height, bins).to(feature.dtype)
        columns = axis_weights(x0, x1, width, bins).to(feature.dtype)
        strips = rows.reshape(-1, height) @ image.reshape(height, width * channels)  # [R * bins, W * C]
        pooled.append(columns[:, None] @ strips.view(len(image_boxes), bins, width, channels))
    return torch.cat(pooled) if pooled else feature.new_zeros(0, bins, bins, channels)


def pool_regions(feature: Tensor, boxes: list[Tensor], bins: int, scale: float) -> Tensor:
    """`separable_roi_align` where a gradient on CPU is asked for, the native operator elsewhere.

    Returns [sum R_i, bins, bins, C] in image order.
    """
    if feature.requires_grad and feature.device.type == "cpu":
        return separable_roi_align(feature, boxes, bins, scale)
    pooled: Tensor = roi_align(feature.float(), boxes, (bins, bins), scale, sampling_ratio=SAMPLES, aligned=True)
    return pooled.permute(0, 2, 3, 1)


def region_means(feature: Tensor, boxes: list[Tensor], scale: float, bins: int = 4) -> Tensor:
    """Mean of `feature` [N, C, H, W] under each box: [sum R_i, C]. One matrix product per image."""
    height, width = feature.shape[2:]
    means = []
    for image, image_boxes in zip(feature.permute(0, 2, 3, 1), boxes, strict=True):
        x0, y0, x1, y1 = (image_boxes * scale - 0.5).unbind(1)
        rows = axis_weights(y0, y1, height, bins).mean(1)
        columns = axis_weights(x0, x1, width, bins).mean(1)
        window = (rows[:, :, None] * columns[:, None, :]).reshape(len(image_boxes), height * width)
        means.append(window.to(feature.dtype) @ image.reshape(height * width, -1))
    return torch.cat(means)


class Reordered(torch.autograd.Function):
    """Rows of [R, ...] in another order. `order` is a permutation, so the backward is a gather, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, torch.argsort(order)), None
