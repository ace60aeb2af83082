"""Fixtures of the cloud's tests: a running cloud, and coded pictures made once."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

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
