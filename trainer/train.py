"""Training a codec: `train_codec`, the one straight line from settings to a bundle.

    settings -> pictures, frozen network, starting weights   (all checked before the first step)
             -> Lightning's loop over CodecTraining.training_step, one process or many
             -> checkpoints along the way, ranked by their curves on tuning pictures
             -> the best one exported as a bundle, with where it comes from

Two runs with equal settings take the same steps on one device: crops, levels, scales and noise are functions of
(seed, step). A run in two processes takes those of one with the same global batch.

The auxiliary loss, which fits the factorised prior's quantiles, shares the optimiser as a group of its own: neither
loss has a gradient in the other's parameters, so one backward pass serves both.
"""

import math
import time
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from cloud.tasks.checkpoints import load_strictly
from shared.codec.precision import fast_dtype
from shared.errors import InvalidInput, NumericalError
from trainer.checkpoints import read_checkpoint, require_room, save_checkpoint, starting_model
from trainer.crops import (
    CropBatch,
    CropNumbers,
    Crops,
    Picture,
    collate,
    list_pictures,
    move,
    tuning_pictures,
    whole_pictures,
)
from trainer.export import activation_ranges
from trainer.frozen import load_frozen
from trainer.harvest import Curve, TuningView, measure_curve, rate_gap, tuning_pairs, tuning_tensors
from trainer.latents import start_from_blocks, start_levels, widened
from trainer.losses import TaskLoss, codec_terms, gradient_norms
from trainer.model import LEVELS, TrainableCodec
from trainer.progress import Monitor
from trainer.provenance import write_bundle
from trainer.schedule import GradientBalance
from trainer.settings import TrainSettings, to_toml

QUANTILE_RATE = 1e-3  # the auxiliary loss is convex and apart from the rest; its rate needs no schedule
LATENT_CROPS = 160
CALIBRATION_CROPS = 16
CALIBRATION_SIDE = 320  # pixels; small crops have too few hyper-latents
RANGE_PICTURES = 256  # whole ones, for the ranges of g_a: what is beyond is clipped, and few pictures hold the largest


