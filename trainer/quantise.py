"""From the float h_s and context model to the integers of `shared.codec.hyper`, calibrated on real pictures, and back.

Weights get 8 bits with a scale an output channel; activations 8 bits with a scale a layer, its top chosen so that
`coverage` of the calibration activations stay below it. Eight bits are not only for speed: integers of 8 significant
bits pass TF32 and bfloat16 unchanged, which is what makes the integer layers immune to precision switches. Before
quantising, channel ranges are evened out between a layer and the next (Nagel et al., "Data-free quantization through
weight equalization", ICCV 2019): relu(s a) = s relu(a), so a channel may be scaled up here and down there.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.codec.hyper import CONTEXT, MAX_MULTIPLIER, SCALE_COUNT
from shared.codec.types import MEAN_STEPS
from trainer.model import ACT_MAX, SCALE_MAX, SCALE_MIN, TrainableCodec, Units, weight_steps

SHIFT_LIMIT = 36
WEIGHT_SPREAD = 16.0  # largest weights of a channel that is read by another layer, to those of the median channel
LOG_STEP = (math.log(SCALE_MAX) - math.log(SCALE_MIN)) / (SCALE_COUNT - 1)
ACT_UNIT = 1 / 32  # what an activation's step becomes when integers go back to floats; any would do the same

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the entropy model is given for some pictures: scaled latents `y` [B, M, h, w], hyper-latents' symbols
    `z_hat` [B, Z, hz, wz], qualities in 1/256 steps [B]."""

    y: Tensor
    z_hat: Tensor
    quality_steps: Tensor


@torch.no_grad()
def compute_as_integers(model: TrainableCodec, calibration: list[Calibration], *, coverage: float) -> None:
    """From now on the entropy model computes as the integers it becomes, so that training mends what those cost.

    Channels are evened out, which changes weights but not what they compute. `coverage`: share of the calibration
    activations that stay below the largest integer.
    """
    even = _equalised(model, calibration)
    model.units = _units(even, calibration, coverage)
    model.h_s.load_state_dict(even.h_s.state_dict())
    if model.context is not None and even.context is not None:
        model.context.load_state_dict(even.context.state_dict())


@torch.no_grad()
def quantise_hyper_synthesis(
    model: TrainableCodec, calibration: list[Calibration], *, coverage: float = 0.9999
) -> Arrays:
    """Integer parameters as `IntegerHyperSynthesis.from_arrays` takes them, of the context model too where there is
    one. A model that has units keeps them, and `calibration` and `coverage` are not looked at."""
    even = _equalised(model, calibration) if model.units is None else model
    units = model.units or _units(even, calibration, coverage)
    h_s = even.h_s
    bias3 = h_s.conv3.bias.clone()  # type: ignore[union-attr]
    bias3[even.arch.m : 2 * even.arch.m] -= math.log(SCALE_MIN)
    out_units = _output_units(even.arch.m)
    last = torch.cat([out_units, torch.full((even.arch.context,), units[-1])])
    arrays: Arrays = {"h_s.act_max": np.full(2, ACT_MAX, np.int64)}
    arrays["h_s.level_bias"] = _integer_bias(h_s.level_bias, h_s.conv1.weight, 1.0)
    arrays |= _integer_layers(
        "h_s.",
        [
            (h_s.conv1.weight, h_s.conv1.bias, 1.0, torch.full((len(h_s.conv1.weight),), units[0])),
            (h_s.conv2.weight, h_s.conv2.bias, units[0], torch.full((len(h_s.conv2.weight),), units[1])),
            (h_s.conv3.weight, bias3, units[1], last),
        ],
    )
    if even.context is not None:
        one, two = even.context.conv1, even.context.conv2
        arrays[CONTEXT + "act_max"] = np.full(1, ACT_MAX, np.int64)
        hidden = even.arch.context
        arrays |= _integer_layers(
            CONTEXT,
            [
                (one.weight, torch.zeros(hidden), 1.0, torch.full((hidden,), units[2])),
                (two.weight, two.bias, units[2], out_units),
            ],
        )
    return arrays


