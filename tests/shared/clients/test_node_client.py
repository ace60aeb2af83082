"""The .proto files are enough for another language: Node.js compresses a picture and receives its detections."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.cloud.conftest import StartCloud
from tests.cloud.harness import spot_frame
from tests.edge.conftest import RunningEdge

HERE = Path(__file__).parent / "node"
PROTO = Path(__file__).parents[3] / "proto"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """grpc-js and proto-loader from npm, kept between runs in a folder named by what package.json asks for."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs Node.js and npm")
    wanted = (HERE / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sightline" / f"node-{hashlib.sha256(wanted).hexdigest()[:16]}"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_bytes(wanted)
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        if installed.returncode:
            pytest.skip(f"npm could not install grpc-js: {installed.stderr.strip()[-300:]}")
        (folder / "complete").touch()
    return folder / "node_modules"


async def test_node_compresses_a_picture_and_receives_its_detections(
    node_modules: Path, start_cloud: StartCloud, running_edge: RunningEdge, tmp_path: Path
) -> None:
    picture = tmp_path / "spot.png"
    Image.fromarray(spot_frame().rgb).save(picture)
    cloud = await start_cloud()
    cloud_address = f"127.0.0.1:{cloud.server.port}"
    async with running_edge(cloud=cloud_address) as (edge, _):
        process = await asyncio.create_subprocess_exec(
            *(
                "node",
                str(HERE / "client.js"),
                str(PROTO),
                f"127.0.0.1:{edge.server.port}",
                cloud_address,
                str(picture),
            ),
            env=os.environ | {"NODE_PATH": str(node_modules)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(120):
            out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    told = json.loads(out)
    assert told["state"] == "RECEIPT_STATE_SPOOLED"
    assert told["outcome"] == "OUTCOME_DETECTIONS"
    assert (told["frame"]["camera_id"], told["frame"]["seq"]) == ("node", "1")
    [kite] = told["found"]
    assert (kite["label"], kite["score"]) == ("kite", 0.75)
    assert kite["box"]["x_min"] == pytest.approx(16, abs=3)