class CodecTraining(LightningModule):
    """One step of training, and the state that a checkpoint holds."""

    def __init__(self, settings: TrainSettings, codec: TrainableCodec, task: TaskLoss | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings, self.codec, self._task = settings, codec, [task]  # in a list: no submodule of this one
        self.balance = GradientBalance()
        self.steps_done, self.elapsed_s, self._step_started = 0, 0.0, 0.0
        self.curves: list[Curve] = []
        self.average: dict[str, Tensor] | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.monitor: Monitor | None = None
        self._main = [p for n, p in codec.named_parameters() if not n.endswith("quantiles")]
        self._quantiles = [p for n, p in codec.named_parameters() if n.endswith("quantiles")]

    @property
    def task(self) -> TaskLoss | None:
        return self._task[0]

    @property
    def _compares_features(self) -> bool:
        return self.task is not None and self.task.kind == "features"

    @property
    def scale(self) -> float:
        """How the frozen network's own resize scales a picture whose short side is the expected one."""
        return 1.0 if self.task is None else self.task.network.short_side / self.settings.short_side_px

    def view(self, zoom: float) -> tuple[float, float]:
        """How the network's resize scales a crop of pictures resized by `zoom`, and the share of a frame's pixels that
        one of the crop's stands for."""
        sizes = self.settings.coded_sizes()
        if sizes is None:
            return self.scale, 1.0
        share = sizes.share(zoom)
        return self.scale / share, share * share

    @property
    def bf16(self) -> bool:
        """Whether the transforms and the frozen network compute in bfloat16."""
        return fast_dtype(self.device) == torch.bfloat16 if self.settings.bf16 is None else self.settings.bf16

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.settings.steps is not None:
            return min(1.0, self.steps_done / self.settings.steps)
        return min(1.0, self.elapsed_s / (3600 * float(self.settings.hours or 0)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(
            [{"params": self._main, "lr": self.settings.rate}, {"params": self._quantiles, "lr": QUANTILE_RATE}],
            fused=True,
        )
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        return optimizer

    def on_fit_start(self) -> None:
        if self.task is not None:
            self.task.network.to(self.device)

    def on_train_start(self) -> None:
        self._step_started = time.monotonic()

    def transfer_batch_to_device(self, batch: CropBatch, device: torch.device, dataloader_idx: int) -> CropBatch:
        return move(batch, device)

    def training_step(self, batch: CropBatch, index: int) -> None:
        settings, schedule = self.settings, self.settings.schedule
        self._agree_on_time()
        progress, step = self.progress, self.steps_done
        rng = np.random.default_rng((settings.seed, 2, step))
        torch.manual_seed(int(rng.integers(1 << 62)))
        self.codec.share_noise(self.global_rank, self.trainer.world_size)
        x = batch.crops.float() / 255
        levels = (batch.quality_steps - 256).float() / 256
        scale, area = self.view(batch.zooms[0])  # one for all where it matters, see CodedSizes
        scale *= float(rng.uniform(1 - settings.scale_jitter, 1 + settings.scale_jitter))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.codec(x, batch.quality_steps, rounded=schedule.rounded(progress))
            weights = schedule.weights(progress, levels)
            bits = area * (out.bits_y + out.bits_z)
            original = None if batch.originals is None or not self._compares_features else batch.originals.float() / 255
            terms = codec_terms(x, out.x_hat, bits, weights, self.task, batch.targets, scale, original)
        if settings.balance_every and step % settings.balance_every == 0:
            self._observe(gradient_norms(terms, out.y))
        loss = terms.total(self.balance)
        norm = self._update(loss, batch, progress, step)
        self.steps_done += 1
        now = time.monotonic()
        self.elapsed_s, self._step_started = self.elapsed_s + now - self._step_started, now
        if self.monitor is not None:
            self.monitor.step(self.steps_done, self.progress, float(loss.detach()), terms, levels, self.balance, norm)
            if self.monitor.wants_panel():
                self.monitor.panel(self.steps_done, x, out.x_hat)
        # by the clock that all processes agreed on: one that waits for another's harvest has a later one by now
        self.trainer.should_stop = (progress if settings.steps is None else self.progress) >= 1

    def _update(self, loss: Tensor, batch: CropBatch, progress: float, step: int) -> float:
        """Backward, clip, step. Returns the gradient's norm. Raises NumericalError before any weight is changed."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss + self.codec.entropy_bottleneck.loss())
        norm = float(torch.nn.utils.clip_grad_norm_(self._main, self.settings.clip))
        if not math.isfinite(norm):  # in all processes at once, because gradients were averaged over them
            value = float(loss.detach())
            path = self.settings.out / f"step-{step:07d}-not-finite.pt"
            if self.global_rank == 0:
                save_checkpoint(path, self.state())
            blame = "" if not math.isfinite(value) else " (this process's own loss is finite)"
            raise NumericalError(
                f"loss is {value}, gradient norm {norm} at step {step}{blame}; pictures {', '.join(batch.names)} at "
                f"quality steps {batch.quality_steps.tolist()}; the state before this step is in {path}"
            )
        optimizer.param_groups[0]["lr"] = self.settings.rate * self.settings.schedule.learning_rate(progress, step)
        optimizer.step()
        if self.average is not None:
            kept = min(self.settings.ema, (step + 1) / (step + 10))
            own = [p.detach() for p in self.codec.parameters()]
            torch._foreach_lerp_([self.average[n] for n, _ in self.codec.named_parameters()], own, 1 - kept)
        return norm

    def _agree_on_time(self) -> None:
        """With a budget of hours, all processes follow the first one's clock."""
        if self.settings.hours is not None and self.trainer.world_size > 1:
            clock = torch.tensor(self.elapsed_s, dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(clock, 0)
            self.elapsed_s = float(clock)

    def _observe(self, norms: dict[str, float]) -> None:
        """Take the norms into the balance; over processes, the root of their summed squares."""
        if self.trainer.world_size > 1:
            squares = torch.tensor([v * v for v in norms.values()], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(squares)
            # each process's loss is a mean over its share: n times the gradients of the whole batch's mean
            norms = dict(zip(norms, (squares.sqrt() / self.trainer.world_size).tolist(), strict=True))
        self.balance.observe(norms)

    def state(self) -> dict[str, Any]:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return {
            "net": self.codec.state_dict(),
            "average": None if self.average is None else {**self.codec.state_dict(), **self.average},
            "architecture": self.codec.arch.as_dict(),
            "step": self.steps_done,
            "elapsed_s": self.elapsed_s,
            "optimizer": optimizer.state_dict(),
            "balance": self.balance.state_dict(),
            "variances": {} if self.task is None else self.task.variances,
            "curves": [c.as_dict() for c in self.curves],
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this run. Raises InvalidBundle, saying what differs."""
        load_strictly(self.codec, state["net"], path)
        self.optimizer_state = state["optimizer"]
        self.steps_done, self.elapsed_s = state["step"], state["elapsed_s"]
        self.balance.load_state_dict(state["balance"])
        if self.task is not None:
            self.task.variances = dict(state["variances"])
        self.curves = [Curve.from_dict(c) for c in state["curves"]]
        if self.average is not None and state["average"] is not None:
            self.average = {n: state["average"][n] for n in self.average}


class Keeper(Callback):
    """Writes checkpoints every few minutes, and now and then measures one and keeps the best."""

    def __init__(self, settings: TrainSettings, tuning: list[TuningView]) -> None:
        self._settings, self._tuning = settings, tuning
        self._last_save = self._last_harvest = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        assert isinstance(module, CodecTraining)  # noqa: S101
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if now - self._last_harvest >= 60 * self._settings.harvest_minutes or trainer.should_stop:
            self._harvest(module)
            self._last_harvest = time.monotonic()
            module._step_started += self._last_harvest - now  # measuring is not training time
        if now - self._last_save >= 60 * self._settings.checkpoint_minutes or trainer.should_stop:
            save_checkpoint(self._settings.out / "last.pt", module.state())
            self._last_save = time.monotonic()

    def on_exception(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        assert isinstance(module, CodecTraining)  # noqa: S101
        if isinstance(error, KeyboardInterrupt) and trainer.is_global_zero:
            save_checkpoint(self._settings.out / "last.pt", module.state())

    def _harvest(self, module: CodecTraining) -> None:
        settings, codec = self._settings, module.codec
        own = {n: p.detach().clone() for n, p in codec.named_parameters()}
        if module.average is not None:
            codec.load_state_dict(module.average, strict=False)
        curve = measure_curve(codec, self._tuning, module.task, step=module.steps_done, bf16=module.bf16)
        codec.load_state_dict(own, strict=False)
        module.curves.append(curve)
        save_checkpoint(harvest_path(settings, curve), module.state())
        kept = ranked(module.curves, settings.quality)[: settings.harvest_keep]
        for other in module.curves:
            if other not in kept:
                harvest_path(settings, other).unlink(missing_ok=True)
        if module.monitor is not None:
            gap = rate_gap(curve, module.curves[0])
            points = " ".join(f"{b:.3f}/{d:.4f}" for b, d in zip(curve.bpp, curve.distance, strict=True))
            module.monitor.say(
                f"harvest at step {curve.step}: {gap:+.1%} rate against the first | bpp/distance {points}"
            )


def harvest_path(settings: TrainSettings, curve: Curve) -> Path:
    return settings.out / f"harvest-{curve.step:07d}.pt"


def ranked(curves: list[Curve], quality: int | None = None) -> list[Curve]:
    """Curves by their rate at equal distance against the first one's, best first; of equals the later one.

    With one `quality` trained the others say nothing, and the later is the better.
    """
    if quality is not None:
        return sorted(curves, key=lambda c: -c.step)
    return sorted(curves, key=lambda c: (rate_gap(c, curves[0]), -c.step))


def train_codec(settings: TrainSettings) -> Path:
    """Train as `settings` say and write a bundle. Returns its folder, `out/bundle`.

    Raises, before the first step: InvalidSettings, InvalidInput and InvalidImage (annotations, pictures), InvalidBundle
    (weights of another architecture), Unavailable (no room for checkpoints). Later: NumericalError.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pictures = list_pictures(settings.images, settings.annotations)
    torch.manual_seed(settings.seed)
    codec = starting_model(settings.start_from, settings.architecture)
    if settings.start_levels is not None:
        start_levels(codec, settings.start_levels)
    task = None
    if settings.task_loss != "none":
        task = TaskLoss(load_frozen(settings.network, settings.network_weights), settings.task_loss)
    crops = _crops(settings, pictures, masks=task is not None and task.network.wants_masks)
    codec = _with_latents(settings, codec, crops).to(memory_format=torch.channels_last)
    module = CodecTraining(settings, codec, task)
    if settings.ema:
        module.average = {n: p.detach().clone() for n, p in codec.named_parameters()}
    if settings.resume is not None:
        module.restore(read_checkpoint(settings.resume), settings.resume)
    elif task is not None:
        task.calibrate(*_calibration_crops(settings, crops, module))
    settings.out.mkdir(parents=True, exist_ok=True)
    require_room(settings.out, codec, settings.harvest_keep + 2)
    trainer = _trainer(settings, Keeper(settings, _tuning(settings, pictures, module)))
    if trainer.is_global_zero:
        (settings.out / "settings.toml").write_text(to_toml(settings))
        settings.schedule.plot(settings.out / "schedule.png")
        module.monitor = Monitor(settings.out, settings.schedule)
    try:
        if module.progress < 1:
            trainer.fit(module, _loader(settings, crops, module.steps_done, trainer))
    finally:
        if module.monitor is not None:
            module.monitor.close()
    folder = settings.out / "bundle"
    if trainer.is_global_zero:
        _export(settings, module, crops, len(pictures), folder)
    return folder


def _with_latents(settings: TrainSettings, codec: TrainableCodec, crops: Crops) -> TrainableCodec:
    """A fresh codec's latents begin as principal components; a bundle's may be asked to become more."""
    wanted = codec.arch.m if settings.architecture is None else settings.architecture.m
    if settings.start_from is not None and codec.arch.m == wanted:
        return codec
    pictures = [torch.from_numpy(crops[i].pixels).permute(2, 0, 1).float() / 255 for i in range(LATENT_CROPS)]
    if settings.start_from is not None:
        return widened(codec, wanted, pictures)
    start_from_blocks(codec, pictures)
    return codec


def _crops(settings: TrainSettings, pictures: list[Picture], *, masks: bool) -> Crops:
    return Crops(
        pictures,
        crop=settings.crop,
        seed=settings.seed,
        zoom=settings.zoom,
        targets=settings.task_loss == "ground-truth",
        masks=masks,
        quality=settings.quality,
        sizes=settings.coded_sizes(),
        batch=settings.batch,
        cache_bytes=settings.cache_bytes // max(1, settings.workers) // settings.devices,
    )


def _loader(settings: TrainSettings, crops: Crops, step: int, trainer: Trainer) -> "DataLoader[CropBatch]":
    numbers = CropNumbers(step, settings.batch, rank=trainer.global_rank, processes=trainer.world_size)
    return DataLoader(
        crops,
        batch_sampler=numbers,
        collate_fn=collate,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=settings.accelerator in ("gpu", "cuda"),
    )


def _calibration_crops(settings: TrainSettings, crops: Crops, module: CodecTraining) -> tuple[Tensor, float]:
    """Some first crops [B, 3, side, side] in [0, 1], not resized, and the scale at which the network sees them."""
    count = CALIBRATION_CROPS if settings.coded_sizes() is None else min(settings.batch, CALIBRATION_CROPS)
    first = collate([crops[i] for i in range(count)])  # those of one step are of one size
    clean = first.crops if first.originals is None else first.originals
    return clean.float() / 255, module.view(1.0)[0]


def _tuning(settings: TrainSettings, pictures: list[Picture], module: CodecTraining) -> list[TuningView]:
    if settings.tuning_images is not None:
        found = list_pictures(settings.tuning_images, None)
    else:
        found = tuning_pictures(settings.images) or pictures
    sizes = settings.coded_sizes()
    if sizes is None:
        views = [TuningView(tuning_tensors(found, settings.harvest_pictures, settings.zoom), module.scale)]
    else:
        views = []
        for quality in range(1, LEVELS + 1):
            zoom = sizes.zoom(quality)
            pairs = tuning_pairs(found, settings.harvest_pictures, zoom)
            originals, tensors = ([pair[i] for pair in pairs] for i in range(2))
            views.append(TuningView(tensors, *module.view(zoom), (quality,), originals))
    if not all(view.pictures for view in views):
        raise InvalidInput(f"{settings.tuning_images or settings.images}: no picture of 64x64 or more to rank with")
    return views


def _trainer(settings: TrainSettings, keeper: Keeper) -> Trainer:
    strategy: Any = "auto"
    if settings.devices * settings.nodes > 1:
        strategy = DDPStrategy(
            process_group_backend="gloo" if settings.accelerator == "cpu" else None,
            timeout=timedelta(hours=1),  # the others wait while the first one measures a checkpoint
            find_unused_parameters=False,
        )
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=strategy,
        max_epochs=1,
        callbacks=[keeper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=True,
    )


def _export(settings: TrainSettings, module: CodecTraining, crops: Crops, pictures: int, folder: Path) -> None:
    best = ranked(module.curves, settings.quality)[0] if module.curves else None
    codec = module.codec.cpu()
    if best is not None and (path := harvest_path(settings, best)).exists():
        state = read_checkpoint(path)
        load_strictly(codec, state["average"] or state["net"], path)
    sizes = settings.coded_sizes()
    zooms = settings.zoom if sizes is None else tuple(sizes.zoom(quality) for quality in range(1, LEVELS + 1))
    large = Crops(
        crops.pictures, crop=max(settings.crop, CALIBRATION_SIDE), seed=settings.seed, zoom=(min(zooms), max(zooms))
    )
    calibration = [torch.from_numpy(large[i].pixels).permute(2, 0, 1).float() / 255 for i in range(CALIBRATION_CROPS)]
    ranges = activation_ranges(codec, chain(calibration, whole_pictures(crops.pictures, RANGE_PICTURES, zooms)))
    write_bundle(
        replace(settings, resume=None), codec, calibration, folder, ranges=ranges,
        pictures=pictures, steps=module.steps_done, elapsed_s=module.elapsed_s, curve=best, device=str(module.device),
    )  # fmt: skip
