"""`train_task`: a task network from a user's COCO-format data, the one straight line from settings to a bundle.

    settings -> examples (training, held out), starting network      all checked before the first step
             -> `trainer.tasknet.fit`
             -> COCO's figures of the averaged weights on the held-out images
             -> out/bundle, which `cloud.tasks.load_task` takes by its path

Held out are the images of the committed tuning split where the data has all of them, else a random share.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import load_strictly, read_state
from cloud.tasks.loading import BUNDLED, MANIFEST, WEIGHTS, WEIGHTS_FILE, torchvision_network
from cloud.tasks.torchvision_models import TorchvisionDetector
from cloud.tasks.types import TaskModel
from shared.errors import InvalidInput, InvalidSettings
from trainer.data import Example, load_coco, tuning_ids
from trainer.evaluation.coco import evaluate_task
from trainer.provenance import commit, hardware
from trainer.settings import to_toml
from trainer.taskexport import export_task
from trainer.tasknet import CHECKPOINT, TaskTraining, fit, start_from_boxes, start_from_imagenet


@dataclass(frozen=True, slots=True)
class TrainTaskSettings:
    """What to train, on what, and from where.

    `out`: folder of the run. `images`: folder of pictures. `annotations`: COCO-format file for them. `training`: how
    long and how fast. `network`: faster-rcnn-mobilenetv2, mask-rcnn-mobilenetv2 or a detector of torchvision.
    `start_from`: "random", a bundle (name or folder), or a file, which is a checkpoint of the network, or for the
    bundled ones ImageNet's MobileNetV2; a Mask R-CNN takes a Faster R-CNN's bundle too; without it training starts
    from the network as it ships, the bundled one or torchvision's published weights. `name`: the bundle's name,
    without it the network's. `held_out`: share of the images that is not trained on but measured, 0 for no
    measurement. `resume`: go on from the checkpoint in the run's folder. `threads`: CPU threads, 0 for torch's choice.
    """

    out: Path
    images: Path
    annotations: Path
    training: TaskTraining
    network: str = BUNDLED[0]
    start_from: str | None = None
    name: str | None = None
    held_out: float = 0.05
    resume: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if self.network not in trainable_networks():
            raise InvalidSettings(
                f"train task: 'network' is {self.network!r}, expected one of {', '.join(trainable_networks())}"
            )
        if not 0 <= self.held_out < 1:
            raise InvalidSettings(f"train task: 'held_out' must be in [0, 1), got {self.held_out}")


def trainable_networks() -> list[str]:
    """The bundled networks and torchvision's detectors, but for those whose truth COCO's instances do not hold."""
    return [*BUNDLED, *(n for n in models.list_models(detection) if not n.startswith("keypoint"))]


def train_task(settings: TrainTaskSettings, *, progress_bar: bool = True) -> Path:
    """Train as `settings` say and write a bundle. Returns its folder, `out/bundle`.

    Raises, before the first step: InvalidSettings, InvalidInput and InvalidImage (annotations, pictures: which file,
    which field), InvalidBundle (weights of another architecture: what differs), Unavailable (no room for checkpoints,
    no download). Later: NumericalError on a loss that is not finite, naming the images and the checkpoint.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint = settings.out / CHECKPOINT
    if checkpoint.exists() and not settings.resume:
        raise InvalidSettings(f"{checkpoint} is there from an earlier run: resume it, or choose another 'out'")
    if settings.resume and not checkpoint.exists():
        raise InvalidSettings(f"train task: 'resume' is set, but there is no {checkpoint}")
    examples, held_out = split_examples(settings)
    torch.manual_seed(settings.training.seed)
    model = starting_network(settings.network, settings.start_from)
    if _has_masks(model) and not any(s is not None for e in examples for s in e.segments):
        raise InvalidInput(f"{settings.annotations}: no object has a 'segmentation', and {settings.network} needs some")
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "settings.toml").write_text(to_toml(settings))

    def evaluate(task: TaskModel) -> dict[str, Any]:
        return evaluate_task(task, settings.images, settings.annotations, [e.image_id for e in held_out])

    run = fit(
        model,
        examples,
        settings.out,
        settings.training,
        evaluate=evaluate if held_out else None,
        progress_bar=progress_bar,
    )
    trained = run.averaged()
    task = TorchvisionDetector(trained, settings.network, device=settings.training.device)
    measured = _finite(evaluate(task)) if held_out else {}
    provenance = {
        "data": {"annotations": settings.annotations.name, "trained_on": len(examples), "held_out": len(held_out)},
        "started_from": _told(settings),
        "steps": run.step,
        "hours": round(run.elapsed / 3600, 3),
        "training": asdict(settings.training),
        "hardware": hardware(settings.training.device, 1),
        "torch": torch.__version__,
        "commit": commit(),
    }
    return export_task(
        trained,
        settings.out / "bundle",
        name=settings.name or settings.network,
        architecture=settings.network,
        provenance=provenance,
        measured=measured,
    )


