"""From a trained codec to a weights bundle, and back to a trainable one.

Export folds the factorised prior's medians into h_a (so that z_hat is plain rounding), turns the float h_s into
integers, freezes the probability models as integer tables, measures the ranges of g_a's activations and what the
integers cost in rate, and writes fp16 weights. What training needs to go on is in a bundle too: the entropy bottleneck
in fp16 as `training.*`, and the float h_s and context model as their integers say.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.codec.bundle import SCALE_TENSOR, Bundle, compute_model_id, load_bundle, save_bundle
from shared.codec.codec import Codec
from shared.codec.eight_bit import ranges
from shared.codec.hyper import SCALE_COUNT
from shared.codec.tables import from_pmfs, gaussian_tables
from shared.codec.transforms import interpolate_levels
from shared.codec.types import Frame
from trainer.integer_cost import code_lengths
from trainer.model import LEVELS, SCALE_MAX, SCALE_MIN, TrainableCodec
from trainer.quantise import Calibration, float_hyper_synthesis, quantise_hyper_synthesis

SKIP_BELOW = 3  # scale index; below it a latent is nonzero less than once in 700
SCALES = np.exp(np.linspace(np.log(SCALE_MIN), np.log(SCALE_MAX), SCALE_COUNT))  # of the tables, by scale index
PMF_TAIL = 1e-7
PMF_REACH = 1024
_PRIOR = "training.entropy_bottleneck."


@torch.no_grad()
def export_bundle(
    model: TrainableCodec,
    calibration: Sequence[Tensor],
    folder: Path,
    *,
    name: str,
    info: Mapping[str, Any],
    scales: Sequence[int] | None = None,
) -> Bundle:
    """Write `model` as a bundle. `calibration`: pictures [3, H, W] in [0, 1], of one size, sides multiples of 64.

    Pictures of 320 pixels or more: smaller ones have too few hyper-latents to tell how large activations get. `scales`:
    sides at which it codes pictures, in 1/16 of the frame's, at quality 1 to 8; None is full size. `info` has the
    `ranges` of g_a's activations where they are known, else they are those of these pictures. In the manifest,
    `integer_cost` says how many more bits the pictures' latents take for the integers, at quality 1 to 8.
    """
    model = model.eval().float()
    medians = model.medians()
    if "ranges" not in info:
        info = {**info, "ranges": activation_ranges(model, calibration)}
    arrays: dict[str, NDArray[Any]] = {}
    for prefix in ("g_a", "h_a", "g_s"):
        for key, value in getattr(model, prefix).state_dict().items():
            arrays[f"{prefix}.{key}"] = value.to(torch.float16).numpy()
    folded = model.h_a.last.bias - medians.flatten()  # type: ignore[operator]
    arrays["h_a.last.bias"] = folded.to(torch.float16).numpy()
    arrays["gain.log"] = model.log_gain.detach().numpy().astype(np.float32)
    arrays["gain.log_inverse"] = model.log_inverse_gain.detach().numpy().astype(np.float32)
    arrays |= quantise_hyper_synthesis(model, coded_at_all_levels(model, calibration))
    arrays |= gaussian_tables(SCALES).to_arrays("tables.y")
    arrays |= from_pmfs(*factorised_pmfs(model)).to_arrays("tables.z")
    if scales is not None:
        arrays[SCALE_TENSOR] = np.array(scales, np.uint8)
    for key, value in model.entropy_bottleneck.state_dict().items():
        if value.is_floating_point() and value.numel() and "bound" not in key and key != "target":
            arrays[_PRIOR + key] = value.to(torch.float16).numpy()
    model_id = compute_model_id(model.arch, SKIP_BELOW, arrays)
    codec = Codec(Bundle(model_id, name, model.arch, SKIP_BELOW, arrays, info))
    frames = [Frame((picture * 255).round().byte().permute(1, 2, 0).numpy()) for picture in calibration]
    info = {**info, "integer_cost": [round(row.cost, 5) for row in code_lengths(codec, model, frames)]}
    return save_bundle(folder, name=name, architecture=model.arch, skip_below=SKIP_BELOW, arrays=arrays, info=info)


def activation_ranges(model: TrainableCodec, pictures: Iterable[Tensor]) -> dict[str, list[float]]:
    """A manifest's `ranges`, to four significant digits. `pictures`: [3, H, W] in [0, 1], sides multiples of 16."""
    largest = ranges(model.eval().float().g_a, (picture[None] for picture in pictures))
    return {"g_a": [float(f"{value:.4g}") for value in largest]}


@torch.no_grad()
def trainable_from_bundle(reference: str | Path) -> TrainableCodec:
    """A bundle's weights in a model that training can go on from."""
    bundle = load_bundle(reference)
    model = TrainableCodec(bundle.architecture)
    state = model.state_dict()
    floats = {k.removeprefix("training."): v for k, v in bundle.arrays.items() if not k.startswith("h_s.")}
    for key, value in {**floats, **float_hyper_synthesis(bundle.arrays)}.items():
        if key in state:
            state[key] = torch.from_numpy(np.asarray(value)).to(state[key].dtype).reshape(state[key].shape)
    state["log_gain"] = torch.from_numpy(bundle.arrays["gain.log"].copy())
    state["log_inverse_gain"] = torch.from_numpy(bundle.arrays["gain.log_inverse"].copy())
    model.load_state_dict(state)
    model.h_a.last.bias.add_(model.medians().flatten())  # type: ignore[union-attr]
    return model


@torch.no_grad()
def factorised_pmfs(model: TrainableCodec) -> tuple[list[NDArray[np.float64]], list[int]]:
    """Probabilities of each hyper channel's rounded symbols and the smallest symbol of each, in float64."""
    prior = model.entropy_bottleneck.double()
    grid = torch.arange(-PMF_REACH, PMF_REACH + 1, dtype=torch.float64)
    medians = prior.quantiles[:, :, 1:2].detach()
    likelihood, _, _ = prior._likelihood(grid[None, None, :] + medians)
    prior.float()
    pmfs, offsets = [], []
    for row in likelihood[:, 0].numpy():
        kept = np.flatnonzero(row > PMF_TAIL)
        first, last = (kept[0], kept[-1]) if len(kept) else (PMF_REACH, PMF_REACH)
        pmfs.append(row[first : last + 1])
        offsets.append(int(first) - PMF_REACH)
    return pmfs, offsets


@torch.no_grad()
def coded_at_all_levels(model: TrainableCodec, pictures: Sequence[Tensor]) -> list[Calibration]:
    """What the entropy model sees of the pictures at each quality; pictures must share one size."""
    y = model.g_a(torch.stack(list(pictures)))
    seen = []
    for level in range(LEVELS):
        steps = torch.full((len(y),), 256 * (level + 1))
        scaled = y * interpolate_levels(model.log_gain, steps)
        seen.append(Calibration(scaled, (model.h_a(scaled) - model.medians()).round(), steps))
    return seen
