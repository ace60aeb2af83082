"""The entropy model alone, on whole pictures: transforms and gains stay, so latents are made once and kept.

Training in crops shows h_s what surrounds a latent for 192 pixels; pictures are larger, and so is what can be known.
Without g_a and g_s a step costs a small part of one of `train codec`, so this comes after it, and it is here that a
bundle gets its context model. What is minimised is the rate of rounded latents, each quality's in units of what it was
at the start. Distortion is not looked at, but gains: a latent of 0 is decoded as its mean. The last part of the steps
is with h_s and the context model rounded as the integers that they become, which takes back most of what those cost.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from shared.codec.bundle import FULL_SIZE, SCALE_STEPS, SCALE_TENSOR, Bundle, load_bundle
from shared.codec.codec import Codec
from shared.codec.transforms import STRIDE_Y, interpolate_levels
from shared.errors import InvalidBundle, InvalidInput, InvalidSettings, NumericalError
from trainer.checkpoints import read_checkpoint, save_checkpoint
from trainer.crops import Picture, list_pictures, spread, tuning_pictures
from trainer.export import coded_at_all_levels, export_bundle, trainable_from_bundle
from trainer.frozen import load_frozen
from trainer.harvest import Curve, TuningView, measure_curve, rate_gap, tuning_tensors
from trainer.losses import TaskLoss
from trainer.model import LEVELS, TrainableCodec
from trainer.provenance import commit, curve_table, hardware, integer_cost_lines
from trainer.quantise import compute_as_integers

TUNING_PICTURES = 24
TUNING_SIDE = 1024  # whole pictures, to a multiple of 64
CALIBRATION_PICTURES = 12
CALIBRATION_SIDE = 320
LR_FLOOR = 0.02
WARMUP_STEPS = 50
INTEGERS_FROM = 0.4  # of the steps
COVERAGE = 0.999  # of activations, by the integers: training mends what is cut off, and the rest is told finer
CONTEXT_RATE = 5.0  # of the context model and the prior, which begin from nothing or are tiny, times `rate`


@dataclass(frozen=True, slots=True)
class EntropySettings:
    """What `train_entropy` does.

    `bundle`: name or folder of the codec. `images`: folder of pictures; those of the committed tuning split are left
    out and measured on. `out`: folder of the run; the bundle comes to `out/bundle`. `name`: of the new bundle; None is
    the old one's. `context`: channels of the context model, 0 for none; a bundle that has one keeps it as it is.
    `frame_scale`: how much larger the frames that the codec is for are than these pictures, side by side; with it and
    the bundle's sizes follows how large a picture is coded here at each quality. `pictures`: most that are used, spread
    over all; their latents stay in memory, 0.3 MB of 480x360 pixels at each size. `network_weights`: of the frozen
    network the bundle was trained through, as for `train codec`.

    `steps`: of `batch` pictures each. `rate`: Adam's at its highest, for h_a and h_s. `resume`: checkpoint of this run
    to go on from. `checkpoint_minutes`: between two of them. `threads`: CPU threads, 0 for torch's choice.
    """

    bundle: str
    images: Path
    out: Path
    name: str | None = None
    context: int = 96
    frame_scale: float = 1.0
    pictures: int = 10_000
    network_weights: Path | None = None
    steps: int = 6000
    batch: int = 6
    rate: float = 2e-4
    seed: int = 0
    resume: Path | None = None
    checkpoint_minutes: float = 3.0
    threads: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "rate", "frame_scale", "pictures"):
            if getattr(self, field) <= 0:
                raise InvalidSettings(f"train entropy: '{field}' must be positive, got {getattr(self, field)}")
        if self.context < 0:
            raise InvalidSettings(f"train entropy: 'context' must not be negative, got {self.context}")


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents before any gain: float16 [N, M, hy, wy] of pictures coded at one size, with the qualities that code
    there, 1 to 8."""

    y: Tensor
    qualities: tuple[int, ...]


