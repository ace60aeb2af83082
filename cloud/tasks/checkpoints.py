"""Weights of task networks: read, compared, hashed and frozen."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.errors import InvalidBundle


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from torch's own format without executing anything. Raises InvalidBundle."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a broken file
        raise InvalidBundle(f"{path}: expected a readable checkpoint, got {type(error).__name__}: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]  # torchvision's reference scripts save it so
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise InvalidBundle(f"{path}: expected a state dict of tensors, got {type(loaded).__name__}")
    return loaded


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`. Raises InvalidBundle naming what differs if it is of another architecture."""
    own = model.state_dict()
    differences = [f"lacks {name}" for name in own if name not in state]
    differences += [f"has unknown {name}" for name in state if name not in own]
    differences += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InvalidBundle(f"{path}: checkpoint of another architecture: {'; '.join(differences[:3])}{more}")
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise InvalidBundle(f"{path}: {broken[0]} holds values that are not finite")
    model.load_state_dict(state)


def state_hash(model: nn.Module) -> str:
    """Hex SHA-256 over names, types, shapes and values of the state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def freeze(model: nn.Module) -> nn.Module:
    """eval(), and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)
