"""The loop that trains task networks: `fit`. `trainer.train_task` goes from files to a bundle with it.

The bundled networks start from ImageNet's MobileNetV2, with their first blocks frozen and cached
(`trainer.early_cache`); any of torchvision's detectors trains on pictures (`trainer.pictures`). AdamW, warm-up and
a cosine whose length is a number of steps or of minutes; bfloat16 autocast for the bundled ones where the device
computes in it (torchvision's compute their anchors in the type of the features, which moves boxes by up to 8 pixels).
What is evaluated and exported is the exponential moving average of the weights. A killed run resumes from its last
checkpoint, written atomically; a non-finite loss stops it, with the step saved and the batch named.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import load_strictly
from cloud.tasks.torchvision_models import TorchvisionDetector
from cloud.tasks.trunk import EARLY_BLOCKS, folded_state
from cloud.tasks.types import TaskModel
from shared.codec.precision import fast_dtype
from shared.errors import InvalidBundle, InvalidSettings, NumericalError, Unavailable
from trainer.data import Example, epochs, repeat_factors
from trainer.early_cache import EarlyBatch, EarlyBatches, EarlyFeatures
from trainer.pictures import PictureBatch, PictureBatches

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
CHECKPOINT_SIZES = 5  # weights, their average and AdamW's two moments, and room for the next file beside the last


@dataclass(frozen=True, slots=True)
class TaskTraining:
    """How long and how fast a run trains. Exactly one of `steps` and `minutes` bounds it.

    `steps`: optimiser steps. `minutes`: wall clock; learning rates follow a cosine over either. `batch_size`: images
    a step. `trunk_rate`, `head_rate`: AdamW's highest learning rates. `weight_decay`: AdamW's, not for biases and
    norms. `warmup_steps`: steps of rising rates. `ema_decay`: of the weights' average, which is what is exported.
    `rare_class_threshold`: share of images below which a class is rare and its images are drawn more often.
    `cache_bytes`: bound on features kept in memory. `checkpoint_seconds`: time between checkpoints.
    `evaluate_seconds`: time between measurements on the images held out. `only`: train just the parameters whose names
    start so ("roi_heads.mask" for a mask head on a finished network). `device`: torch's name. `seed`: of everything
    random.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    trunk_rate: float = 2e-4
    head_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup_steps: int = 200
    ema_decay: float = 0.9985
    rare_class_threshold: float = 0.02
    cache_bytes: int = 7 << 30
    checkpoint_seconds: float = 180.0
    evaluate_seconds: float = 900.0
    only: str = ""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InvalidSettings("task training: set exactly one of 'steps' and 'minutes'")
        for name in ("batch_size", "trunk_rate", "head_rate"):
            if getattr(self, name) <= 0:
                raise InvalidSettings(f"task training: '{name}' must be positive, got {getattr(self, name)}")
        for name in ("steps", "minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InvalidSettings(f"task training: '{name}' must be positive, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InvalidSettings(f"task training: 'ema_decay' must be in [0, 1), got {self.ema_decay}")


def start_from_imagenet(model: BundledRCNN, path: Path) -> None:
    """Load a `torchvision.models.mobilenet_v2` state dict into the trunk. Raises InvalidBundle."""
    try:
        state = folded_state(load_file(path))
    except Exception as error:  # the reader raises many kinds for a broken file
        raise InvalidBundle(f"{path}: expected the weights of torchvision's mobilenet_v2: {error}") from error
    load_strictly(model.backbone.features, state, path)


def start_from_boxes(model: BundledRCNN, state: dict[str, Tensor], path: Path) -> None:
    """Load a bundled Faster R-CNN's state dict into a bundled Mask R-CNN; the mask head stays as it is."""
    mask_head = {k: v for k, v in model.state_dict().items() if k.startswith("roi_heads.mask")}
    load_strictly(model, {**mask_head, **state}, path)


class Run:
    """State of a run: all that a checkpoint holds."""

    def __init__(self, model: nn.Module, settings: TaskTraining) -> None:
        self.model: Any = model
        self.settings = settings
        if isinstance(model, BundledRCNN):
            model.backbone.features[:EARLY_BLOCKS].requires_grad_(False)
        for name, parameter in model.named_parameters():
            if not name.startswith(settings.only):
                parameter.requires_grad_(False)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise InvalidSettings(
                f"task training: 'only' is {settings.only!r}, which no trainable parameter starts with"
            )
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99))
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.step, self.elapsed = 0, 0.0

    def _groups(self) -> list[dict[str, Any]]:
        """Trunk and heads have their own rate; biases and norms do not decay."""
        settings = self.settings
        groups = []
        for trunk in (True, False):
            for decayed in (True, False):
                chosen = [
                    p
                    for n, p in self.trained.items()
                    if n.startswith(("backbone.features", "backbone.body")) == trunk and (p.ndim > 1) == decayed
                ]
                rate = settings.trunk_rate if trunk else settings.head_rate
                decay = settings.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay})
        return groups

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.settings.steps is not None:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.elapsed / (60 * float(self.settings.minutes or 0)))

    def update(self, batch: EarlyBatch | PictureBatch) -> dict[str, float]:
        """One optimiser step. Returns the losses. Raises NumericalError before any weight is changed."""
        device = torch.device(self.settings.device)
        reduced = isinstance(self.model, BundledRCNN) and fast_dtype(device) == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            losses = batch.losses(self.model)
        total = torch.stack([v for v in losses.values() if v.requires_grad]).sum()
        parts = {k.removeprefix("loss_"): float(v.detach()) for k, v in losses.items()}
        if not math.isfinite(sum(parts.values())):
            raise NumericalError(f"a loss is not finite at step {self.step}: {parts}; images {list(batch.image_ids)}")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 5.0)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(f"the gradient is not finite at step {self.step}; images {list(batch.image_ids)}")
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup_steps))
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.ema_decay, self.step / (self.step + 20))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay)
        return {**parts, "total": sum(parts.values())}

    def averaged(self) -> nn.Module:
        """A copy of the model with the averaged weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({**self.model.state_dict(), **self.average})
        return model

    def save(self, path: Path) -> None:
        """Write the checkpoint so that a kill leaves either the old or the new one. Raises Unavailable."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"{path}: the checkpoint could not be written: {error}") from error
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises InvalidBundle saying what differs."""
        try:
            state = torch.load(path, map_location=self.settings.device, weights_only=True)
            weights, average, moments = state["model"], state["average"], state["optimizer"]
            step, elapsed = int(state["step"]), float(state["elapsed"])
        except Exception as error:  # torch.load raises many kinds for a broken file
            raise InvalidBundle(
                f"{path}: expected a checkpoint of this trainer: {type(error).__name__} {error}"
            ) from error
        load_strictly(self.model, weights, path)
        if average.keys() != self.average.keys():
            raise InvalidBundle(f"{path}: trained {len(average)} tensors, this run trains {len(self.average)}")
        self.optimizer.load_state_dict(moments)
        for name, value in self.average.items():
            value.copy_(average[name])
        self.step, self.elapsed = step, elapsed


Evaluate = Callable[[TaskModel], dict[str, float]]


def fit(
    model: nn.Module,
    examples: list[Example],
    run_dir: Path,
    settings: TaskTraining,
    *,
    evaluate: Evaluate | None = None,
    progress_bar: bool = True,
) -> Run:
    """Train `model` in place; goes on from `run_dir`'s checkpoint if there is one. Returns the finished run.

    `evaluate` sees the averaged weights every `evaluate_seconds`; its figures and the losses go to `log.jsonl`.
    Raises NumericalError on a non-finite loss (checkpoint written), Unavailable without room on the disk,
    InvalidBundle for a checkpoint of another architecture.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    require_room(run_dir, CHECKPOINT_SIZES * sum(p.numel() * 4 for p in model.parameters()))
    run = Run(model.to(settings.device).to(memory_format=torch.channels_last), settings)
    checkpoint = run_dir / CHECKPOINT
    if checkpoint.exists():
        run.load(checkpoint)
    torch.manual_seed(settings.seed + run.step)
    batches = _batches(run, examples)
    saved_at = evaluated_at = time.monotonic()
    smooth: dict[str, float] = {}
    bar = tqdm(
        total=1.0,
        initial=run.progress,
        bar_format="{l_bar}{bar:20}| {elapsed}<{remaining} {postfix}",
        mininterval=5,
        disable=not progress_bar,
    )
    while run.progress < 1.0:
        started = time.monotonic()
        training_mode(model)
        try:
            losses = run.update(batches.draw())
        except NumericalError as error:
            run.save(checkpoint)
            raise NumericalError(f"{error}; the state before this step is in {checkpoint}") from error
        run.elapsed += time.monotonic() - started
        smooth = {k: 0.98 * smooth.get(k, v) + 0.02 * v for k, v in losses.items()}
        bar.update(run.progress - bar.n)
        bar.set_postfix({"step": run.step, **{k: f"{v:.3f}" for k, v in smooth.items()}}, refresh=False)
        if time.monotonic() - saved_at >= settings.checkpoint_seconds:
            run.save(checkpoint)
            _log(run_dir, run, smooth)
            saved_at = time.monotonic()
        if evaluate is not None and time.monotonic() - evaluated_at >= settings.evaluate_seconds:
            _log(run_dir, run, evaluate(TorchvisionDetector(run.averaged(), "training", device=settings.device)))
            evaluated_at = time.monotonic()
    bar.close()
    run.save(checkpoint)
    _log(run_dir, run, smooth)
    return run


