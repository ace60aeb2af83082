"""What many tests share: photographs, the bundled codec, and where larger data may lie."""

import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from shared.codec.codec import Codec
from shared.codec.types import Frame

ROOT = Path(__file__).resolve().parent.parent
SLOW_S = 3600  # longest that a test marked slow may take; the others have pyproject.toml's limit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One where test files run beside each other, or they would wait for each other's threads at every layer."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """The folder with `coco/`, `kodak/` and `video/`, or None: set SIGHTLINE_DATA, or keep it in ../shared/data."""
    folder = Path(os.environ.get("SIGHTLINE_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def photographs() -> dict[str, Frame]:
    """scikit-image's photographs with objects in them, uint8 RGB."""
    return {
        "astronaut": Frame(skimage.data.astronaut()),
        "coffee": Frame(skimage.data.coffee()),
        "chelsea": Frame(skimage.data.chelsea()),
    }


@pytest.fixture(scope="session")
def astronaut(photographs: dict[str, Frame]) -> Frame:
    return photographs["astronaut"]


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The bundled detection codec."""
    return Codec.load("detection")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(8)
