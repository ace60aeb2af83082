"""From a trained task network to a bundle: safetensors, and a manifest that says where it is from.

A bundle is a folder with two files.

    weights.safetensors    state dict, in fp16 for the networks of this project
    manifest.json          architecture, model id (SHA-256 of the weights as loaded), label space, provenance, figures
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from cloud.tasks.bundled import NUM_CLASSES, BundledRCNN
from cloud.tasks.checkpoints import state_hash
from cloud.tasks.loading import ARCHITECTURE_OF, MANIFEST, WEIGHTS_FILE
from shared.errors import NumericalError

MAX_BYTES = 12 * 10**6
LICENCES = {
    "trunk": "started from MobileNetV2 1.0 (ImageNet) of google-coral/test_data, commit 104342d2, Apache-2.0",
    "annotations": "COCO Consortium, CC BY 4.0, https://cocodataset.org/#termsofuse",
    "images": "belong to their Flickr authors under individual licences; none is part of this bundle",
    "weights": "Apache-2.0",
}


def export_task(
    model: nn.Module,
    folder: Path,
    *,
    name: str,
    architecture: str,
    provenance: dict[str, Any],
    measured: dict[str, Any],
) -> Path:
    """Write the bundle and return its folder.

    `architecture`: one of `cloud.tasks.loading.BUNDLED`, or torchvision's name. Raises NumericalError if a weight is
    not finite in the type it is stored in.
    """
    ours = isinstance(model, BundledRCNN)
    dtype = torch.float16 if ours else torch.float32  # norms of torchvision's have variances that fp16 makes zero
    stored = {
        k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype).contiguous()
        for k, v in model.state_dict().items()
    }
    for key, value in stored.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NumericalError(f"{name}: {key} has values that are not finite in {dtype}")
    shipped = copy.deepcopy(model).cpu()
    shipped.load_state_dict(stored)
    manifest = {
        "name": name,
        "architecture": ARCHITECTURE_OF.get(architecture, architecture),
        "model_id": state_hash(shipped),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "label_space": {"classes": NUM_CLASSES, "ids": "COCO's 1..90 with gaps, 0 is background, as in torchvision"},
        "provenance": provenance,
        "licences": LICENCES if ours else {},
        "measured": measured,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(stored, partial)
    if ours and partial.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name}: {partial.stat().st_size} bytes, a bundled task network has at most {MAX_BYTES}")
    partial.chmod(0o644)  # safetensors gives the file to its owner alone
    partial.replace(folder / WEIGHTS_FILE)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def averaged_network(checkpoint: Path, *, masks: bool) -> tuple[BundledRCNN, int, float]:
    """The network with the averaged weights of a checkpoint of `trainer.tasknet`, its steps and hours."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = BundledRCNN(masks=masks)
    model.load_state_dict({**state["model"], **state["average"]})
    return model, int(state["step"]), float(state["elapsed"]) / 3600
