"""Dynamic loss weighting: the weights of L_total = w_rate L_rate + w_mse L_mse + w_task L_task over a run.

The basis (arXiv 2108.09993) has no fixed weights: the terms compete, and the right balance differs at every update.
Its strategy over the run is kept, as smooth functions of progress in [0, 1], for each quality level:

    progress   0 ------- distortion_until ------- task_at -------- press_from ------------ press_until ----- 1
    w_mse      mse_start      \\_ falls to mse_end _/
    w_task     0              /- rises to task ----/
    w_rate     rate_start                                             raised step by step to 1
    latents    noisy                                                            rounded from `rounding_from`

Levels share the network (one bundle, many rates). Level l of 8 has a relative price r = span^(l / 7 - 1/2): its
distortion and task terms weigh r^lean, its rate term r^(lean - 1). `lean` decides which levels the shared weights hear
most, not what any of them aims at: at 1/2 rate and squared error have gradients alike at all levels, but a frozen
network's features pull eight times harder at the finest than at the coarsest; at 0.15 all of it together pulls alike.

`GradientBalance` is the second part: gradient norms of the weighted terms at the latents are measured every few
steps, and a term that falls below a share of the strongest is lifted to it, within a limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import InvalidSettings

TERMS = ("rate", "mse", "task")
TOP_LEVEL = 7.0


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the three terms at one point of the run and at some levels: float32 tensors of one shape.

    Units: rate a bit per pixel, mse a mean squared error of pixels in [0, 1], task a feature distance (see losses).
    """

    rate: Tensor
    mse: Tensor
    task: Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """Weights as functions of progress. Defaults are those of the `detection` bundle's last runs: distortion
    first and long, no pressure (docs/results.md). See the module's head for the shape.

    `span`: ratio of the finest to the coarsest level's price of distortion. `lean`: see there. `press_steps`: steps in
    which the weight of the rate is raised. `lr_floor`: the learning rate's last value as a share of its highest;
    `warmup_steps`: steps until that.
    """

    span: float = 300.0
    lean: float = 0.5
    mse_start: float = 300.0
    mse_end: float = 150.0
    task: float = 1.0
    distortion_until: float = 0.6
    task_at: float = 0.7
    rate_start: float = 1.0
    press_from: float = 0.0
    press_until: float = 0.1
    press_steps: int = 3
    rounding_from: float = 0.8
    lr_floor: float = 0.05
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        marks = (0.0, self.distortion_until, self.task_at, 1.0)
        if list(marks) != sorted(marks):
            raise InvalidSettings(f"schedule: expected 0 <= distortion_until <= task_at <= 1, got {marks[1:3]}")
        if not 0 <= self.press_from <= self.press_until <= 1:
            raise InvalidSettings(
                f"schedule: expected 0 <= press_from <= press_until <= 1, got {self.press_from}, {self.press_until}"
            )
        for name in ("span", "mse_start", "mse_end", "rate_start", "press_steps"):
            if getattr(self, name) <= 0:
                raise InvalidSettings(f"schedule: '{name}' must be positive, got {getattr(self, name)}")
        if not 0 <= self.lean <= 1:
            raise InvalidSettings(f"schedule: 'lean' must be in [0, 1], got {self.lean}")
        if self.task < 0:
            raise InvalidSettings(f"schedule: 'task' must not be negative, got {self.task}")

    def price(self, levels: Tensor) -> Tensor:
        """Relative price r of distortion at `levels` (float, 0 for quality 1 up to 7 for quality 8)."""
        return torch.exp((levels / TOP_LEVEL - 0.5) * math.log(self.span))

    def weights(self, progress: float, levels: Tensor) -> Weights:
        """Weights at `progress` in [0, 1] for `levels`, float of any shape."""
        price = self.price(levels)
        distortion = price**self.lean
        to_task = ramp(progress, self.distortion_until, self.task_at)
        mse = math.exp((1 - to_task) * math.log(self.mse_start) + to_task * math.log(self.mse_end))
        rate = self.pressure(progress) * distortion / price
        return Weights(rate=rate, mse=mse * distortion, task=self.task * to_task * distortion)

    def pressure(self, progress: float) -> float:
        """Weight of the rate before the level's price: a smooth staircase from `rate_start` to 1."""
        climbed = 0.0
        width = (self.press_until - self.press_from) / self.press_steps
        for i in range(self.press_steps):
            start = self.press_from + i * width
            climbed += ramp(progress, start, start + width / 2) / self.press_steps
        return self.rate_start ** (1 - climbed)

    def rounded(self, progress: float) -> float:
        """Share of rounding in what g_s is fed: 0 noisy latents, 1 rounded ones."""
        return ramp(progress, self.rounding_from, min(1.0, self.rounding_from + 0.03))

    def learning_rate(self, progress: float, step: int) -> float:
        """The learning rate as a share of its highest: linear warm-up, then half a cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * (self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def plot(self, path: Path) -> None:
        """Draw the weights over the run, for the lowest, a middle and the highest level."""
        from matplotlib.figure import Figure

        points = [i / 400 for i in range(401)]
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        panels = figure.subplots(1, 3, sharex=True)
        for panel, term in zip(panels, TERMS, strict=True):
            for level in (0, 3, 7):
                drawn = [float(getattr(self.weights(p, torch.tensor(float(level))), term)) for p in points]
                panel.plot(points, drawn, label=f"quality {level + 1}")
            panel.set(title=f"w_{term}", xlabel="progress")
            if any(panel.lines[0].get_ydata()):
                panel.set_yscale("log")
        panels[0].legend(frameon=False)
        figure.savefig(path)


def ramp(progress: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, smooth between (3 t^2 - 2 t^3); a step where the two are one."""
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    t = (progress - start) / (end - start)
    return t * t * (3 - 2 * t)


class GradientBalance:
    """Factors on the weighted terms, so that no term's gradient drowns another's.

    Norms are averaged over measurements. A term whose norm is below `share` of the strongest gets the factor that lifts
    it there, at most `limit`; the others keep factor 1, so a schedule that is in balance is left alone.
    """

    def __init__(self, *, share: float = 0.1, limit: float = 8.0, memory: float = 0.8) -> None:
        self.share, self.limit, self.memory = share, limit, memory
        self.norms: dict[str, float] = {}

    def observe(self, norms: Mapping[str, float]) -> None:
        """Take a measurement: norms of the gradients of the weighted terms, factors left out."""
        for name, norm in norms.items():
            if not math.isfinite(norm):
                continue
            known = self.norms.get(name)
            self.norms[name] = norm if known is None else self.memory * known + (1 - self.memory) * norm

    def factor(self, name: str) -> float:
        """Factor for a term's weight, in [1, limit]; 1 for a term not measured yet."""
        norm = self.norms.get(name)
        if norm is None:
            return 1.0
        wanted = self.share * max(self.norms.values())
        if norm >= wanted:
            return 1.0
        return min(self.limit, wanted / norm) if norm > 0 else self.limit

    def state_dict(self) -> dict[str, float]:
        return dict(self.norms)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.norms = dict(state)
