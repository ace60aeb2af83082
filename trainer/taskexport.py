"""From a trained task network to the bundle that ships: safetensors in fp16, and a manifest that says where it is from.

A bundle is a folder with two files.

    weights.safetensors    fp16 state dict
    manifest.json          architecture, model id (SHA-256 of the weights as loaded), label space, provenance, figures
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cloud.tasks.bundled import NUM_CLASSES, BundledRCNN
from cloud.tasks.checkpoints import state_hash
from cloud.tasks.loading import ARCHITECTURES, MANIFEST, WEIGHTS_FILE
from shared.errors import NumericalError

MAX_BYTES = 12 * 10**6
LICENCES = {
    "trunk": "started from MobileNetV2 1.0 (ImageNet) of google-coral/test_data, commit 104342d2, Apache-2.0",
    "annotations": "COCO Consortium, CC BY 4.0, https://cocodataset.org/#termsofuse",
    "images": "belong to their Flickr authors under individual licences; none is part of this bundle",
    "weights": "Apache-2.0",
}


def export_task(
    model: BundledRCNN, folder: Path, *, name: str, provenance: dict[str, Any], measured: dict[str, Any]
) -> Path:
    """Write the bundle and return its folder. Raises NumericalError if a weight does not fit fp16."""
    halves = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    for key, value in halves.items():
        if not bool(value.isfinite().all()):
            raise NumericalError(f"{name}: {key} has values beyond fp16's range")
    shipped = copy.deepcopy(model).cpu()
    shipped.load_state_dict({k: v.float() for k, v in halves.items()})
    masks = model.roi_heads.mask_head is not None
    manifest = {
        "name": name,
        "architecture": next(k for k, has_masks in ARCHITECTURES.items() if has_masks == masks),
        "model_id": state_hash(shipped),
        "dtype": "float16",
        "parameters": sum(v.numel() for v in halves.values()),
        "label_space": {"classes": NUM_CLASSES, "ids": "COCO's 1..90 with gaps, 0 is background, as in torchvision"},
        "provenance": provenance,
        "licences": LICENCES,
        "measured": measured,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(halves, partial)
    if partial.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name}: {partial.stat().st_size} bytes, a bundled task network has at most {MAX_BYTES}")
    partial.replace(folder / WEIGHTS_FILE)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def averaged_network(checkpoint: Path, *, masks: bool) -> tuple[BundledRCNN, int, float]:
    """The network with the averaged weights of a checkpoint of `trainer.tasknet`, its steps and hours."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = BundledRCNN(masks=masks)
    model.load_state_dict({**state["model"], **state["average"]})
    return model, int(state["step"]), float(state["elapsed"]) / 3600