def split_examples(settings: TrainTaskSettings) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out. Every picture's header is read. Raises InvalidInput, InvalidImage."""
    examples = load_coco(settings.images, settings.annotations)
    for example in examples:
        example.check()
    held = tuning_ids()
    if not held <= {e.image_id for e in examples}:
        order = np.random.default_rng(settings.training.seed).permutation(len(examples))
        held = frozenset(examples[i].image_id for i in order[: round(settings.held_out * len(examples))])
    if settings.held_out == 0:
        held = frozenset()
    trained = [e for e in examples if e.image_id not in held]
    # a picture of nothing but a crowd teaches nothing; one without any object teaches the background
    useful = [e for e in trained if len(e.boxes) or not len(e.ignore)]
    if settings.training.only.startswith("roi_heads.mask"):
        useful = [e for e in useful if any(segment is not None for segment in e.segments)]
    if not any(len(e.boxes) for e in useful):
        raise InvalidInput(f"{settings.annotations}: none of the {len(trained)} images to train on has an object")
    return useful, [e for e in examples if e.image_id in held]


def starting_network(network: str, start_from: str | None) -> nn.Module:
    """The network with the weights to start from. See `TrainTaskSettings`. Raises InvalidBundle, Unavailable."""
    if network in BUNDLED:
        return _bundled_network(network, start_from)
    model: nn.Module = torchvision_network(network, published=start_from is None)
    if start_from not in (None, "random"):
        file = _weights_file(str(start_from))
        load_strictly(model, read_state(file), file)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 1e-5  # some published weights come with 0, which a state dict does not tell
    return model


def _bundled_network(network: str, start_from: str | None) -> BundledRCNN:
    masks = network == BUNDLED[1]
    model = BundledRCNN(masks=masks)
    if start_from == "random":
        return model
    file = _weights_file(start_from or network)
    state = read_state(file)
    if any(key.startswith("classifier.") for key in state):
        start_from_imagenet(model, file)
    elif masks and not any(key.startswith("roi_heads.mask") for key in state):
        start_from_boxes(model, state, file)
    else:
        load_strictly(model, state, file)
    return model


def _weights_file(reference: str) -> Path:
    folder = WEIGHTS / reference if reference in BUNDLED else Path(reference)
    if (folder / MANIFEST).is_file():
        return folder / WEIGHTS_FILE
    if not folder.is_file():
        raise InvalidSettings(f"train task: 'start_from' is {reference!r}, expected a bundle or a file of weights")
    return folder


def _has_masks(model: Any) -> bool:
    return getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None


def _told(settings: TrainTaskSettings) -> str:
    if settings.start_from is None:
        return f"{settings.network} as it ships"
    return Path(settings.start_from).name


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON may hold them: None where there is no number, four decimals."""
    told: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            told[key] = _finite(value)
        elif isinstance(value, float):
            told[key] = round(value, 4) if math.isfinite(value) else None
        else:
            told[key] = value
    return told
