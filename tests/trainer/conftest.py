"""What the trainer's tests share: a few photographs as a training set, and a network to train through."""

import json
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2

from shared.codec.transforms import Architecture

TINY = Architecture(c4=16, c8=16, c16=16, m=16, z=8, h=8)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
BOXES = {"astronaut": [60.0, 0.0, 160.0, 256.0], "coffee": [60.0, 20.0, 150.0, 130.0]}


@pytest.fixture(scope="session")
def photograph_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs at half size in COCO's format: `images/` and `annotations.json`."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number, name in enumerate(PHOTOGRAPHS, start=1):
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        picture.save(folder / "images" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "width": picture.width, "height": picture.height})
        if name in BOXES:
            x, y, w, h = BOXES[name]
            annotation = {"id": number, "image_id": number, "category_id": 1, "bbox": BOXES[name], "iscrowd": 0}
            annotations.append({**annotation, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def imagenet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV2 with random weights: what matters here is that gradients pass."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.safetensors"
    save_file({k: v.contiguous() for k, v in mobilenet_v2(weights=None).state_dict().items()}, path)
    return path