def _batches(run: Run, examples: list[Example]) -> EarlyBatches | PictureBatches:
    settings, model = run.settings, run.model
    masks = getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None
    rng = np.random.default_rng((settings.seed, run.step))
    order = epochs(examples, repeat_factors(examples, settings.rare_class_threshold), rng)
    if isinstance(model, BundledRCNN) and settings.device == "cpu":
        early = EarlyFeatures(model, examples, budget_bytes=settings.cache_bytes, seed=settings.seed)
        return EarlyBatches(early, examples, order, settings.batch_size, rng, masks=masks)
    return PictureBatches(
        examples, order, settings.batch_size, rng, masks=masks, device=settings.device,
        ignore=isinstance(model, BundledRCNN),
    )  # fmt: skip


def training_mode(model: nn.Module) -> None:
    """train() with every batch norm in eval(): batches are small, and the published statistics are better."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def require_room(folder: Path, wanted_bytes: int) -> None:
    """Raises Unavailable if the disk under `folder` has less room than `wanted_bytes`."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < wanted_bytes:
        raise Unavailable(f"{folder}: checkpoints need {wanted_bytes >> 20} MiB, the disk has {free >> 20} MiB free")


def _log(run_dir: Path, run: Run, figures: dict[str, Any]) -> None:
    numbers = {k: round(v, 5) for k, v in figures.items() if isinstance(v, float)}
    line = {"step": run.step, "minutes": round(run.elapsed / 60, 2), **numbers}
    with (run_dir / LOG).open("a") as file:
        file.write(json.dumps(line) + "\n")
