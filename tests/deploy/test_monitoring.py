"""Scrape configuration, rules and dashboards against the real Prometheus, which scrapes the real services.

Rules are run as they are shipped; where a test waits for an alert live, minutes are read as seconds.
"""

import asyncio
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sightline.v1 import detection_pb2, detection_pb2_grpc, edge_pb2, edge_pb2_grpc, ingest_pb2

from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from tests.cloud.harness import Edge, spot_frame
from tests.test_end_to_end import Process, jpeg, request

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
ALERTS = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DATA_S = 90
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool (Debian: apt-get install prometheus)",
)


def promtool(*arguments: object) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_promtool_finds_no_fault_in_configuration_and_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", PROMETHEUS / "rules" / "alerts.yml")


@needs_prometheus
def test_every_alert_fires_when_its_condition_holds_long_enough_and_clears_when_it_is_gone() -> None:
    path = ROOT / "tests" / "deploy" / "alerts_test.yml"
    promtool("test", "rules", path)
    tested = {
        case["name"]: [bool(check["exp_samples"]) for check in case["promql_expr_test"]]
        for case in yaml.safe_load(path.read_text())["tests"]
    }
    assert tested.keys() == {rule["alert"] for rule in ALERTS}
    assert set(map(tuple, tested.values())) == {(False, True, False)}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_so_and_has_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (\w+)$", (ROOT / page).read_text(), re.M)
    assert anchor in {heading.lower() for heading in headings}


@pytest.fixture(scope="module")
def dashboards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", DASHBOARDS.parent / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_dashboards_are_what_their_tables_make(dashboards: ModuleType, tmp_path: Path) -> None:
    dashboards.write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in DASHBOARDS.glob("*.json")}
    assert made.keys() == {"fleet.json", "edge.json", "cloud.json"}


def expressions() -> list[str]:
    """What every panel of every dashboard asks, with Grafana's variables as it fills them in."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            found += [target["expr"] for target in panel.get("targets", ())]
    assert len(found) > 60
    [adapter] = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]
    asked = adapter["metricsQuery"].replace("<<.GroupBy>>", "instance")
    found.append(asked.replace("<<.LabelMatchers>>", 'instance=~".*"'))  # the autoscaler's
    return [text.replace("$instance", ".*").replace("$__rate_interval", "10s") for text in dict.fromkeys(found)]


class Prometheus:
    """The real server over a copy of the shipped configuration: targets and interval are the test's, rules are not,
    except that with `seconds_for_minutes` their minutes pass as seconds."""

    def __init__(self, folder: Path, targets: dict[str, int], *, seconds_for_minutes: bool) -> None:
        shutil.copytree(PROMETHEUS, folder / "config")
        for name, port in targets.items():
            (folder / "config" / "targets" / f"{name}.yml").write_text(f"- targets: ['127.0.0.1:{port}']\n")
        config = folder / "config" / "prometheus.yml"
        config.write_text(config.read_text().replace("15s", "1s"))
        if seconds_for_minutes:
            for path in (folder / "config" / "rules").iterdir():
                path.write_text(re.sub(r"(\[|for: )(\d+)m\b", r"\1\2s", path.read_text()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, expression: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{query}", timeout=30) as answer:
            return json.load(answer)["data"]["result"]

    def has_data(self, expression: str) -> bool:
        """A number, that is; NaN is what an empty histogram gives."""
        try:
            return any(sample["value"][1] != "NaN" for sample in self.ask(expression))
        except (urllib.error.URLError, ConnectionError):  # it has just begun
            return False

    def firing(self) -> set[str]:
        return {sample["metric"]["alertname"] for sample in self.ask('ALERTS{alertstate="firing"}')}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], object]) -> None:
    """Prometheus tells nobody when it has scraped; it must be asked."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