def train_entropy(settings: EntropySettings) -> Path:
    """Train, measure, write the bundle. Returns its folder. Raises InvalidInput, InvalidImage, InvalidBundle,
    Unavailable, NumericalError."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    bundle = load_bundle(settings.bundle)
    pictures = spread(list_pictures(settings.images, None), settings.pictures)
    tuning = tuning_tensors(tuning_pictures(settings.images) or pictures, TUNING_PICTURES, side=TUNING_SIDE)
    if not tuning:
        raise InvalidInput(f"{settings.images}: no picture of 64x64 or more to measure on")
    calibration = _calibration(pictures)
    network = bundle.info.get("task_network", "imagenet")
    task = TaskLoss(load_frozen(network, settings.network_weights), "features")
    model = with_context(trainable_from_bundle(settings.bundle), settings.context)
    for part in (model.g_a, model.g_s):
        part.requires_grad_(False)
    settings.out.mkdir(parents=True, exist_ok=True)
    before = _curve(model, tuning, task, 0)
    groups = latents_of(Codec(bundle), pictures, settings.frame_scale)
    seconds = _train(model, groups, calibration, np.asarray(before.bpp), settings)
    after = _curve(model, tuning, task, settings.steps)
    gap = rate_gap(after, before)
    Console(stderr=True).print(f"rate at equal distance of {network}'s features: {100 * gap:+.1f} % on tuning pictures")
    return _write(settings, bundle, model, calibration, after, gap, seconds, len(pictures))


def with_context(model: TrainableCodec, context: int) -> TrainableCodec:
    """The codec with a context model of so many channels that adds nothing yet; itself where it has one, or for 0."""
    if model.context is not None or not context:
        return model
    wide = TrainableCodec(replace(model.arch, context=context))
    state = wide.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("h_s.conv3."):
            state[name][: len(value)] = value
        else:
            state[name] = value
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def latents_of(codec: Codec, pictures: list[Picture], frame_scale: float) -> list[Latents]:
    """Latents of whole pictures, coded as large as frames would be or at most at the pictures' own size."""
    scales = np.asarray(codec.bundle.arrays.get(SCALE_TENSOR, FULL_SIZE), np.float64)
    factors = np.minimum(1.0, scales / SCALE_STEPS * frame_scale)
    found: dict[tuple[float, tuple[int, ...]], list[Tensor]] = {}
    for picture in track(pictures, "latents", console=Console(stderr=True)):
        x = torch.from_numpy(picture.read()).permute(2, 0, 1)[None]
        for factor in sorted(set(factors.tolist())):
            y = _latents(codec, x, factor)
            found.setdefault((factor, tuple(y.shape[1:])), []).append(y)
    return [
        Latents(torch.stack(members), tuple(int(q) + 1 for q in np.flatnonzero(factors == factor)))
        for (factor, _), members in found.items()
    ]


def _latents(codec: Codec, x: Tensor, factor: float) -> Tensor:
    size = [max(1, round(side * factor)) for side in x.shape[2:]]
    if size != list(x.shape[2:]):
        x = F.interpolate(x, size, mode="bicubic", antialias=True)
    pads = (0, -size[1] % STRIDE_Y, 0, -size[0] % STRIDE_Y)
    y: Tensor = codec.g_a(F.pad(x.float() / 255, pads, mode="replicate").to(codec.dtype))
    return y[0].half()


def _train(
    model: TrainableCodec,
    groups: list[Latents],
    calibration: list[Tensor],
    bpp: np.ndarray,
    settings: EntropySettings,
) -> float:
    """Seconds it took, those before a resume included."""
    fast = [*model.entropy_bottleneck.parameters(), *(model.context.parameters() if model.context else ())]
    slow = [*model.h_a.parameters(), *model.h_s.parameters()]
    parts = [{"params": slow, "lr": settings.rate}, {"params": fast, "lr": CONTEXT_RATE * settings.rate}]
    optimiser = torch.optim.Adam(parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, settings.steps))
    first, spent = 0, 0.0
    if settings.resume is not None:
        first, spent = _restore(settings.resume, model, optimiser, schedule)
    model.entropy_bottleneck.quantiles.requires_grad_(False)  # medians are folded into h_a; here they do not move
    started = saved = time.monotonic()
    for step in track(range(first, settings.steps), "train entropy", console=Console(stderr=True)):
        if step >= INTEGERS_FROM * settings.steps and model.units is None:
            compute_as_integers(model, coded_at_all_levels(model, calibration), coverage=COVERAGE)
            optimiser.state.clear()  # its moments are of weights that were evened out
        generator = np.random.default_rng((settings.seed, step))
        y, quality_steps = _batch(groups, settings.batch, generator)
        torch.manual_seed(int(generator.integers(2**31)))
        scaled = y * interpolate_levels(model.log_gain.detach(), quality_steps)
        coded = model.code(scaled, quality_steps, rounded=1.0)
        at_start = torch.from_numpy(np.interp(quality_steps.numpy() / 256 - 1, np.arange(LEVELS), bpp))
        pixels = STRIDE_Y * STRIDE_Y * y.shape[2] * y.shape[3]
        loss = ((coded.bits_y + coded.bits_z) / pixels / at_start.float()).mean()
        if not bool(torch.isfinite(loss)):
            raise NumericalError(f"step {step}: the rate is {float(loss)}, expected a finite one")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if time.monotonic() - saved >= 60 * settings.checkpoint_minutes:
            saved = time.monotonic()
            state = {"net": model.state_dict(), "optimizer": optimiser.state_dict(), "schedule": schedule.state_dict()}
            save_checkpoint(
                settings.out / "last.ckpt",
                {
                    **state,
                    "architecture": asdict(model.arch),
                    "units": model.units,
                    "step": step + 1,
                    "elapsed_s": spent + saved - started,
                },
            )
    return spent + time.monotonic() - started