def float_hyper_synthesis(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """State of `TrainableCodec.h_s` and `.context` that does what the integers of a bundle do, to their rounding."""
    m = len(arrays["gain.log"][0])
    out_units = _output_units(m).numpy()
    hidden = len(arrays["h_s.weight3"]) - 2 * m
    last = np.concatenate([out_units, np.full(hidden, ACT_UNIT)])
    state: Arrays = {}
    for i, unit_in, unit_out in ((1, 1.0, ACT_UNIT), (2, ACT_UNIT, ACT_UNIT), (3, ACT_UNIT, last)):
        weight, bias, worth = _float_layer(arrays, "h_s.", i, unit_in, unit_out)
        state |= {f"h_s.conv{i}.weight": weight, f"h_s.conv{i}.bias": bias}
        if i == 1:
            state["h_s.level_bias"] = arrays["h_s.level_bias"] * worth
    state["h_s.conv3.bias"][m : 2 * m] += math.log(SCALE_MIN)
    if CONTEXT + "weight1" in arrays:
        state["context.conv1.weight"], _, _ = _float_layer(arrays, CONTEXT, 1, 1.0, ACT_UNIT)
        weight, bias, _ = _float_layer(arrays, CONTEXT, 2, ACT_UNIT, out_units)
        state |= {"context.conv2.weight": weight, "context.conv2.bias": bias}
    return state


def _output_units(m: int) -> Tensor:
    """What one step of a mean and of a scale index is worth, [2 M]."""
    return torch.cat([torch.full((m,), 1 / MEAN_STEPS), torch.full((m,), LOG_STEP)])


def _integer_bias(bias: Tensor, weight: Tensor, unit_in: float) -> NDArray[np.int64]:
    made: NDArray[np.int64] = (bias / (weight_steps(weight) * unit_in)).round().to(torch.int64).numpy()
    return made


def _integer_layers(prefix: str, layers: Iterable[tuple[Tensor, Tensor | None, float, Tensor]]) -> Arrays:
    """`layers`: weight, bias, what one step of the input is worth, and of each output."""
    arrays: Arrays = {}
    shifts = []
    for i, (weight, bias, unit_in, units_out) in enumerate(layers, start=1):
        scales = weight_steps(weight)
        arrays[f"{prefix}weight{i}"] = (weight / scales[:, None, None, None]).round().to(torch.int8).numpy()
        arrays[f"{prefix}bias{i}"] = _integer_bias(bias if bias is not None else torch.zeros(1), weight, unit_in)
        ratio = (scales * unit_in / units_out).double().numpy()
        shift = min(SHIFT_LIMIT, math.floor(math.log2((MAX_MULTIPLIER - 1) / ratio.max())))
        arrays[f"{prefix}multiplier{i}"] = np.rint(ratio * 2.0**shift).astype(np.int64)
        shifts.append(shift)
    arrays[f"{prefix}shift"] = np.array(shifts, np.int64)
    return arrays


def _float_layer(
    arrays: Mapping[str, NDArray[Any]], prefix: str, i: int, unit_in: float, unit_out: float | NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Weight and bias of integer layer `i` in floats, and what one step of its sums is worth."""
    worth = arrays[f"{prefix}multiplier{i}"] * 2.0 ** -int(arrays[f"{prefix}shift"][i - 1]) * unit_out
    weight = arrays[f"{prefix}weight{i}"] * (worth / unit_in)[:, None, None, None]
    return weight, arrays[f"{prefix}bias{i}"] * worth, worth


def _equalised(model: TrainableCodec, calibration: list[Calibration]) -> TrainableCodec:
    """The model with each hidden channel's calibration maximum as far from the mean one as the weights that read it.

    Where both are so already nothing changes: integers that went back to floats, were trained on and become integers
    again are not evened out once more, at the cost of the next layer's small weights.
    """
    even = TrainableCodec(model.arch)
    h_s, context = even.h_s, even.context
    h_s.load_state_dict(model.h_s.state_dict())
    if context is not None and model.context is not None:
        context.load_state_dict(model.context.state_dict())
    for layer in range(3 if context is not None else 2):
        peaks = torch.zeros(())
        for seen in calibration:
            peaks = torch.maximum(peaks, _hidden(even, seen)[layer].amax(dim=(0, 2, 3)))
        if layer == 0:
            made, after = [h_s.conv1.weight, h_s.conv1.bias, h_s.level_bias.T], h_s.conv2.weight
        elif layer == 1:
            made, after = [h_s.conv2.weight, h_s.conv2.bias], h_s.conv3.weight
        else:
            rows = slice(2 * even.arch.m, None)
            made = [h_s.conv3.weight[rows], h_s.conv3.bias[rows], context.conv1.weight]  # type: ignore[index,union-attr]
            after = context.conv2.weight  # type: ignore[union-attr]
        reading = after.abs().amax(dim=(0, 2, 3))
        # what this layer's activations gain, the next one's weights lose
        factor = (_relative(peaks) / _relative(reading)).sqrt().clamp(0.1, 10)
        # one that is 0 in all pictures stays: made larger each time, it would be all or nothing where it is not 0
        factor = torch.where(peaks < 1e-3 * peaks.mean(), 1.0, factor)
        # pixel shuffle: channel c comes from outputs 4c to 4c + 3
        outputs = 1 if layer == 2 else 4
        largest = made[0].abs().amax(dim=(1, 2, 3)).reshape(-1, outputs).amax(dim=1)
        # all of a layer's multipliers share one shift: one far above the others would leave those few bits
        factor = torch.maximum(factor, largest / (WEIGHT_SPREAD * largest.median()).clamp(min=1e-9))
        spread = factor.repeat_interleave(outputs)
        for part in made:
            part.div_(spread.reshape(-1, *[1] * (part.ndim - 1)))  # type: ignore[union-attr]
        after.mul_(factor[None, :, None, None])
    return even


def _relative(values: Tensor) -> Tensor:
    """To their mean; none below a thousandth of it, nor where all are 0."""
    return (values / values.mean().clamp(min=1e-9)).clamp(min=1e-3)


def _hidden(model: TrainableCodec, seen: Calibration) -> list[Tensor]:
    """Activations after each hidden layer, in floats."""
    hidden = list(model.h_s.hidden(seen.z_hat, seen.quality_steps))
    if model.context is not None:
        prior, added_to = model.h_s(seen.z_hat, seen.quality_steps, (seen.y.shape[2], seen.y.shape[3]))
        known = model.known(seen.y, prior[:, : model.arch.m])
        hidden.append(model.context.hidden(added_to, known))
    return hidden


def _units(model: TrainableCodec, calibration: list[Calibration], coverage: float) -> Units:
    """What one step of an activation is worth, by hidden layer."""
    tops: list[float] = []
    for layers in zip(*(_hidden(model, seen) for seen in calibration), strict=True):
        kept = []
        for a in layers:
            values = a.flatten()
            rank = max(1, int((1 - coverage) * values.numel()))
            kept.append(float(values.topk(rank).values[-1]))
        tops.append(max(1e-3, *kept))
    return tuple(top / ACT_MAX for top in tops)
