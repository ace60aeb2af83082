"""The examples run as they stand, against a real edge and a real cloud."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cloud.conftest import StartCloud, red, spot, start_cloud
from tests.cloud.harness import spot_frame
from tests.edge.conftest import RunningEdge, running_edge

__all__ = ["red", "running_edge", "spot", "start_cloud"]

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
Addresses = tuple[str, str]


@pytest.fixture
async def services(start_cloud: StartCloud, running_edge: RunningEdge) -> AsyncIterator[Addresses]:
    """Addresses of an edge and the cloud it delivers to."""
    cloud = await start_cloud()
    address = f"127.0.0.1:{cloud.server.port}"
    async with running_edge(cloud=address, originals_max_bytes="8MiB") as (edge, _):
        yield f"127.0.0.1:{edge.server.port}", address


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "spot.png"
    Image.fromarray(spot_frame().rgb).save(path)
    return path


async def start(name: str, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / name), *map(str, arguments)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(name: str, *arguments: object) -> list[str]:
    """An example's lines, once it has ended well."""
    process = await start(name, *arguments)
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode().splitlines()


async def test_every_example_does_what_it_says(services: Addresses, picture: Path, tmp_path: Path) -> None:
    edge, cloud = services
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")

    sent = await run("send_pictures.py", edge, picture, broken)
    assert sent[0].startswith(f"{picture}: example/")
    assert sent[1].startswith(f"{broken}: expected a JPEG, PNG or WebP")

    own = await run("own_camera.py", edge, 2)
    assert [line.split(":")[0].split("/")[2] for line in own] == ["1", "2"]

    back = await run("there_and_back.py", edge, cloud, picture)
    assert back[0].startswith("kite 0.75 at Box(x_min=")
    assert "bytes went to the cloud" in back[1]

    following = await start("follow_detections.py", cloud, tmp_path / "place")
    assert following.stdout is not None
    async with asyncio.timeout(60):
        lines = [(await following.stdout.readline()).decode() for _ in range(4)]
    following.terminate()
    await following.communicate()
    cameras = [line.split("/")[0] for line in lines]
    assert sorted(cameras) == ["example", "own", "own", "there-and-back"]
    assert all("kite 0.75" in line for line in lines)

    tally = await run("tally.py", cloud)
    assert sorted(tally) == ["example: 1 kite", "own: 2 kite", "there-and-back: 1 kite"]

    pictures = tmp_path / "pictures"
    looked = await run("look_again.py", cloud, pictures)
    seqs = {"example": [1], "own": [1, 2], "there-and-back": [1]}
    names = [f"{camera}-{seq}-{kind}.png" for camera in seqs for seq in seqs[camera] for kind in ("finer", "seen")]
    assert sorted(looked) == [str(pictures / name) for name in names]
    seen, finer = (np.asarray(Image.open(pictures / f"example-1-{kind}.png")).astype(int) for kind in ("seen", "finer"))
    true = spot_frame().rgb
    assert np.square(finer - true).mean() < np.square(seen - true).mean()  # it was sent at quality 5


def test_every_example_is_run_and_named_in_the_quickstart() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    text = Path(__file__).read_text()
    guide = (EXAMPLES.parent / "quickstart.md").read_text()
    assert names
    for name in names:
        assert f'"{name}"' in text, name
        assert name in guide, name
