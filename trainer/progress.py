"""What a codec run shows: a bar with rate, distortion, task loss, weights and time left; a log; TensorBoard.

Figures are means since the last line, per quality level where that says more. Nothing here touches the training.
"""

import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.losses import Terms
from trainer.model import LEVELS
from trainer.schedule import GradientBalance, Schedule

PANEL_MINUTES = 5.0
PANEL_PICTURES = 4


class Monitor:
    """Collects each step's terms; draws the bar, and every `log_seconds` writes a line and scalars."""

    def __init__(self, folder: Path, schedule: Schedule, *, log_seconds: float = 60.0) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._log = (folder / "log.txt").open("a")
        self._schedule, self._log_seconds = schedule, log_seconds
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train codec", total=1.0, figures="")
        self._bar.start()
        self._started = self._last_line = time.monotonic()
        self._last_panel = -math.inf
        self._first_progress: float | None = None
        self._sums = torch.zeros(LEVELS, 4)  # count, rate, mse, task

    def step(
        self,
        step: int,
        progress: float,
        loss: float,
        terms: Terms,
        levels: Tensor,
        balance: GradientBalance,
        norm: float,
    ) -> None:
        """Take in one step. `levels`: float [B], 0 to 7. `norm`: the gradient's before clipping."""
        if self._first_progress is None:
            self._first_progress = progress
        task = terms.task if terms.task is not None else torch.zeros_like(terms.rate)
        rows = torch.stack([torch.ones_like(terms.rate), terms.rate, terms.mse, task], 1).detach().float().cpu()
        self._sums.index_add_(0, levels.round().long().cpu(), rows)
        now = time.monotonic()
        weights = self._schedule.weights(progress, torch.tensor(3.5))
        shown = {"rate": float(weights.rate), "mse": float(weights.mse), "task": float(weights.task)}
        mean = rows.mean(0)
        self._bar.update(
            self._task,
            completed=progress,
            figures=(
                f"step {step}  loss {loss:.3f}  {mean[1]:.3f} bpp  {_db(float(mean[2])):.1f} dB  task {mean[3]:.3f}  "
                f"w {shown['rate']:.2g}/{shown['mse']:.3g}/{shown['task']:.2g}  left {self._left(progress, now)}"
            ),
        )
        if now - self._last_line >= self._log_seconds or progress >= 1:
            self._line(step, progress, loss, norm, shown, balance)
            self._last_line = now

    def _line(
        self, step: int, progress: float, loss: float, norm: float, weights: dict[str, float], balance: GradientBalance
    ) -> None:
        parts = []
        for level, (count, rate, mse, task) in enumerate(self._sums.tolist()):
            if count:
                parts.append(f"{rate / count:.3f}bpp/{_db(mse / count):.1f}dB/{task / count:.3f}")
                for name, value in (("rate_bpp", rate), ("mse", mse), ("task", task)):
                    self._writer.add_scalar(f"{name}/quality_{level + 1}", value / count, step)
        self._sums.zero_()
        self._writer.add_scalar("loss", loss, step)
        self._writer.add_scalar("gradient_norm", norm, step)
        for name, value in weights.items():
            self._writer.add_scalar(f"weight/{name}", value, step)
            self._writer.add_scalar(f"balance/{name}", balance.factor(name), step)
        line = (
            f"step {step} p {progress:.4f} left {self._left(progress, time.monotonic())} loss {loss:.4f} gn {norm:.2f} "
            f"w {weights['rate']:.3g}/{weights['mse']:.3g}/{weights['task']:.3g} "
            f"b {'/'.join(f'{balance.factor(n):.2g}' for n in weights)} | {' '.join(parts)}"
        )
        self.say(line)

    def say(self, line: str) -> None:
        """A line in the log, above the bar, or on stderr where there is none."""
        self._log.write(line + "\n")
        self._log.flush()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def wants_panel(self) -> bool:
        return time.monotonic() - self._last_panel >= 60 * PANEL_MINUTES

    def panel(self, step: int, x: Tensor, x_hat: Tensor) -> None:
        """Crops above their decodes."""
        rows = [torch.cat(list(t[:PANEL_PICTURES].detach().float().clamp(0, 1).cpu()), 2) for t in (x, x_hat)]
        self._writer.add_image("crops and decodes", torch.cat(rows, 1), step)
        self._last_panel = time.monotonic()

    def close(self) -> None:
        self._bar.stop()
        self._writer.close()
        self._log.close()

    def _left(self, progress: float, now: float) -> str:
        done = progress - (self._first_progress or 0.0)
        if done <= 0:
            return "?"
        seconds = int((now - self._started) * (1 - progress) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _db(mse: float) -> float:
    return -10 * math.log10(max(mse, 1e-10))
