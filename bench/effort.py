"""What content-adaptive encoding brings: `python -m bench.effort --images DIR`.

Pictures are coded plainly at every quality, and with `--steps` steps of effort at `--qualities`; rates are whole files,
distances those of the features of the frozen network that the bundle was trained through. The gain at a quality is the
rate with effort against the plain curve's at the distance reached, rates and distances being means over the pictures.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shared.codec.codec import Codec
from trainer.crops import list_pictures, spread, tuning_pictures
from trainer.effort import labourer
from trainer.frozen import load_frozen
from trainer.losses import TaskLoss
from trainer.scales import measure


def gain(plain: NDArray[np.float64], effort: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rate with effort against the plain one at equal distance, less 1. Rows of rate and distance, plain at all
    qualities, ascending."""
    rates, distances = np.log(plain[::-1]).T
    rate, distance = np.log(effort).T
    return np.exp(rate - np.interp(distance, distances, rates)) - 1


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
    task = TaskLoss(load_frozen(str(codec.bundle.info["task_network"]), None), "features")
    plain = measure(codec, found, task, "plain")
    started = time.perf_counter()
    work = labourer(codec, given.steps)
    effort = measure(codec, found, task, "with effort", qualities=given.qualities, encode=work)
    seconds = (time.perf_counter() - started) / len(found) / len(given.qualities)
    gains = 100 * gain(plain, effort)
    rows = [
        {"quality": q, "plain": plain[q - 1].tolist(), "effort": effort[i].tolist(), "gain_percent": gains[i]}
        for i, q in enumerate(given.qualities)
    ]
    if given.json:
        result = {"pictures": len(found), "steps": given.steps, "seconds_a_picture": seconds, "rows": rows}
        json.dump(result, sys.stdout, indent=2)
        return 0
    about = f"{given.steps} steps of effort, {seconds:.1f} s a picture, {len(found)} pictures"
    table = Table(title=f"{about}, model {codec.model_id[:8]}")
    for name in ("quality", "plain: bpp", "distance", "effort: bpp", "distance", "bits at equal distance"):
        table.add_column(name, justify="right")
    for row in rows:
        points = (f"{v:.4f}" for v in (*row["plain"], *row["effort"]))
        table.add_row(str(row["quality"]), *points, f"{row['gain_percent']:+.1f} %")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
