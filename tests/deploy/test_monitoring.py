"""Scrape configuration, rules and dashboards against the real Prometheus, which scrapes the real services.

Rules are run as they are shipped; where a test waits for an alert live, minutes are read as seconds.
"""

import asyncio
import importlib.util
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sightline.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    detection_pb2,
    detection_pb2_grpc,
    edge_pb2,
    edge_pb2_grpc,
    ingest_pb2,
)

from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.rpc.certificates import Names
from tests.cloud.harness import Edge, spot_frame
from tests.security.conftest import bundle_b
from tests.shared.authority import EDGE, NOBODY, POLICY, Authority
from tests.test_end_to_end import Process, jpeg, request

__all__ = ["bundle_b"]

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
ALERTS = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DATA_S = 180
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
    except that their minutes pass as seconds; with `at_once`, no condition has to hold for
    longer than one, and a backlog is old after five."""

    def __init__(self, folder: Path, targets: dict[str, int], *, at_once: bool = False) -> None:
        shutil.copytree(PROMETHEUS, folder / "config")
        for name, port in targets.items():
            (folder / "config" / "targets" / f"{name}.yml").write_text(f"- targets: ['127.0.0.1:{port}']\n")
        config = folder / "config" / "prometheus.yml"
        config.write_text(config.read_text().replace("15s", "1s"))
        for path in (folder / "config" / "rules").iterdir():
            rules = re.sub(r"(\[|for: )(\d+)m\b", r"\1\2s", path.read_text())
            path.write_text(re.sub(r"for: \d+[sh]", "for: 1s", rules).replace("> 900", "> 5") if at_once else rules)
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
    cloud = Process("cloud", folder, "--admin-listen", "127.0.0.1:0", "--max-in-flight-frames", "16")
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
    prometheus = Prometheus(tmp_path, targets)
    try:
        with Traffic(edge, cloud, coded):
            missing = expressions()

            def all_there() -> bool:
                missing[:] = [expression for expression in missing if not prometheus.has_data(expression)]
                return not missing

            until(all_there, DATA_S, lambda: f"no data for: {missing}")
    finally:
        prometheus.stop()


def open_files(process: Process) -> int:
    assert process.process is not None
    return len(list(Path(f"/proc/{process.process.pid}/fd").iterdir()))


@contextmanager
def limited(process: Process, limit: int, value: int) -> Iterator[None]:
    """The kernel refuses a service what is beyond one of its limits."""
    assert process.process is not None
    before = resource.prlimit(process.process.pid, limit)
    resource.prlimit(process.process.pid, limit, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.process.pid, limit, before)


@asynccontextmanager
async def repeating(act: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """`act` goes on and on in the background, a moment between; its error is the test's."""

    async def repeat() -> None:
        while True:
            await act()
            await asyncio.sleep(0.2)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Watched:
    """What fires, asked for while the test's own event loop goes on."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus

    async def fire(self, *names: str) -> None:
        """Returns once each has been seen; some last no longer than what caused them."""
        seen: set[str] = set()

        def all_seen(firing: set[str]) -> bool:
            seen.update(firing)
            return set(names) <= seen

        await self._until(all_seen, lambda: f"{set(names) - seen} did not fire")

    async def clear(self, *names: str) -> None:
        """Returns once none of them fires."""
        await self._until(lambda firing: not set(names) & firing, lambda: f"one of {names} does not clear")

    async def _until(self, condition: Callable[[set[str]], bool], what: Callable[[], str]) -> None:
        deadline = time.monotonic() + DATA_S
        while not condition(firing := await asyncio.to_thread(self._prometheus.firing)):
            assert time.monotonic() < deadline, f"{what()}; these do: {firing}"
            await asyncio.sleep(0.5)


@needs_prometheus
@pytest.mark.slow  # a minute of causes and waits; the rules themselves are promtool's in the default run
async def test_alerts_fire_on_live_services_at_once_and_clear(
    fleet: tuple[Process, Process], coded: Bitstream, bundle_b: Path, tmp_path: Path
) -> None:
    """The causes that take seconds. A third service beside the two: an edge with certificates that end tomorrow, and
    with a bundle that the cloud does not have."""
    edge, cloud = fleet
    authority = Authority(tmp_path / "tls")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    secured = [
        part
        for name, path in (authority.server_settings() | {"policy": policy}).items()
        for part in (f"--{name.replace('_', '-')}", str(path))
    ]
    north = Process("north", tmp_path, "--cloud", cloud.address, "--models", str(bundle_b), *secured, service="edge")
    north.start()
    targets = {"cloud": cloud, "edge": edge, "edge-north": north}
    prometheus = Prometheus(
        tmp_path, {name: process.ready["metrics_port"] for name, process in targets.items()}, at_once=True
    )
    watched = Watched(prometheus)
    picture = jpeg(spot_frame())
    address = north.address.replace("127.0.0.1", "localhost")
    async with AsyncExitStack() as stack:
        stack.callback(prometheus.stop)
        stack.callback(north.kill, signal.SIGTERM)
        to_edge, to_cloud, operator = [
            await stack.enter_async_context(grpc.aio.insecure_channel(each))
            for each in (edge.address, cloud.address, f"127.0.0.1:{cloud.ready['admin_port']}")
        ]
        named, stranger = [
            await stack.enter_async_context(grpc.aio.secure_channel(address, authority.credentials(own)))
            for own in (authority.client(EDGE), authority.client(NOBODY))
        ]
        by_hand = Edge(to_cloud, coded.model_id, "by-hand")
        await by_hand.open()
        seqs = count(1)

        async def late() -> None:
            await by_hand.deliver("roof", next(seqs), coded, capture_time_unix_us=time.time_ns() // 1000 - 60_000_000)

        async def refused() -> None:
            with pytest.raises(grpc.aio.AioRpcError, match="may not"):
                await edge_pb2_grpc.EdgeServiceStub(stranger).Compress(edge_pb2.CompressRequest(), timeout=60)

        async def spooled(channel: grpc.aio.Channel, camera: str, **options: Any) -> None:
            asked = request(camera, picture, edge_pb2.DELIVERY_SPOOLED)
            asked.options.MergeFrom(edge_pb2.CompressOptions(**options))
            await edge_pb2_grpc.EdgeServiceStub(channel).Compress(asked, timeout=60)

        fast = (
            *("SightlineCertificateExpiring", "SightlineReloadFailing", "SightlineCallersRefused"),
            *("SightlineModelMismatch", "SightlineEdgeBacklogOld", "SightlineEdgeFramesLost"),
            *("SightlineOpenFilesHigh", "SightlineCloudDetectionsLate"),
        )
        await asyncio.to_thread(until, lambda: prometheus.has_data("sum(up) == 3"), DATA_S, lambda: "all are scraped")
        await spooled(named, "gate-1")
        await spooled(named, "gate-1", max_age=Duration(seconds=1))
        policy.write_text("[[grant]")
        with limited(edge, resource.RLIMIT_NOFILE, int(open_files(edge) / 0.85)):
            async with repeating(late), repeating(refused):
                await watched.fire(*fast)
        policy.write_text(POLICY)
        authority.issue("server", Names("server", dns=["localhost"], ip=["127.0.0.1"]), days=90)
        asked = admin_pb2.LoadBundleRequest(reference=str(bundle_b))
        await admin_pb2_grpc.BundleAdminServiceStub(operator).LoadBundle(asked, timeout=DATA_S)

        behind = ("SightlineCloudQueueSlow", "SightlineCloudOverloaded")

        async def stopped_for_a_while() -> None:
            """Frames wait for their batch while the process gets no time; more come than it may hold."""
            burst = [next(seqs) for _ in range(32)]
            for seq in burst:
                await by_hand.send("roof", seq, coded)

            await by_hand.until(lambda: len({ack.seq for ack in by_hand.acks} & set(burst)) >= 12)  # they are inside
            cloud.send(signal.SIGSTOP)
            try:
                await asyncio.sleep(3)  # what a queue of more than a second is made of
            finally:
                cloud.send(signal.SIGCONT)
            await by_hand.answer("roof", burst[-1])

        async with repeating(stopped_for_a_while):
            await watched.fire(*behind)

        no_disk = ("SightlineNotReady", "SightlineEdgeSpoolNotWritable", "SightlineCloudLogUnavailable")

        async def tried() -> None:
            with suppress(grpc.aio.AioRpcError):
                await spooled(to_edge, "door")

        async def sent_away() -> None:
            await by_hand.send("roof", next(seqs), coded)

        async with repeating(tried), repeating(sent_away):
            with limited(edge, resource.RLIMIT_FSIZE, 0), limited(cloud, resource.RLIMIT_FSIZE, 0):
                await watched.fire(*no_disk)
            await watched.clear(*no_disk)  # a frame that can be written shows it
        await watched.clear(*fast, *behind)
        by_hand.call.cancel()
        await asyncio.gather(by_hand.reading, return_exceptions=True)


@needs_prometheus
@pytest.mark.slow  # waits through the windows of alerts, and starts a service again
def test_alerts_fire_on_live_services_and_clear(
    fleet: tuple[Process, Process], coded: Bitstream, tmp_path: Path
) -> None:
    edge, cloud = fleet
    targets = {process.name: process.ready["metrics_port"] for process in fleet}
    prometheus = Prometheus(tmp_path, targets)

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
