"""Both backends of the detection log, for tests that hold of either."""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from bench.broker import Broker
from cloud.detections.broker import BrokerOptions
from cloud.detections.jetstream import JetStreamLog
from cloud.detections.log import DetectionLog, Retention
from cloud.detections.sqlite import SqliteLog

Opener = Callable[..., Awaitable[DetectionLog]]
KEEP_ALL = Retention(max_age_s=3600, max_bytes=1 << 26, key_age_s=7200)


def options(broker: Broker, name: str, replicas: int = 1) -> BrokerOptions:
    """How to reach a log of that name."""
    return BrokerOptions(tuple(broker.servers.split(",")), name=name, replicas=replicas)


CLUSTER = pytest.param("cluster", marks=pytest.mark.slow(reason="elections of three brokers take seconds each"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Three nodes, which keep three copies."""
    with Broker(tmp_path_factory.mktemp("cluster"), nodes=3) as broker:
        yield broker


@pytest.fixture(params=["sqlite", "jetstream", CLUSTER])
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens the log kept in one place; called again after close it opens the same log, with `name` another."""
    opened: list[DetectionLog] = []
    unique = secrets.token_hex(4)

    async def open_log(retention: Retention = KEEP_ALL, name: str = "log") -> DetectionLog:
        log: DetectionLog
        if request.param == "sqlite":
            log = await SqliteLog.open(tmp_path / f"{name}.sqlite", retention)
        else:
            replicas, fixture = (1, "broker") if request.param == "jetstream" else (3, "cluster")
            broker = request.getfixturevalue(fixture)
            log = await JetStreamLog.open(options(broker, f"{name}-{unique}", replicas), retention)
        opened.append(log)
        return log

    yield open_log
    for log in opened:
        await log.close()
