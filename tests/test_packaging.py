"""What a user installs is the wheel, not the checkout: it must carry its weights and run on its own."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sysconfig.get_path("scripts")) / "uv"

ROUND_TRIP = """
import numpy as np, shared.codec.codec as codec_module
from shared.codec import bitstream
from shared.codec.codec import Codec
from shared.codec.types import Frame
import sightline.v1.edge_pb2, cli.main, edge.server

assert {checkout!r} not in codec_module.__file__, codec_module.__file__
codec = Codec.load("detection")
frame = Frame(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
data = bitstream.to_bytes(codec.encode(frame, 3.0))
back = codec.decode(bitstream.from_bytes(data, [codec.model_id]))
print(back.height, back.width)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", out, ROOT]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("sightline-*.whl"))


def test_the_wheel_holds_the_rooms_and_the_weights_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"edge", "cloud", "shared", "trainer", "bench", "cli", "sightline"}
    assert "shared/weights/detection/model.safetensors" in names
    assert "shared/weights/detection/manifest.json" in names
    assert "sightline/v1/edge_pb2.py" in names


def test_installed_in_an_empty_environment_it_makes_a_round_trip(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([UV, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    # Dependencies come from the environment of the tests: on PYTHONPATH its .pth files, and so the editable
    # checkout, do not take effect.
    env = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    code = ROUND_TRIP.format(checkout=str(ROOT))
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["48", "80"]
