"""Fixtures of the cloud's tests: a running cloud, and coded pictures made once."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.broker import Broker
from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import state_hash
from shared.codec.bundle import save_bundle
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from tests.cloud.harness import BrightSpot, RunningCloud, red_frame, settings, spot_frame

StartCloud = Callable[..., Awaitable[RunningCloud]]


@pytest.fixture(scope="session")
def spot(codec: Codec) -> Bitstream:
    """A dark 64x64 picture with a bright square at (16, 16), 32 wide."""
    return codec.encode(spot_frame(), 8)


@pytest.fixture(scope="session")
def red(codec: Codec) -> Bitstream:
    """A picture on which the task model fails."""
    return codec.encode(red_frame(), 8)


@pytest.fixture
async def start_cloud(codec: Codec, tmp_path: Path) -> AsyncIterator[StartCloud]:
    """Starts a cloud; keywords are settings. Called again it starts another one on the same folder."""
    running: list[RunningCloud] = []

    async def start(**changes: Any) -> RunningCloud:
        cloud = RunningCloud(settings(tmp_path, **changes), [codec], BrightSpot())
        running.append(cloud)
        return await cloud.start()

    yield start
    for cloud in running:
        await cloud.stop()


@pytest.fixture
async def cloud(start_cloud: StartCloud) -> RunningCloud:
    return await start_cloud()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codec) -> dict[str, str]:
    """A codec and a task network as folders; the network is the bundled architecture with random weights."""
    folder = tmp_path_factory.mktemp("models")
    bundle = codec.bundle
    save_bundle(
        folder / "codec",
        name=bundle.name,
        architecture=bundle.architecture,
        skip_below=bundle.skip_below,
        arrays=bundle.arrays,
        info=bundle.info,
    )
    torch.manual_seed(1)
    network = BundledRCNN()
    (folder / "task").mkdir()
    save_file(network.state_dict(), folder / "task" / "weights.safetensors")
    manifest = {"architecture": "faster-rcnn-mobilenetv2-fpn", "model_id": state_hash(network)}
    (folder / "task" / "manifest.json").write_text(json.dumps(manifest))
    return {"models": str(folder / "codec"), "tasks": str(folder / "task")}


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One NATS server that tests share, each with a log of its own name."""
    with Broker(tmp_path_factory.mktemp("nats")) as broker:
        yield broker