class Traffic:
    """A camera that sends all the time, a consumer that reads, somebody who asks for the services' health, and an edge
    that sends frames which no cloud can use. Every other picture is too large for the edge."""

    def __init__(self, edge: Process, cloud: Process, coded: Bitstream) -> None:
        self.edge, self.cloud, self.coded = edge, cloud, coded
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(60)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:
            self.error = error

    async def _send(self) -> None:
        small, large = jpeg(spot_frame()), jpeg(spot_frame(side=256))
        async with (
            grpc.aio.insecure_channel(self.edge.address) as edge,
            grpc.aio.insecure_channel(self.cloud.address) as cloud,
        ):
            camera = edge_pb2_grpc.EdgeServiceStub(edge)
            ask = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
            consumer = detection_pb2_grpc.DetectionServiceStub(cloud).Subscribe(ask)
            reading = asyncio.create_task(read_all(consumer))
            broken = Edge(cloud, self.coded.model_id, "broken-edge")
            await broken.open()
            await broken.call.write(
                ingest_pb2.UploadRequest(model=ingest_pb2.ModelAnnouncement(index=1, model_id="0" * 64))
            )
            seq = 0
            while not self.stop.is_set():
                seq += 1
                await camera.Compress(request("door", small, edge_pb2.DELIVERY_SPOOLED), timeout=60)
                with pytest.raises(grpc.aio.AioRpcError, match="pixels"):
                    await camera.Compress(request("door", large, edge_pb2.DELIVERY_SPOOLED), timeout=60)
                await broken.send("roof", 2 * seq, self.coded, payload_crc=1)
                await broken.send("roof", 2 * seq + 1, self.coded, model_index=1)
                for channel in (edge, cloud):
                    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                await asyncio.sleep(0.2)
            broken.call.cancel()
            consumer.cancel()
            await asyncio.gather(reading, broken.reading, return_exceptions=True)


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    folder = tmp_path_factory.mktemp("fleet")
    cloud = Process("cloud", folder)
    cloud.start()
    edge = Process("edge", folder, "--cloud", cloud.address, "--max-pixels", "10000", "--uplink-backoff-max-s", "1")
    edge.start()
    yield edge, cloud
    for process in (edge, cloud):
        if process.process is not None and process.process.poll() is None:
            process.kill(signal.SIGTERM)


@pytest.fixture(scope="module")
def coded(codec: Codec) -> Bitstream:
    return codec.encode(spot_frame(), 8)


@needs_prometheus
def test_every_panel_has_data_while_the_services_work(
    fleet: tuple[Process, Process], coded: Bitstream, tmp_path: Path
) -> None:
    edge, cloud = fleet
    targets = {process.name: process.ready["metrics_port"] for process in fleet}
    prometheus = Prometheus(tmp_path, targets, seconds_for_minutes=True)
    try:
        with Traffic(edge, cloud, coded):
            missing = expressions()

            def all_there() -> bool:
                missing[:] = [expression for expression in missing if not prometheus.has_data(expression)]
                return not missing

            until(all_there, DATA_S, lambda: f"no data for: {missing}")
    finally:
        prometheus.stop()


@needs_prometheus
@pytest.mark.slow  # waits through the windows of alerts, and starts a service again
def test_alerts_fire_on_live_services_and_clear(
    fleet: tuple[Process, Process], coded: Bitstream, tmp_path: Path
) -> None:
    edge, cloud = fleet
    targets = {process.name: process.ready["metrics_port"] for process in fleet}
    prometheus = Prometheus(tmp_path, targets, seconds_for_minutes=True)

    def fire(*names: str) -> None:
        until(lambda: set(names) <= prometheus.firing(), DATA_S, lambda: f"{names} expected in {prometheus.firing()}")

    def clear(*names: str) -> None:
        until(lambda: not set(names) & prometheus.firing(), DATA_S, lambda: f"{names} still in {prometheus.firing()}")

    wrong_input = ("SightlineEdgeFramesRefused", "SightlineCloudFramesRejected", "SightlineCloudUnknownModel")
    gone = ("SightlineDown", "SightlineEdgeUplinkDown")
    try:
        until(lambda: prometheus.has_data("sum(up) == 2"), DATA_S, lambda: "both services are scraped")
        with Traffic(edge, cloud, coded):
            fire(*wrong_input)
            assert not set(gone) & prometheus.firing()
        clear(*wrong_input)
        fire("SightlineEdgeSilent")
        cloud.kill()
        fire(*gone)
        cloud.flags = ("--metrics-listen", f"127.0.0.1:{targets['cloud']}")
        cloud.start()
        clear(*gone)
        with Traffic(edge, cloud, coded):
            clear("SightlineEdgeSilent")
        edge.kill()
        fire("SightlineDown", "SightlineCloudNoUploads")
        edge.flags = (*edge.flags, "--metrics-listen", f"127.0.0.1:{targets['edge']}")
        edge.start()
        clear("SightlineDown", "SightlineCloudNoUploads")
    finally:
        prometheus.stop()