def _factor(step: int, steps: int) -> float:
    """Of the rate: a short rise, then half a cosine down to LR_FLOOR."""
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LR_FLOOR + (1 - LR_FLOOR) * fall)


def _batch(groups: list[Latents], batch: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Latents of one size [batch, M, hy, wy], and a quality in 1/256 steps for each. Every quality is as likely."""
    odds = np.array([len(group.y) * len(group.qualities) for group in groups], np.float64)
    group = groups[generator.choice(len(groups), p=odds / odds.sum())]
    which = generator.integers(len(group.y), size=batch)
    return group.y[torch.from_numpy(which)].float(), 256 * torch.from_numpy(generator.choice(group.qualities, batch))


def _restore(path: Path, model: TrainableCodec, optimiser: Any, schedule: Any) -> tuple[int, float]:
    state = read_checkpoint(path)
    if state.get("architecture") != asdict(model.arch) or not {"schedule", "units"} <= state.keys():
        raise InvalidBundle(f"{path}: expected a checkpoint of `train entropy` with {asdict(model.arch)}")
    model.load_state_dict(state["net"])
    model.units = state["units"]
    optimiser.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"]), float(state["elapsed_s"])


def _curve(model: TrainableCodec, tuning: list[Tensor], task: TaskLoss, step: int) -> Curve:
    if not task.variances:
        task.calibrate(tuning[0][None].float() / 255, 1.0)
    return measure_curve(model, [TuningView(tuning, scale=1.0)], task, step=step, bf16=False)


def _calibration(pictures: list[Picture]) -> list[Tensor]:
    """Middles of pictures, of the size most of them have, float [3, H, W], for the integers' ranges."""
    parts = tuning_tensors(pictures, 2 * CALIBRATION_PICTURES, side=CALIBRATION_SIDE)
    ((shape, _),) = Counter(part.shape for part in parts).most_common(1)
    return [part.float() / 255 for part in parts if part.shape == shape][:CALIBRATION_PICTURES]


def _write(
    settings: EntropySettings,
    bundle: Bundle,
    model: TrainableCodec,
    calibration: list[Tensor],
    curve: Curve,
    gap: float,
    seconds: float,
    pictures: int,
) -> Path:
    about: Mapping[str, Any] = {
        "started_from": bundle.model_id,
        "data": {"images": settings.images.name, "count": pictures},
        "steps": settings.steps,
        "hours": round(seconds / 3600, 3),
        "batch": settings.batch,
        "rate": settings.rate,
        "seed": settings.seed,
        "frame_scale": settings.frame_scale,
        "hardware": hardware("cpu", 1),
        "torch": torch.__version__,
        "commit": commit(),
        "rate_at_equal_distance": round(gap, 4),
    }
    kept = {key: value for key, value in bundle.info.items() if key not in ("sizes", "tuning_curve")}
    folder, scales = settings.out / "bundle", bundle.arrays.get(SCALE_TENSOR)
    name = settings.name or bundle.name
    made = export_bundle(
        model,
        calibration,
        folder,
        name=name,
        info={**kept, "entropy_model": about, "tuning_curve": curve.as_dict()},
        scales=None if scales is None else scales.tolist(),
    )
    card = [
        f"# {name}",
        "",
        f"A Sightline codec, model id `{made.model_id}`: the transforms and gains of model `{bundle.model_id}`, with "
        f"an entropy model trained for {settings.steps} steps of {settings.batch} whole pictures, {about['hours']} "
        f"hours on {about['hardware']}, on {pictures} pictures of `{settings.images.name}`. Commit "
        f"{about['commit']}, seed {settings.seed}.",
        *integer_cost_lines(made),
        *curve_table(curve),
    ]
    (folder / "README.md").write_text("\n".join(card) + "\n")
    return folder
