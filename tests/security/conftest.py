"""Both sides at once: the fixtures of the edge's and the cloud's own tests, and a second bundle."""

from pathlib import Path

import numpy as np
import pytest

from shared.codec.bundle import save_bundle
from shared.codec.codec import Codec
from tests.cloud.conftest import spot, start_cloud
from tests.edge.conftest import running_edge, small_jpeg, small_rgb

__all__ = ["running_edge", "small_jpeg", "small_rgb", "spot", "start_cloud"]


@pytest.fixture(scope="session")
def bundle_b(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled codec with gains that differ a little: another model id, streams that A cannot be asked to decode."""
    folder = tmp_path_factory.mktemp("b") / "detection-b"
    arrays = {name: np.array(array) for name, array in codec.bundle.arrays.items()}
    [gain] = [name for name in arrays if name == "gain.log"]
    arrays[gain] = arrays[gain] * np.float32(1.01)
    save_bundle(
        folder,
        name="detection-b",
        architecture=codec.bundle.architecture,
        skip_below=codec.bundle.skip_below,
        arrays=arrays,
        info=codec.bundle.info,
    )
    return folder
