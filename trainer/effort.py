"""Content-adaptive encoding (arXiv 2108.09992): more work at the encoder for one picture, the decoder as it is.

The latents' residuals from their means are moved so that rate and the frozen network's feature distance of the decode
fall together; hyper-latents, and with them means and scales, stay. Each residual is drawn between its two neighbouring
integers, ever more surely so, and gradients flow through the draw (stochastic Gumbel annealing: Yang, Bamler, Mandt,
"Improving Inference for Neural Image Compression", NeurIPS 2020). What comes out is judged with hard rounding, and the
plain encoding is kept where it is better.

With a context model the second pass's means and scales follow from the first pass's symbols. So the first pass moves
for half of the steps, beside the second as plainly coded; then it is settled, and the second moves under what follows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared.codec.codec import Codec
from shared.codec.hyper import first_pass
from shared.codec.transforms import interpolate_levels
from shared.codec.types import MEAN_STEPS, Bitstream, Frame, Symbols
from shared.errors import InvalidBundle
from trainer.export import SCALES
from trainer.frozen import BENEATH_PYRAMID, load_frozen
from trainer.losses import TaskLoss
from trainer.schedule import Schedule

# Fewest bits at equal features after 20 steps on 5 tuning pictures, of rates 0.02 to 0.1, temperatures 0.05 to 0.5 and
# coolings 0 to 2
RATE = 0.05  # in quantisation steps, see `Descent`
AVERAGED = (0.9, 0.99)  # decays of the gradient's and its square's averages, as Adam's betas
LONGEST = 0.3  # a latent's move in one step, in quantisation steps
TEMPERATURE = 0.3
COOLING = 1.0  # the temperature falls to exp(-COOLING) of it over the run
TASK = 2.0  # times the weight that features had in training: one picture's can be neared by more than all pictures'
LEAST_LIKELIHOOD = 2.0**-30


def recipe(steps: int) -> str:
    """Whatever decides the outcome beside codec, network and picture: a name to keep results by."""
    descent = f"rate={RATE}|averaged={AVERAGED}|longest={LONGEST}"
    return f"steps={steps}|{descent}|temperature={TEMPERATURE}|cooling={COOLING}|task={TASK}|beneath={BENEATH_PYRAMID}"


@dataclass(frozen=True, slots=True)
class Effort:
    """A coded picture and what the work brought: the weighted cost of the plain encoding and of this one."""

    bitstream: Bitstream
    plain_cost: float
    cost: float


def encode_with_effort(
    codec: Codec,
    frame: Frame,
    quality: float,
    task: TaskLoss,
    *,
    steps: int,
    schedule: Schedule,
    by_frame: bool = False,
    seed: int = 0,
) -> Effort:
    """Code `frame` with `steps` gradient steps on its latents.

    Cost is bits per coded pixel x w_rate + MSE x w_mse + feature distance x TASK x w_task, weighed as `schedule` ends;
    with `by_frame` bits per pixel of the frame, as codecs have it that were trained on crops as they are coded. A
    `task` that is not calibrated is calibrated on the frame. Deterministic for a `seed` on one device.
    """
    start = codec.analyse([frame], quality)[0]
    problem = _Problem(codec, frame, start, task, schedule, by_frame)
    generator = torch.Generator(device=codec.device).manual_seed(seed)
    plain = _Coding(start, codec)
    with torch.no_grad():
        y = codec.latents([frame], start.quality) * interpolate_levels(problem.log_gain, problem.steps)
    if not codec.h_s.parameters.context:
        residual = problem.moved(y - plain.means, plain, plain.coded, steps, generator)
        moved = replace(start, symbols=_symbols(residual.round() * plain.coded))
    else:
        first = torch.from_numpy(first_pass(*y.shape[1:])).to(y)
        residual = problem.moved(y - plain.means, plain, plain.coded * first, steps // 2, generator)
        z_hat = torch.from_numpy(start.z_hat)[None].to(codec.device)
        target = torch.where(first > 0, residual + plain.means, y)
        settled = codec.quantise_given(z_hat, target, [start.quality], [frame])[0]
        now = _Coding(settled, codec)
        residual = torch.where(first > 0, now.symbols, y - now.means)
        residual = problem.moved(residual, now, now.coded * (1 - first), steps - steps // 2, generator)
        moved = replace(settled, symbols=_symbols(residual.round() * now.coded))
    with torch.no_grad():
        plain_cost, cost_of_moved = (float(problem.cost(c.symbols, c)) for c in (plain, _Coding(moved, codec)))
    if cost_of_moved >= plain_cost:
        return Effort(codec.pack(start), plain_cost, plain_cost)
    return Effort(codec.pack(moved), plain_cost, cost_of_moved)


def labourer(codec: Codec, steps: int) -> Callable[[Frame, float], Bitstream]:
    """Encodes a frame at a quality with `steps` steps of effort, as its bundle was trained. Raises InvalidBundle."""
    info = codec.bundle.info
    network = info.get("task_network")
    if not isinstance(network, str) or network == "imagenet":
        raise InvalidBundle(
            f"{codec.bundle.name}: effort needs a bundle trained through a task network, got {network!r}"
        )
    frozen = load_frozen(network, None)
    frozen.to(codec.device)
    made = info["provenance"]
    schedule = Schedule(**made["schedule"])
    by_frame = bool(made.get("as_coded"))

    def encode(frame: Frame, quality: float) -> Bitstream:
        # a task loss of its own for each picture: it is calibrated on that picture, whichever came before
        task = TaskLoss(frozen, "features")
        with torch.enable_grad():
            result = encode_with_effort(codec, frame, quality, task, steps=steps, schedule=schedule, by_frame=by_frame)
        return result.bitstream

    return encode


class _Coding:
    """Symbols and what codes them, as tensors [1, M, hy, wy]: `coded` is 1 where a symbol is not skipped."""

    def __init__(self, symbols: Symbols, codec: Codec) -> None:
        indexes = torch.from_numpy(symbols.scale_indexes.astype(np.int64))[None].to(codec.device)
        self.symbols = torch.from_numpy(symbols.symbols)[None].to(codec.device).float()
        self.means = torch.from_numpy(symbols.means)[None].to(codec.device).float() / MEAN_STEPS
        self.scales = torch.from_numpy(SCALES.astype(np.float32)).to(codec.device)[indexes]
        self.coded = (indexes >= codec.bundle.skip_below).float()


class _Problem:
    """What stays the same over the steps for one picture."""

    def __init__(
        self, codec: Codec, frame: Frame, start: Symbols, task: TaskLoss, schedule: Schedule, by_frame: bool
    ) -> None:
        device = codec.device
        self.codec, self.task = codec, task
        self.steps = torch.tensor([start.quality], device=device)
        self.log_gain = torch.from_numpy(codec.bundle.arrays["gain.log"].astype(np.float32)).to(device)
        log_inverse = torch.from_numpy(codec.bundle.arrays["gain.log_inverse"].astype(np.float32)).to(device)
        self.inverse_gain = interpolate_levels(log_inverse, self.steps)
        self.x = torch.from_numpy(frame.rgb.copy()).to(device).permute(2, 0, 1)[None].float() / 255
        self.coded_size = codec.coded_size(frame.height, frame.width, start.quality)
        self.pixels = frame.height * frame.width if by_frame else self.coded_size[0] * self.coded_size[1]
        self.scale = task.network.short_side / min(frame.height, frame.width)
        with self.autocast():
            if not task.variances:
                task.calibrate(self.x, self.scale)
            with torch.no_grad():
                self.wanted = task.network.features(self.x, self.scale)
        self.weights = schedule.weights(1.0, (self.steps - 256).float() / 256)

    def autocast(self) -> torch.autocast:
        """The network in bfloat16 wherever the codec's transforms are not in float32 either."""
        dtype = self.codec.dtype
        return torch.autocast(self.codec.device.type, torch.bfloat16, enabled=dtype != torch.float32)

    def moved(
        self, residual: Tensor, coding: _Coding, movable: Tensor, steps: int, generator: torch.Generator
    ) -> Tensor:
        """`residual` after so many gradient steps; where `movable` is 0 it stays, and counts as rounded."""
        start = residual.detach()
        fixed = start.round() * coding.coded * (1 - movable)
        residual = start.clone().requires_grad_()
        descent = Descent(residual, movable > 0)
        for i in range(steps):
            temperature = TEMPERATURE * float(np.exp(-COOLING * i / steps))
            cost = self.cost(fixed + movable * _drawn(residual, temperature, generator), coding)
            descent.step(torch.autograd.grad(cost, residual)[0])
        return torch.where(movable > 0, residual.detach(), start)

    def cost(self, residual: Tensor, coding: _Coding) -> Tensor:
        """Weighted cost, a scalar, of residuals [1, M, hy, wy], whole or between integers, as `coding` codes them."""
        height, width = self.coded_size
        off = residual.abs()
        likelihood = _below((0.5 - off) / coding.scales) - _below((-0.5 - off) / coding.scales)
        bits = -(likelihood.clamp(min=LEAST_LIKELIHOOD).log2() * coding.coded).sum()
        scaled = (residual + coding.means) * self.inverse_gain
        scaled = scaled.to(self.codec.dtype).contiguous(memory_format=torch.channels_last)
        x_hat = self.codec.g_s(scaled)[:, :, :height, :width].float()
        if self.coded_size != tuple(self.x.shape[2:]):
            x_hat = F.interpolate(x_hat, self.x.shape[2:], mode="bicubic")
        mse = (x_hat - self.x).square().mean()
        with self.autocast():
            distance = self.task.distances_to(self.wanted, x_hat, self.scale)
        weights = self.weights
        return (weights.rate * bits / self.pixels + weights.mse * mse + TASK * weights.task * distance).sum()


