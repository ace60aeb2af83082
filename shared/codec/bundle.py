"""Weights bundle: a folder with `model.safetensors` and `manifest.json`, and nothing that can run code.

The model id is the SHA-256 over everything that decides a bit of the bitstream or a pixel: format, architecture,
skip threshold and every tensor's name, type, shape and bytes. What training needs to go on (`training.*` tensors)
and what no decoder reads (provenance, measured rates, `ranges`: the largest activations in g_a, for
`shared.codec.eight_bit`) are left out of it, so they can be mended without a new id.

    tensors     g_a.* h_a.* g_s.*   float16 [as in shared.codec.transforms]
                gain.log, gain.log_inverse   float32 [8, M]
                h_s.*               integers, see shared.codec.hyper. With a context model (h_s.context.*) a bundle is
                                    of format 3.
                tables.y.*, tables.z.*   entropy tables, see shared.codec.tables
                level.scale   uint8 [8], sides of the coded picture in 1/16 of the frame's, quality 1 to 8. A bundle
                              without it codes at full size, and is of format 1, which older readers know.
                training.*          float16: entropy bottleneck
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from shared.codec.hyper import CONTEXT
from shared.codec.transforms import Architecture
from shared.errors import InvalidBundle, UnknownModel

FORMATS = (1, 2, 3)
SCALE_TENSOR = "level.scale"
SCALE_STEPS = 16
FULL_SIZE = [SCALE_STEPS] * 8
TENSORS = "model.safetensors"
MANIFEST = "manifest.json"
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A codec's weights, checked. `skip_below`: scale indexes under it are not coded, their symbols are 0.

    `info`: the manifest's descriptive part (name, provenance, measured rate-accuracy table), as written at export.
    """

    model_id: str
    name: str
    architecture: Architecture
    skip_below: int
    arrays: Arrays
    info: Mapping[str, Any]


def compute_model_id(architecture: Architecture, skip_below: int, arrays: Arrays) -> str:
    """Hex SHA-256 over what decides bits and pixels, see the module's head."""
    digest = hashlib.sha256()
    head = {"format": _format(arrays), "architecture": architecture.as_dict(), "skip_below": skip_below}
    digest.update(json.dumps(head, sort_keys=True).encode())
    for name in sorted(arrays):
        if name.startswith("training."):
            continue
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_bundle(
    folder: Path, *, name: str, architecture: Architecture, skip_below: int, arrays: Arrays, info: Mapping[str, Any]
) -> Bundle:
    """Write a bundle; `info` must be JSON-able. Returns it with its model id. Files are replaced atomically."""
    model_id = compute_model_id(architecture, skip_below, arrays)
    manifest = {
        "format": _format(arrays),
        "name": name,
        "model_id": model_id,
        "architecture": architecture.as_dict(),
        "skip_below": skip_below,
        **info,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors, described = folder / (TENSORS + ".new"), folder / (MANIFEST + ".new")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tensors)
    tensors.chmod(0o644)  # safetensors writes for the owner alone; a bundle is for whoever runs the service
    described.write_text(json.dumps(manifest, indent=2) + "\n")
    tensors.replace(folder / TENSORS)
    described.replace(folder / MANIFEST)
    return Bundle(model_id, name, architecture, skip_below, arrays, info)


def load_bundle(reference: str | Path) -> Bundle:
    """Load a bundle by the name of a bundled one (`detection`) or by folder, and check its id.

    Raises UnknownModel where there is none, InvalidBundle where one is damaged or of another format.
    """
    folder = find_bundle(reference)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        arrays = load_file(folder / TENSORS)
        head = {key: manifest.pop(key) for key in ("format", "name", "model_id", "architecture", "skip_below")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidBundle(f"{folder}: expected a codec bundle, got {type(error).__name__}: {error}") from error
    if head["format"] not in FORMATS:
        raise InvalidBundle(f"{folder}: expected bundle format 1, 2 or 3, got {head['format']!r}")
    try:
        architecture = Architecture(**head["architecture"])
    except TypeError as error:
        raise InvalidBundle(f"{folder}: unknown architecture {head['architecture']!r}: {error}") from error
    model_id = compute_model_id(architecture, head["skip_below"], arrays)
    if model_id != head["model_id"]:
        raise InvalidBundle(f"{folder}: the manifest names model id {head['model_id']}, the content has {model_id}")
    if SCALE_TENSOR in arrays:
        _check_scales(arrays[SCALE_TENSOR], folder)
    return Bundle(model_id, head["name"], architecture, head["skip_below"], arrays, manifest)


def _format(arrays: Arrays) -> int:
    return 3 if CONTEXT + "weight1" in arrays else 2 if SCALE_TENSOR in arrays else 1


def _check_scales(scales: NDArray[Any], folder: Path) -> None:
    if scales.dtype != np.uint8 or scales.shape != (8,) or scales.min() < 1 or scales.max() > SCALE_STEPS:
        raise InvalidBundle(
            f"{folder}: {SCALE_TENSOR} must be 8 integers of 8 bit in [1, {SCALE_STEPS}], "
            f"got {scales.dtype} {scales.tolist()}"
        )


def find_bundle(reference: str | Path) -> Path:
    """The folder of a codec bundle. Raises UnknownModel naming the bundled ones."""
    for folder in (Path(reference), WEIGHTS / str(reference)):
        if (folder / MANIFEST).is_file() and (folder / TENSORS).is_file():
            return folder
    raise UnknownModel(
        f"no codec bundle {str(reference)!r}: expected a folder with {MANIFEST} and {TENSORS}, "
        f"or one of {', '.join(bundled_names()) or 'none bundled'}"
    )


def bundled_names() -> list[str]:
    """Names of the codec bundles that ship with the product."""
    names = []
    for manifest in sorted(WEIGHTS.glob(f"*/{MANIFEST}")):
        if "skip_below" in json.loads(manifest.read_text()):
            names.append(manifest.parent.name)
    return names
