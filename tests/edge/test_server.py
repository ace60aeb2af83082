"""The edge as a process of its own: it tells its ports, drains on SIGTERM, and loses nothing to SIGKILL."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sightline.v1 import edge_pb2, edge_pb2_grpc

from edge.server import Edge
from edge.settings import EdgeSettings
from shared.codec.bundle import WEIGHTS
from shared.errors import InvalidSettings, UnknownModel
from tests.edge.conftest import RunningEdge

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
    """Beside torch, whose own part differs from build to build (CUDA's or the CPU's) and from machine to machine."""
    code = (
        "import sys, torch\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4 // 1024\n"
        "torch_mib = resident()\n"
        "import edge.server\n"
        "heavy = {'compressai', 'torchvision', 'lightning', 'matplotlib', 'cloud', 'trainer'} & set(sys.modules)\n"
        "assert torch.version.cuda or resident() < 700\n"
        "print(sorted(heavy), resident() - torch_mib)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy, added_mib = out.rsplit(" ", 1)
    assert heavy == "[]"
    assert int(added_mib) < 150


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


async def test_one_model_under_two_names_is_refused(tmp_path: Path) -> None:
    twin = Path(shutil.copytree(WEIGHTS / "detection", tmp_path / "twin")) / "manifest.json"
    twin.write_text(twin.read_text().replace('"name": "detection"', '"name": "twin"'))
    models = ["detection", str(twin.parent)]
    with pytest.raises(InvalidSettings, match="'detection' and 'twin' are one model"):
        await Edge.start(EdgeSettings.load(listen="127.0.0.1:0", data_dir=tmp_path / "edge", models=models))


async def test_an_edge_waits_for_a_spool_that_another_still_holds_and_then_takes_over(
    tmp_path: Path, running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    second = None
    async with running_edge() as (_, stub):
        port = free_port()
        flags = {"listen": f"127.0.0.1:{port}", "metrics_listen": "127.0.0.1:0", "data_dir": tmp_path / "edge"}
        second = asyncio.create_task(Edge.start(EdgeSettings.load(**flags)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = edge_pb2.CompressRequest(encoded=small_jpeg, options=SPOOLED)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await edge_pb2_grpc.EdgeServiceStub(channel).Compress(request, wait_for_ready=True, timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "still starting" in str(refused.value.details())
        assert not second.done()
        await stub.Compress(request)  # the first goes on meanwhile
    edge = await asyncio.wait_for(second, 60)
    try:
        assert edge.server.readiness.ready
        assert edge.spool is not None
        assert edge.spool.stats.frames == 1
    finally:
        await edge.close()


def test_an_edge_without_its_disk_lives_says_so_begins_when_it_comes_and_stops_when_told(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.write_text("no folder, as a disk that is not there")
    metrics_port = free_port()
    environment = {
        "SIGHTLINE_EDGE_LISTEN": "127.0.0.1:0",
        "SIGHTLINE_EDGE_METRICS_LISTEN": f"127.0.0.1:{metrics_port}",
        "SIGHTLINE_EDGE_DATA_DIR": str(mount / "edge"),
        "SIGHTLINE_EDGE_LOG_FORMAT": "json",
    }
    for disk_comes in (False, True):
        popen = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert popen.stdout is not None
            assert popen.stderr is not None
            waiting = next(line for line in map(json.loads, popen.stderr) if line["message"] == "waiting for the spool")
            assert "cannot be opened" in waiting["error"]
            assert page(metrics_port, "/healthz") == (200, "ok\n")
            code, said = page(metrics_port, "/readyz")
            assert code == 503
            assert said.startswith("spool: spool ")
            if disk_comes:
                mount.unlink()
                mount.mkdir()
                assert json.loads(popen.stdout.readline())["ready"]
                assert page(metrics_port, "/readyz") == (200, "ok\n")
            popen.terminate()
            popen.communicate(timeout=60)
            assert popen.returncode == 0
        finally:
            popen.kill()
            popen.communicate()


def page(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_every_setting_says_what_it_is() -> None:
    for name, field in EdgeSettings.model_fields.items():
        assert field.description, name