class Descent:
    """Adam whose step is divided by the geometric mean of a latent's own gradient and that of all which are movable.

    By the own one alone, as Adam has it, latents that hardly matter move as far as those that do; by that of all alone,
    as plain descent has it, a few latents move and the rest stays.
    """

    def __init__(self, values: Tensor, movable: Tensor) -> None:
        self.values, self.movable = values, movable
        self.average, self.square = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.average.lerp_(gradient, 1 - AVERAGED[0])
        self.square.lerp_(gradient.square(), 1 - AVERAGED[1])
        average = self.average / (1 - AVERAGED[0] ** self.steps)
        square = self.square / (1 - AVERAGED[1] ** self.steps)
        of_all = square[self.movable].mean()
        move = (RATE * average / (square * of_all + 1e-30) ** 0.25).clamp(-LONGEST, LONGEST)
        # a picture may have no latent to move: the mean of none is not a number
        self.values -= torch.where(self.movable, move, 0.0)


def _symbols(values: Tensor) -> NDArray[np.int32]:
    made: NDArray[np.int32] = values[0].to(torch.int32).cpu().numpy()
    return made


def _below(x: Tensor) -> Tensor:
    """The normal distribution's cumulative function."""
    return 0.5 * torch.erfc(-x * 0.5**0.5)


def _drawn(residual: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Each residual between its neighbouring integers, drawn so that the nearer one is likelier, and softly."""
    low = residual.detach().floor()
    above = (residual - low).clamp(1e-4, 1 - 1e-4)
    logits = torch.stack([-torch.atanh(above), -torch.atanh(1 - above)]) / temperature
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6)
    gumbel = -torch.log(-torch.log(uniform))
    up = F.softmax((F.log_softmax(logits, 0) + gumbel) / temperature, 0)[1]
    return low + up
