"""Which of the checkpoints along a run is the best: its rate-distance curve over the eight levels decides.

Measured on tuning pictures only, where everything that is chosen is chosen, with real rounding and the model's own
code lengths. Distance is the frozen network's feature distance, or the squared error where there is no
network. Two curves are compared as Bjontegaard does: mean difference of log rate over the distances both reach.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.crops import Picture, resized, spread
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


def tuning_tensors(
    pictures: Sequence[Picture], count: int, zoom: tuple[float, float] = (1.0, 1.0), side: int = SIDE
) -> list[Tensor]:
    """The middle parts of `count` pictures spread over `pictures`, uint8 [3, H, W], at most `side`, multiples of 64.

    `zoom`: range of the factors that training resizes by; these are resized by its geometric mean.
    """
    factor = (zoom[0] * zoom[1]) ** 0.5
    tensors = []
    for picture in spread(pictures, count):
        rgb = resized(picture.read(), factor)
        height, width = (min(own, side) // ALIGN * ALIGN for own in rgb.shape[:2])
        if min(height, width) == 0:
            continue
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        part = rgb[top : top + height, left : left + width]
        tensors.append(torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1))
    return tensors


@torch.no_grad()
def measure_curve(
    codec: TrainableCodec, pictures: Sequence[Tensor], task: TaskLoss | None, *, scale: float, step: int, bf16: bool
) -> Curve:
    """The codec's curve on `pictures`. Leaves the codec in the mode it was in."""
    was_training = codec.training
    codec.eval()
    device = codec.log_gain.device
    steps = 256 * torch.arange(1, LEVELS + 1, device=device)
    sums = np.zeros((3, LEVELS))
    for picture in pictures:
        x = (picture.to(device).float() / 255)[None].contiguous(memory_format=torch.channels_last)
        x = x.expand(LEVELS, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = codec(x, steps)
            mse = (out.x_hat.float().clamp(0, 1) - x).square().flatten(1).mean(1)
            distance = mse if task is None else task.distances(x, out.x_hat, scale)
        bpp = (out.bits_y + out.bits_z) / (x.shape[2] * x.shape[3])
        sums += torch.stack([bpp.float(), mse, distance]).cpu().numpy()
    codec.train(was_training)
    bpp_l, mse_l, distance_l = ((row / len(pictures)).tolist() for row in sums)
    return Curve(step, tuple(bpp_l), tuple(mse_l), tuple(distance_l))


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
