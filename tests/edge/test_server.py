"""The edge as a process of its own: it tells its ports, drains on SIGTERM, and loses nothing to SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sightline.v1 import edge_pb2, edge_pb2_grpc

from edge.server import Edge
from edge.settings import EdgeSettings
from shared.errors import InvalidSettings, Unavailable, UnknownModel

PROGRAM = "import asyncio\nfrom edge.server import serve\nfrom edge.settings import EdgeSettings\n"
SERVE = PROGRAM + "asyncio.run(serve(EdgeSettings.load()))"
SPOOLED = edge_pb2.CompressOptions(delivery=edge_pb2.DELIVERY_SPOOLED)


class Process:
    """A running edge and what it announced."""

    def __init__(self, folder: Path, **flags: object) -> None:
        self.ready_file = folder / "ready"
        self.ready_file.unlink(missing_ok=True)
        settings = {
            "listen": "127.0.0.1:0",
            "metrics_listen": "",
            "data_dir": folder / "edge",
            "ready_file": self.ready_file,
            "log_format": "json",
            **flags,
        }
        environment = {f"SIGHTLINE_EDGE_{name.upper()}": str(value) for name, value in settings.items()}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.ready = json.loads(self.popen.stdout.readline() or "{}")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.ready.get('port')}")
        self.stub = edge_pb2_grpc.EdgeServiceStub(self.channel)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, list[dict[str, object]]]:
        """Exit code and log lines."""
        self.popen.send_signal(number)
        _, err = self.popen.communicate(timeout=60)
        return self.popen.returncode, [json.loads(line) for line in err.splitlines() if line.startswith("{")]


@contextmanager
def process(folder: Path, **flags: object) -> Iterator[Process]:
    edge = Process(folder, **flags)
    try:
        yield edge
    finally:
        edge.channel.close()
        if edge.popen.poll() is None:
            edge.popen.kill()
        edge.popen.communicate()


def test_it_tells_its_ports_serves_and_exits_0_on_sigterm(tmp_path: Path, small_jpeg: bytes) -> None:
    with process(tmp_path) as edge:
        assert json.loads(edge.ready_file.read_text()) == edge.ready
        assert edge.ready["ready"] is True
        health = health_pb2_grpc.HealthStub(edge.channel)
        asked = health_pb2.HealthCheckRequest(service="sightline.v1.EdgeService")
        assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        receipts: list[edge_pb2.Receipt] = []
        ends: list[grpc.StatusCode] = []

        def camera() -> None:
            request = edge_pb2.CompressRequest(encoded=small_jpeg, options=SPOOLED)
            while True:
                try:
                    receipts.append(edge.stub.Compress(request, timeout=30).receipt)
                except grpc.RpcError as error:
                    ends.append(error.code())
                    return

        thread = threading.Thread(target=camera)
        thread.start()
        while len(receipts) < 3:
            time.sleep(0.01)
        code, log = edge.end()
        thread.join(30)
    assert code == 0
    assert ends == [grpc.StatusCode.UNAVAILABLE]
    assert [line["message"] for line in log][-2:] == ["stopping on SIGTERM", "stopped"]
    seqs = [receipt.frame.seq for receipt in receipts]
    assert seqs == list(range(1, len(seqs) + 1))


def test_receipted_frames_survive_sigkill_of_the_edge(tmp_path: Path, small_jpeg: bytes) -> None:
    names = []
    request = edge_pb2.CompressRequest(camera_id="door", encoded=small_jpeg, options=SPOOLED, idempotency_token="one")
    for life in range(2):
        with process(tmp_path) as edge:
            for _ in range(3):
                request.idempotency_token = f"{life} {len(names)}"
                names.append(edge.stub.Compress(request, timeout=60).receipt.frame)
            assert edge.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with process(tmp_path) as edge:
        retried = edge.stub.Compress(request, timeout=60).receipt
        assert retried.duplicate
        assert retried.frame == names[-1]
        assert edge.end()[0] == 0
    assert len({name.epoch for name in names}) == 2
    import sqlite3

    db = sqlite3.connect(tmp_path / "edge" / "spool.sqlite")
    kept = db.execute("SELECT camera_id, epoch, seq FROM frame ORDER BY id").fetchall()
    db.close()
    assert [(camera, epoch % (1 << 64), seq) for camera, epoch, seq in kept] == [
        (name.camera_id, name.epoch, name.seq) for name in names
    ]


def test_with_a_budget_quality_falls_while_the_cloud_is_away_for_frames_that_leave_it_open(
    tmp_path: Path, small_jpeg: bytes
) -> None:
    with process(tmp_path, cloud="127.0.0.1:1", uplink_budget_bps=20_000) as edge:
        request = edge_pb2.CompressRequest(camera_id="door", encoded=small_jpeg, options=SPOOLED)
        open_ones = [edge.stub.Compress(request, timeout=60).receipt.quality for _ in range(40)]
        request.options.quality = 7
        assert edge.stub.Compress(request, timeout=60).receipt.quality == 7
        request.options.ClearField("rate")
        request.options.delivery = edge_pb2.DELIVERY_NONE
        assert edge.stub.Compress(request, timeout=60).receipt.quality == 4  # the setting's: nothing is sent
        assert edge.end()[0] == 0
    assert open_ones[0] == 8
    assert open_ones[-1] == 1


def test_it_starts_lean() -> None:
    code = (
        "import edge.server, sys\n"
        "heavy = {'compressai', 'torchvision', 'lightning', 'matplotlib', 'cloud', 'trainer'} & set(sys.modules)\n"
        "print(sorted(heavy), int(open('/proc/self/statm').read().split()[1]) * 4 // 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy, resident_mib = out.rsplit(" ", 1)
    assert heavy == "[]"
    assert int(resident_mib) < 700


@pytest.mark.parametrize(
    ("flags", "error", "sentence"),
    [
        ({"models": ["no-such-model"]}, UnknownModel, "no-such-model"),
        ({"models": ["detection", "detection"]}, InvalidSettings, "two bundles are named 'detection'"),
        ({"cloud": "10.1.2.3:1"}, InvalidSettings, "setting cloud: plaintext to 10.1.2.3:1"),
        ({"cloud": "nowhere"}, InvalidSettings, "setting cloud must be host:port"),
        ({"listen": "0.0.0.0:0"}, InvalidSettings, "would be open to the network"),
    ],
)
async def test_what_cannot_work_is_told_at_start_and_leaves_nothing_running(
    tmp_path: Path, flags: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        await Edge.start(EdgeSettings.load(**{"listen": "127.0.0.1:0", "data_dir": tmp_path / "edge", **flags}))
    assert not {"spool-writer", "transform_0"} & {thread.name for thread in threading.enumerate()}


def test_a_second_edge_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert first.ready
        with process(tmp_path) as second:
            assert second.ready == {}
            _, err = second.popen.communicate(timeout=30)
            assert f"{Unavailable.__name__}: spool" in err
            assert "in use by another process" in err


def test_every_setting_says_what_it_is() -> None:
    for name, field in EdgeSettings.model_fields.items():
        assert field.description, name
