"""What each choice in training a codec brings: `python -m bench.ablations --images DIR --annotations FILE --out DIR`.

Short runs from nothing that differ in one choice each, all on the same crops; then the rate of each on tuning pictures
at the reference's feature distance and at its squared error. `--only NAME` makes some of the runs, so that several
processes may share them; a run that was killed goes on, one that is done is left. CompressAI's mbt2018-mean, trained
for rate and MSE on the same crops, gets the minutes that the reference took: as many steps as it can make of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressai.models import MeanScaleHyperprior
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.effort import gain
from trainer.checkpoints import read_checkpoint, save_checkpoint, starting_model
from trainer.crops import Crops, collate, list_pictures, tuning_pictures
from trainer.frozen import load_frozen
from trainer.harvest import Curve, TuningView, measure_curve, rate_gap, tuning_tensors
from trainer.losses import TaskLoss
from trainer.schedule import Schedule
from trainer.settings import TrainSettings
from trainer.train import train_codec

NETWORK = "faster-rcnn-mobilenetv2"
REFERENCE = "reference"
FIXED = Schedule(distortion_until=0.0, task_at=0.0)
MSE_ONLY = Schedule(mse_end=Schedule().mse_start)
# What each run has other than the reference, which is the recipe of the `detection` bundle.
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "fixed-weights": {"schedule": FIXED, "balance_every": 0},
    "mse-only": {"task_loss": "none", "schedule": MSE_ONLY},
    "task-loss": {"task_loss": "ground-truth"},
    "quality-3-alone": {"quality": 3},
    "quality-6-alone": {"quality": 6},
}
PEERS = {"mbt2018-mean-0.0035": 0.0035, "mbt2018-mean-0.013": 0.013}  # lambda, of its MSE of pixels in [0, 255]
PEER_CHANNELS = (128, 192)
TUNING_PICTURES = 24


@dataclass(frozen=True, slots=True)
class Point:
    """Means over the tuning pictures: bits a pixel, squared error of pixels in [0, 1], feature distance."""

    bpp: float
    mse: float
    distance: float


def settings_of(name: str, images: Path, annotations: Path, out: Path, steps: int) -> TrainSettings:
    """Of the run called `name`, one of VARIANTS."""
    last = out / name / "last.pt"
    common = TrainSettings(
        out=out / name, images=images, resume=last if last.exists() else None, name=name, network=NETWORK,
        short_side_px=320, steps=steps, crop=192, zoom=(0.6, 1.0), rate=5e-4, ema=0.99, threads=1, bf16=True,
        accelerator="cpu", harvest_minutes=60.0,
    )  # fmt: skip
    labelled = VARIANTS[name].get("task_loss") == "ground-truth"
    return replace(common, **VARIANTS[name], annotations=annotations if labelled else None)


def train_peer(price: float, crops: Crops, batch: int, rate: float, seconds: float) -> tuple[MeanScaleHyperprior, int]:
    """mbt2018-mean from nothing for so long, with the reference's optimiser, schedule and crops. And its steps."""
    torch.manual_seed(0)
    peer = MeanScaleHyperprior(*PEER_CHANNELS).to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(peer.parameters(), lr=rate, fused=True)
    schedule, step, started = Schedule(), 0, time.monotonic()
    for _ in track(_until(started + seconds), "mbt2018-mean", total=None, console=Console(stderr=True)):
        progress = min(1.0, (time.monotonic() - started) / seconds)
        optimiser.param_groups[0]["lr"] = rate * schedule.learning_rate(progress, step)
        x = collate([crops[step * batch + i] for i in range(batch)]).crops.float() / 255
        x_hat, bits = peer_codes(peer, x)
        pixels = x.shape[2] * x.shape[3]
        loss = bits.mean() / pixels + price * 255**2 * (x_hat - x).square().mean() + peer.aux_loss()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimiser.step()
        step += 1
    return peer.eval(), step


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield None


