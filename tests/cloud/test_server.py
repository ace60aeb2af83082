"""The cloud as a process: it tells its ports, drains on SIGTERM and, killed, keeps what it acknowledged."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sightline.v1 import common_pb2, detection_pb2, ingest_pb2

from cloud.detections.log import Retention
from cloud.detections.sqlite import SqliteLog
from cloud.settings import CloudSettings
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings
from tests.cloud.harness import Edge

PROGRAM = """
import asyncio
from cloud.server import serve
from cloud.settings import CloudSettings
asyncio.run(serve(CloudSettings.load()))
"""
P = ingest_pb2.ACK_STATE_PERSISTED


class Process:
    def __init__(self, popen: "subprocess.Popen[str]", ready: str) -> None:
        self.popen = popen
        self.ready = json.loads(ready)
        self.channel_target = f"127.0.0.1:{self.ready['port']}"

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ready['metrics_port']}{path}", timeout=30) as page:
            return page.read().decode()


@asynccontextmanager
async def running(folder: Path, models: dict[str, str]) -> AsyncIterator[Process]:
    values = {
        **models,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "data_dir": str(folder / "data"),
        "ready_file": str(folder / "ready.json"),
        "threads": "1",
        "unpack_threads": "1",
        "min_score": "0",
        "drain_s": "60",
        "stream_grace_s": "30",
    }
    environment = {**os.environ, **{f"SIGHTLINE_CLOUD_{name.upper()}": value for name, value in values.items()}}
    popen = start(environment)
    try:
        assert popen.stdout is not None
        yield Process(popen, await asyncio.to_thread(popen.stdout.readline))
    finally:
        popen.kill()
        popen.communicate()


def start(environment: dict[str, str], stderr: int | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


async def logged(folder: Path) -> list[detection_pb2.DetectionEvent]:
    """All of the log that a process left behind."""
    log = await SqliteLog.open(folder / "data" / "detections.sqlite", Retention(1e6, 1 << 30, 1e6))
    records = await log.read(0, 1_000_000)
    await log.close()
    return [detection_pb2.DetectionEvent.FromString(record.event) for record in records]


METRICS = (
    "sightline_cloud_batch_size_bucket",
    "sightline_cloud_queue_seconds_bucket",
    'sightline_cloud_decode_seconds_bucket{le="0.0005",stage="unpack"}',
    'sightline_cloud_decode_seconds_bucket{le="0.0005",stage="synthesise"}',
    'sightline_cloud_task_seconds_bucket{le="0.0005",task=',
    'sightline_cloud_events_total{outcome="detections"} 1.0',
    "sightline_cloud_subscriber_lag_events",
    "sightline_cloud_capture_to_detection_seconds_bucket",
    'sightline_cloud_model_info{kind="codec",model_id=',
    "sightline_build_info",
    'grpc_server_handled_total{grpc_code="OK",grpc_method="Check",',
)


async def test_the_process_serves_and_on_sigterm_answers_what_it_holds_and_exits_0(
    tmp_path: Path, models: dict[str, str], spot: Bitstream
) -> None:
    async with running(tmp_path, models) as process:
        assert json.loads((tmp_path / "ready.json").read_text()) == process.ready
        assert process.ready["models"] == [spot.model_id]
        assert await asyncio.to_thread(process.page, "/readyz") == "ok\n"
        async with grpc.aio.insecure_channel(process.channel_target) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="sightline.v1.IngestService")
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            edge = Edge(channel, spot.model_id, "edge")
            await edge.open()
            assert (await edge.deliver("gate", 0, spot)).outcome == common_pb2.OUTCOME_DETECTIONS
            metrics = await asyncio.to_thread(process.page, "/metrics")
            assert [name for name in METRICS if name not in metrics] == []
            for seq in range(1, 6):
                await edge.send("gate", seq, spot)
            await edge.until(lambda: len({ack.seq for ack in edge.acks}) == 6)  # all are RECEIVED
            process.popen.send_signal(signal.SIGTERM)
            await edge.until(lambda: edge.drains)
            await edge.call.done_writing()
            await edge.reading
            assert await edge.call.code() == grpc.StatusCode.OK
            assert [edge.final("gate", seq)[0].state for seq in range(6)] == [P] * 6
        assert await asyncio.to_thread(process.popen.wait, 60) == 0
    assert sorted(event.frame.seq for event in await logged(tmp_path)) == list(range(6))  # order is arrival


async def test_killed_the_cloud_keeps_what_it_acknowledged_and_makes_no_event_twice(
    tmp_path: Path, models: dict[str, str], spot: Bitstream
) -> None:
    frames = 40
    answered: set[int] = set()
    for kill_after in (5, frames):
        waiting = [seq for seq in range(frames) if seq not in answered]
        async with running(tmp_path, models) as process, grpc.aio.insecure_channel(process.channel_target) as channel:
            edge = Edge(channel, spot.model_id, "edge")
            await edge.open()
            for seq in waiting:
                await edge.send("gate", seq, spot)
            await edge.until(lambda: len(persisted(edge)) >= min(kill_after, len(waiting)))  # noqa: B023
            process.popen.kill()
            await asyncio.gather(edge.reading, return_exceptions=True)
            answered |= persisted(edge)
    assert answered == set(range(frames))
    events = await logged(tmp_path)
    assert sorted(event.frame.seq for event in events) == list(range(frames))
    assert {event.outcome for event in events} == {common_pb2.OUTCOME_DETECTIONS}


def persisted(edge: Edge) -> set[int]:
    return {ack.seq for ack in edge.acks if ack.state == P}


def test_settings_that_do_not_fit_together_are_refused_by_name() -> None:
    with pytest.raises(InvalidSettings, match="names outlive their events"):
        CloudSettings.load(log_max_age_s=1000, key_age_s=10)
    with pytest.raises(InvalidSettings, match="max_message_bytes"):
        CloudSettings.load(max_frame_bytes=40 << 20)
    with pytest.raises(InvalidSettings, match="device"):
        CloudSettings.load(device="tpu")


def test_every_setting_says_what_it_is_and_lists_are_separated_by_commas() -> None:
    assert all(field.description for field in CloudSettings.model_fields.values())
    settings = CloudSettings.load(models="detection, /some/folder", tasks="a", extra_tasks="b,a")
    assert settings.model_references == ["detection", "/some/folder"]
    assert settings.all_task_names == ["a", "b"]
