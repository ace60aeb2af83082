"""What content-adaptive encoding brings: `python -m bench.effort --images DIR`.

Pictures are coded plainly at every quality, and with `--steps` steps of effort at `--qualities`; rates are whole files,
distances those of the features of the frozen network that the bundle was trained through. The gain at a quality is the
rate with effort against the plain curve's at the distance reached, rates and distances being means over the pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cli.compress import labourer
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from trainer.crops import Picture, list_pictures, spread, tuning_pictures
from trainer.frozen import load_frozen
from trainer.losses import TaskLoss
from trainer.model import LEVELS

Encode = Callable[[Frame, float], Bitstream]


class Measured:
    """Sums over pictures of bits per pixel, feature distance and seconds, by quality."""

    def __init__(self) -> None:
        self.sums = np.zeros((LEVELS, 3))

    def add(self, quality: int, values: tuple[float, float, float]) -> None:
        self.sums[quality - 1] += values


def measure(codec: Codec, pictures: list[Picture], qualities: list[int], steps: int) -> tuple[Measured, Measured]:
    """The plain encoding at every quality, and with effort at `qualities`."""
    task = TaskLoss(load_frozen(str(codec.bundle.info["task_network"]), None), "features")
    with_effort = labourer(codec, steps)
    plain, effort = Measured(), Measured()
    for picture in track(pictures, "pictures", console=Console(stderr=True)):
        frame = Frame(picture.read())
        for quality in range(1, LEVELS + 1):
            plain.add(quality, _point(codec, codec.encode, frame, quality, task))
        for quality in qualities:
            effort.add(quality, _point(codec, with_effort, frame, quality, task))
    return plain, effort


@torch.no_grad()
def _distance(task: TaskLoss, frame: Frame, decoded: Frame) -> float:
    x, x_hat = (torch.from_numpy(f.rgb.copy()).permute(2, 0, 1)[None].float() / 255 for f in (frame, decoded))
    scale = task.network.short_side / min(frame.height, frame.width)
    if not task.variances:
        task.calibrate(x, scale)
    return float(task.distances(x, x_hat, scale)[0])


def _point(codec: Codec, encode: Encode, frame: Frame, quality: int, task: TaskLoss) -> tuple[float, float, float]:
    started = time.perf_counter()
    stream = encode(frame, quality)
    seconds = time.perf_counter() - started
    bpp = 8 * len(to_bytes(stream)) / (frame.height * frame.width)
    return bpp, _distance(task, frame, codec.decode(stream)), seconds


def gain(plain: Measured, effort: Measured, quality: int) -> float:
    """Log of the rate with effort at a quality over the plain one at equal distance."""
    rates, distances = np.log(plain.sums[::-1, 0]), np.log(plain.sums[::-1, 1])
    rate, distance = np.log(effort.sums[quality - 1, :2])
    return float(rate - np.interp(distance, distances, rates))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures; of it, the tuning split's")
    parser.add_argument("--model", default="detection", help="bundle name or folder")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--qualities", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    codec = Codec.load(given.model)
    found = spread(tuning_pictures(given.images) or list_pictures(given.images, None), given.pictures)
    plain, effort = measure(codec, found, given.qualities, given.steps)
    gains = {q: 100 * (np.exp(gain(plain, effort, q)) - 1) for q in given.qualities}
    if given.json:
        rows = [
            {"quality": q, "plain": (plain.sums[q - 1] / len(found)).tolist(),
             "effort": (effort.sums[q - 1] / len(found)).tolist(), "gain_percent": gains[q]}
            for q in given.qualities
        ]  # fmt: skip
        json.dump({"pictures": len(found), "steps": given.steps, "rows": rows}, sys.stdout, indent=2)
        return 0
    table = Table(title=f"{given.steps} steps of effort, {len(found)} pictures, model {codec.model_id[:8]}")
    for name in (
        "quality",
        "plain: bpp",
        "distance",
        "effort: bpp",
        "distance",
        "bits at equal distance",
        "s a picture",
    ):
        table.add_column(name, justify="right")
    for q in given.qualities:
        a, b = (measured.sums[q - 1] / len(found) for measured in (plain, effort))
        table.add_row(
            str(q), f"{a[0]:.4f}", f"{a[1]:.3f}", f"{b[0]:.4f}", f"{b[1]:.3f}", f"{gains[q]:+.1f} %", f"{b[2]:.1f}"
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