def peer_codes(peer: MeanScaleHyperprior, x: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat and bits a picture [B]: the peer's own forward pass, its convolutions in bfloat16 as ours are."""
    with torch.autocast("cpu", torch.bfloat16):
        y = peer.g_a(x).float()
        z = peer.h_a(y).float()
        with torch.autocast("cpu", enabled=False):
            z_hat, z_likelihoods = peer.entropy_bottleneck(z)
        scales, means = peer.h_s(z_hat).float().chunk(2, 1)
        with torch.autocast("cpu", enabled=False):
            y_hat, y_likelihoods = peer.gaussian_conditional(y, scales, means=means)
        x_hat = peer.g_s(y_hat).float()
    bits = -(torch.log2(y_likelihoods).flatten(1).sum(1) + torch.log2(z_likelihoods).flatten(1).sum(1))
    return x_hat, bits


@torch.no_grad()
def measure_peer(peer: MeanScaleHyperprior, tuning: list[Tensor], task: TaskLoss) -> Point:
    sums = np.zeros(3)
    for picture in tuning:
        x = (picture.float() / 255)[None]
        x_hat, bits = peer_codes(peer, x)
        with torch.autocast("cpu", torch.bfloat16):
            distance = task.distances(x, x_hat, 1.0)
        mse = (x_hat.clamp(0, 1) - x).square().mean()
        sums += [float(bits) / x[0, 0].numel(), float(mse), float(distance)]
    return Point(*(sums / len(tuning)))


def at_equal(point: Point, reference: Curve, by: str) -> float | None:
    """The point's rate against the reference's at its distance or MSE (`by`), less 1; None out of its range."""
    reached, wanted = getattr(reference, by), getattr(point, by)
    if not reached[-1] <= wanted <= reached[0]:
        return None
    return float(gain(np.column_stack([reference.bpp, reached]), np.array([[point.bpp, wanted]]))[0])


def compared(name: str, found: dict[str, Any], reference: Curve) -> dict[str, Any]:
    """A row: rate at equal feature distance and at equal MSE, of the one trained point or as mean over the curve."""
    point = _trained_point(name, found)
    if point is None:
        curve = Curve.from_dict(found["curve"])
        by_mse = [replace(c, distance=c.mse) for c in (curve, reference)]
        distance, mse = rate_gap(curve, reference), rate_gap(*by_mse)
    else:
        distance, mse = at_equal(point, reference, "distance"), at_equal(point, reference, "mse")
    return {"name": name, "steps": found["steps"], "minutes": found["minutes"], "distance": distance, "mse": mse}


def _trained_point(name: str, found: dict[str, Any]) -> Point | None:
    """Of a run of a single rate; None of one of all."""
    if "point" in found:
        return Point(**found["point"])
    quality = VARIANTS[name].get("quality")
    return None if quality is None else Point(*(found["curve"][of][quality - 1] for of in ("bpp", "mse", "distance")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures to train and to tune on")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO-format file for them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *PEERS], help="runs to make; all of them by default")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tuning = tuning_tensors(tuning_pictures(given.images) or list_pictures(given.images, None), TUNING_PICTURES)
    missing = [name for name in given.only or [*VARIANTS, *PEERS] if not (given.out / f"{name}.json").exists()]
    if missing:
        _make(missing, given, tuning)
    found = {n: json.loads(p.read_text()) for n in [*VARIANTS, *PEERS] if (p := given.out / f"{n}.json").exists()}
    if REFERENCE not in found:
        return 0
    reference = Curve.from_dict(found[REFERENCE]["curve"])
    rows = [compared(name, values, reference) for name, values in found.items()]
    if given.json:
        json.dump({"reference": asdict(reference), "rows": rows}, sys.stdout, indent=2)
        return 0
    table = Table(title=f"bits against the reference, {len(tuning)} tuning pictures")
    for column in ("run", "steps", "minutes", "at equal feature distance", "at equal MSE"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        gaps = ("out of range" if v is None else f"{100 * v:+.1f} %" for v in (row["distance"], row["mse"]))
        table.add_row(row["name"], str(row["steps"]), f"{row['minutes']:.1f}", *gaps)
    Console().print(table)
    return 0


def _make(names: list[str], given: argparse.Namespace, tuning: list[Tensor]) -> None:
    """Make runs and write what each came to as it is done."""
    task = TaskLoss(load_frozen(NETWORK, None), "features")
    task.calibrate(torch.stack([t for t in tuning if t.shape == tuning[0].shape]).float() / 255, 1.0)
    for name in names:
        make = _make_peer if name in PEERS else _make_variant
        (given.out / f"{name}.json").write_text(json.dumps(make(name, given, tuning, task), indent=1))


def _make_variant(name: str, given: argparse.Namespace, tuning: list[Tensor], task: TaskLoss) -> dict[str, Any]:
    settings = settings_of(name, given.images, given.annotations, given.out, given.steps)
    train_codec(settings)
    last = settings.out / "last.pt"
    state = read_checkpoint(last)
    views = [TuningView(tuning, scale=1.0)]
    curve = measure_curve(starting_model(str(last), None), views, task, step=state["step"], bf16=True)
    return {"steps": state["step"], "minutes": state["elapsed_s"] / 60, "curve": curve.as_dict()}


def _make_peer(name: str, given: argparse.Namespace, tuning: list[Tensor], task: TaskLoss) -> dict[str, Any]:
    settings = settings_of(REFERENCE, given.images, given.annotations, given.out, given.steps)
    budget = json.loads((given.out / f"{REFERENCE}.json").read_text())["minutes"]
    crops = Crops(list_pictures(given.images, None), crop=settings.crop, seed=settings.seed, zoom=settings.zoom)
    peer, steps = train_peer(PEERS[name], crops, settings.batch, settings.rate, 60 * budget)
    save_checkpoint(given.out / f"{name}.pt", {"net": peer.state_dict()})
    return {"steps": steps, "minutes": budget, "point": asdict(measure_peer(peer, tuning, task))}


if __name__ == "__main__":
    sys.exit(main())
