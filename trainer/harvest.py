"""Which of the checkpoints along a run is the best: its rate-distance curve over the eight levels decides.

Measured on tuning pictures only, where everything that is chosen is chosen, with real rounding and the model's own
code lengths. Distance is the frozen network's feature distance, or the squared error where there is no
network. Two curves are compared as Bjontegaard does: mean difference of log rate over the distances both reach.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.crops import Picture, resized, resized_to, spread
from trainer.losses import TaskLoss
from trainer.model import LEVELS, TrainableCodec

SIDE = 384  # pixels; longest side of a tuning picture's middle part that is measured
ALIGN = 64
MIN_OVERLAP = 0.3


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean bits per pixel, squared error and task distance at quality 1 to 8."""

    step: int
    bpp: tuple[float, ...]
    mse: tuple[float, ...]
    distance: tuple[float, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, object]) -> "Curve":
        return Curve(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class TuningView:
    """Tuning pictures as they are coded at some qualities: uint8 [3, H, W], sides multiples of 64.

    `scale`: how the frozen network's own resize scales them. `area`: share of a frame's pixels that one of theirs
    stands for; bits are counted by pixel of the frame. `originals`: the pictures before they were resized, whose
    features are what is wanted; None where they were not.
    """

    pictures: Sequence[Tensor]
    scale: float
    area: float = 1.0
    qualities: tuple[int, ...] = tuple(range(1, LEVELS + 1))
    originals: Sequence[Tensor] | None = None


def tuning_tensors(
    pictures: Sequence[Picture], count: int, zoom: tuple[float, float] = (1.0, 1.0), side: int = SIDE
) -> list[Tensor]:
    """The middle parts of `count` pictures spread over `pictures`, uint8 [3, H, W], at most `side`, multiples of 64.

    `zoom`: range of the factors that training resizes by; these are resized by its geometric mean.
    """
    factor = (zoom[0] * zoom[1]) ** 0.5
    read = (resized(picture.read(), factor) for picture in spread(pictures, count))
    parts = (_middle(rgb, [min(own, side) // ALIGN * ALIGN for own in rgb.shape[:2]]) for rgb in read)
    return [_tensor(part) for part in parts if part.size]


def tuning_pairs(pictures: Sequence[Picture], count: int, zoom: float, side: int = SIDE) -> list[tuple[Tensor, Tensor]]:
    """The middle parts of `count` pictures, and the same resized by `zoom` to sizes as above."""
    pairs = []
    for picture in spread(pictures, count):
        rgb = picture.read()
        height, width = (min(int(own * zoom), side) // ALIGN * ALIGN for own in rgb.shape[:2])
        if min(height, width):
            part = _middle(rgb, [round(own / zoom) for own in (height, width)])
            pairs.append((_tensor(part), _tensor(resized_to(part, (height, width)))))
    return pairs


def _middle(rgb: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    top, left = ((own - wanted) // 2 for own, wanted in zip(rgb.shape[:2], size, strict=True))
    return rgb[top : top + size[0], left : left + size[1]]


def _tensor(rgb: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


@torch.no_grad()
def measure_curve(
    codec: TrainableCodec, views: Sequence[TuningView], task: TaskLoss | None, *, step: int, bf16: bool
) -> Curve:
    """The codec's curve on `views`, which have each quality once. Leaves the codec in the mode it was in."""
    was_training = codec.training
    codec.eval()
    points = np.zeros((3, LEVELS))
    for view in views:
        points[:, [q - 1 for q in view.qualities]] = _measure(codec, view, task, bf16)
    codec.train(was_training)
    bpp, mse, distance = (tuple(row.tolist()) for row in points)
    return Curve(step, bpp, mse, distance)


def _measure(codec: TrainableCodec, view: TuningView, task: TaskLoss | None, bf16: bool) -> NDArray[np.float64]:
    """Means of bits per pixel, squared error and distance at a view's qualities, [3, Q]."""
    device = codec.log_gain.device
    steps = 256 * torch.tensor(view.qualities, device=device)
    sums = np.zeros((3, len(steps)))
    for picture, original in zip(view.pictures, view.originals or view.pictures, strict=True):
        x = (picture.to(device).float() / 255)[None].contiguous(memory_format=torch.channels_last)
        x = x.expand(len(steps), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = codec(x, steps)
            mse = (out.x_hat.float().clamp(0, 1) - x).square().flatten(1).mean(1)
            wanted = x if original is picture else (original.to(device).float() / 255)[None].expand(len(x), -1, -1, -1)
            distance = mse if task is None else task.distances(wanted, out.x_hat, view.scale)
        bpp = view.area * (out.bits_y + out.bits_z) / (x.shape[2] * x.shape[3])
        sums += torch.stack([bpp.float(), mse, distance]).cpu().numpy()
    return sums / len(view.pictures)


def rate_gap(curve: Curve, reference: Curve) -> float:
    """Mean rate of `curve` against `reference` at equal distance: -0.1 is ten percent fewer bits.

    Infinity where the curves share less than MIN_OVERLAP of the reference's range of distances.
    """
    mine, theirs = _monotone(curve), _monotone(reference)
    low, high = max(mine[0][0], theirs[0][0]), min(mine[0][-1], theirs[0][-1])
    if high - low < MIN_OVERLAP * (theirs[0][-1] - theirs[0][0]) or high <= low:
        return float("inf")
    grid = np.linspace(low, high, 200)
    return float(np.exp(np.mean(np.interp(grid, *mine) - np.interp(grid, *theirs))) - 1)


def _monotone(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Log distance ascending and the least log rate that reaches it."""
    distance = np.log(np.maximum(curve.distance, 1e-9))
    rate = np.log(np.maximum(curve.bpp, 1e-9))
    order = np.argsort(distance)
    return distance[order], np.minimum.accumulate(rate[order])
