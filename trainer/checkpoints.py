"""Checkpoints of a codec run: written so that a kill leaves either the old or the new one, and read with care.

    {"net": state dict, "average": state dict or None, "architecture": {...}, "step", "elapsed_s",
     "optimizer", "balance", "variances", "harvest"}

`net` alone is enough to start from. Loading runs no code (`weights_only`).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloud.tasks.checkpoints import load_strictly
from shared.codec.transforms import Architecture
from shared.errors import InvalidBundle, Unavailable
from trainer.export import trainable_from_bundle
from trainer.model import TrainableCodec


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write and fsync beside, then rename. Raises Unavailable when the disk has no room."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{path}: the checkpoint could not be written: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises InvalidBundle for a file that is no checkpoint of a codec run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidBundle(f"{path}: expected a checkpoint of a codec run, got {type(error).__name__}") from error
    except Exception as error:  # torch raises pickle.UnpicklingError for what it refuses to load
        raise InvalidBundle(f"{path}: not loaded as a checkpoint: {type(error).__name__}") from error
    if not isinstance(state, dict) or "net" not in state:
        raise InvalidBundle(f"{path}: expected a checkpoint with the field 'net'")
    return state


def starting_model(reference: str | None, architecture: Architecture | None) -> TrainableCodec:
    """A codec with the weights of a bundle or checkpoint, or fresh ones.

    `architecture`: None takes that of `reference`. A bundle's codec may have fewer latents, for `latents.widened`.
    Raises InvalidBundle, saying what differs, where they disagree otherwise.
    """
    if reference is None:
        return TrainableCodec(architecture)
    if Path(reference).is_file():
        state = read_checkpoint(Path(reference))
        stored = Architecture(**state["architecture"]) if "architecture" in state else None
        model = TrainableCodec(architecture or stored)
        load_strictly(model, state.get("average") or state["net"], Path(reference))
        return model
    model = trainable_from_bundle(reference)
    if architecture is not None and replace(model.arch, m=architecture.m) != architecture:
        raise InvalidBundle(f"{reference}: bundle of another architecture: {_differences(model.arch, architecture)}")
    if architecture is not None and model.arch.m > architecture.m:
        raise InvalidBundle(f"{reference}: bundle of {model.arch.m} latents, which cannot be made {architecture.m}")
    return model


def require_room(folder: Path, model: nn.Module, checkpoints: int) -> None:
    """Raises Unavailable if the disk under `folder` cannot hold `checkpoints` checkpoints and one being written."""
    one = 3 * sum(p.numel() * 4 for p in model.parameters())  # weights and Adam's two moments
    wanted = one * (checkpoints + 1)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < wanted:
        raise Unavailable(f"{folder}: checkpoints need {wanted >> 20} MiB, the disk has {free >> 20} MiB free")


def _differences(one: Architecture, other: Architecture) -> str:
    mine, theirs = one.as_dict(), other.as_dict()
    return ", ".join(f"{k} is {mine[k]}, expected {theirs[k]}" for k in mine if mine[k] != theirs[k])
