"""Task models by name: `load_task`.

A name is one of these:

    "faster-rcnn-mobilenetv2", "mask-rcnn-mobilenetv2"    bundled, nothing is downloaded
    "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", ..., "deeplabv3_resnet50", ...    torchvision's builders
    a folder with manifest.json and weights.safetensors    a network made by `sightline train task`
    a path that ends in .onnx                              an ONNX detector with YOLOX's layout
"""

import json
from pathlib import Path
from typing import Any

from torchvision import models
from torchvision.models import detection, segmentation

from cloud.tasks.bundled import NUM_CLASSES, BundledRCNN
from cloud.tasks.checkpoints import load_strictly, read_state, state_hash
from cloud.tasks.onnx import OnnxDetector
from cloud.tasks.roi_heads import PartialTruthRoIHeads
from cloud.tasks.torchvision_models import TorchvisionDetector, TorchvisionSegmenter
from cloud.tasks.types import TaskModel
from shared.errors import InvalidBundle, Unavailable, UnknownModel

BUNDLED = ("faster-rcnn-mobilenetv2", "mask-rcnn-mobilenetv2")
WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights"
MANIFEST, WEIGHTS_FILE = "manifest.json", "weights.safetensors"
ARCHITECTURES = {"faster-rcnn-mobilenetv2-fpn": False, "mask-rcnn-mobilenetv2-fpn": True}
"""Architecture of this project named in a manifest, and whether it has masks. Others are torchvision's builders."""
ARCHITECTURE_OF = dict(zip(BUNDLED, ARCHITECTURES, strict=True))


def available_tasks() -> list[str]:
    """Every name `load_task` knows; paths come on top."""
    return [*BUNDLED, *models.list_models(detection), *models.list_models(segmentation)]


def load_task(
    name: str, *, weights: str | Path = "default", device: str = "cpu", threads: int | None = None
) -> TaskModel:
    """A frozen task model.

    `weights`, for torchvision's builders: "default" (downloaded by torchvision), "random" (benchmarks), or the path
    of a local checkpoint. `threads`: for ONNX. Raises UnknownModel, InvalidBundle, Unavailable.
    """
    path = Path(name)
    if path.suffix == ".onnx":
        return OnnxDetector(path, threads=threads)
    if name in BUNDLED:
        return load_bundled(WEIGHTS / name, name, device=device)
    if name in models.list_models(detection) or name in models.list_models(segmentation):
        return _torchvision(name, weights, device)
    if (path / MANIFEST).is_file():
        return load_bundled(path, name, device=device)
    raise UnknownModel(
        f"no task model {name!r}; there are {', '.join(available_tasks())}, and paths to .onnx or a bundle"
    )


def load_bundled(folder: Path, name: str, *, device: str = "cpu") -> TorchvisionDetector:
    """A network of this project from its folder. Raises UnknownModel if it is absent, InvalidBundle if broken."""
    if not (folder / MANIFEST).is_file():
        raise UnknownModel(f"{name}: there is no {folder / MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        architecture, model_id = str(manifest["architecture"]), manifest["model_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidBundle(
            f"{folder / MANIFEST}: expected 'architecture' and 'model_id', got {type(error).__name__} {error}"
        ) from error
    model: Any
    if architecture in ARCHITECTURES:
        model = BundledRCNN(masks=ARCHITECTURES[architecture])
    elif architecture in models.list_models(detection):
        model = torchvision_network(architecture, published=False)
    else:
        raise InvalidBundle(
            f"{folder / MANIFEST}: 'architecture' is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}, or "
            "a detector of torchvision"
        )
    load_strictly(model, read_state(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    if (found := state_hash(model)) != model_id:
        raise InvalidBundle(f"{folder / WEIGHTS_FILE}: expected weights with SHA-256 {model_id}, got {found}")
    return TorchvisionDetector(model, name, device=device, model_id=model_id)


def torchvision_network(name: str, *, published: bool) -> Any:
    """torchvision's network: with its published weights, or with random ones and COCO's label space where it has one.

    Raises Unavailable if the weights cannot be downloaded.
    """
    options: dict[str, Any] = {"weights": "DEFAULT"}
    if not published:
        options = {"weights": None, "weights_backbone": None}
        if name in models.list_models(detection) and not name.startswith("keypoint"):
            options["num_classes"] = NUM_CLASSES
    try:
        model = models.get_model(name, **options)
    except OSError as error:  # urllib's errors are among them
        raise Unavailable(f"{name}: torchvision could not download its weights: {error}") from error
    if name.startswith("maskrcnn"):
        model.roi_heads = PartialTruthRoIHeads.adopt(model.roi_heads)
    return model


def _torchvision(name: str, weights: str | Path, device: str) -> TaskModel:
    model = torchvision_network(name, published=weights == "default")
    if weights not in ("default", "random"):
        load_strictly(model, read_state(Path(weights)), Path(weights))
    if name in models.list_models(segmentation):
        return TorchvisionSegmenter(model, name, device=device)
    return TorchvisionDetector(model, name, device=device)
