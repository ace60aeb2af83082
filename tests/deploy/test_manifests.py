"""Container files, compose file, Kubernetes manifests and systemd units: valid by their schemas, consistent with each
other and with the services' settings, and each command in them executed as it is written.

Where they are executed: in a sandbox (bubblewrap) that looks as the container or unit does, with a read-only root, an
own network, /tmp and the data folder writable and nothing else, and this environment's packages at /opt/sightline.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.broker import server_binary
from cli import certs
from cloud.settings import CloudSettings
from edge.settings import EdgeSettings
from shared.rpc.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = Path(sysconfig.get_path("scripts"))
DOCKERFILES = sorted((DEPLOY / "containers").glob("*.Dockerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if path.name not in {"kustomization.yaml", "prometheus-adapter.yaml"}
    for document in yaml.safe_load_all(path.read_text())
]
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
SETTINGS = {"edge": EdgeSettings, "cloud": CloudSettings}
READY_S = 300


def ran(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manifest(kind: str, name: str) -> dict[str, Any]:
    [found] = [each for each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def instruction(text: str, name: str) -> str:
    return re.findall(rf"^(?:    )?{name} (.*)$", text.replace("\\\n", " "), re.M)[-1].strip()


def image_environment(path: Path) -> dict[str, str]:
    return dict(part.split("=", 1) for part in instruction(path.read_text(), "ENV").split())


# -- by schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_no_fault_and_the_image_is_pinned_and_unprivileged(path: Path) -> None:
    ran(SCRIPTS / "hadolint", path)
    text = path.read_text()
    for base in re.findall(r"^FROM (\S+)", text, re.M):
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", base), f"expected a full version, got {base}"
    assert instruction(text, "USER") == "10001:10001"
    extras = re.search(r'"\.\[(.*?)\]"', text)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= known.keys()


def test_the_compose_file_is_valid_and_what_it_mounts_is_there() -> None:
    ran(SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / "compose.yaml")
    assert COMPOSE["services"].keys() == {"edge", "cloud", "nats", "prometheus", "grafana"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith(".") and "/tls/" not in source:
                assert (DEPLOY / "compose" / source).exists(), source
            elif not source.startswith("."):
                assert source in COMPOSE["volumes"]


def test_nats_takes_its_configuration_and_syncs_every_write() -> None:
    conf = DEPLOY / "compose" / "nats.conf"
    ran(server_binary(), "-t", "--config", conf)
    assert "sync_interval: always" in conf.read_text()


def test_the_manifests_are_valid_kubernetes_and_the_kustomization_names_them_all() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert set(kustomization["resources"]) == files - {"kustomization.yaml", "prometheus-adapter.yaml"}
    operators = {"servicemonitor.yaml", "prometheusrule.yaml"}  # kinds of the Prometheus operator
    builtin = [DEPLOY / "kubernetes" / name for name in kustomization["resources"] if name not in operators]
    said = ran(SCRIPTS / "kubernetes-validate", "--strict", *builtin)
    assert said.count("passed") == len(MANIFESTS) - len(operators)


def test_the_operator_s_rules_are_prometheus_rules() -> None:
    rules = [yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))]
    groups = [group for each in rules for group in each["groups"]]
    assert manifest("PrometheusRule", "sightline")["spec"]["groups"] == groups


def test_what_manifests_select_and_name_is_there() -> None:
    deployment = manifest("Deployment", "sightline-cloud")
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"].items()
    ports = {port["name"] for port in container["ports"]}
    for service in (manifest("Service", "sightline-cloud"), manifest("Service", "sightline-cloud-public")):
        assert service["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert manifest("Service", "sightline-cloud")["spec"]["clusterIP"] == "None"
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = manifest(kind, "sightline-cloud")["spec"]
        assert (spec.get("selector") or spec["podSelector"])["matchLabels"].items() <= labels
    scaler = manifest("HorizontalPodAutoscaler", "sightline-cloud")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    monitor = manifest("ServiceMonitor", "sightline-cloud")["spec"]
    service = manifest("Service", "sightline-cloud")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "sightline-cloud"  # what rules call the job
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    manifest("ConfigMap", volumes["policy"]["configMap"]["name"])
    manifest("ConfigMap", container["envFrom"][0]["configMapRef"]["name"])
    manifest("ServiceAccount", pod["spec"]["serviceAccountName"])
    drain_s = CloudSettings.model_fields["drain_s"].default
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain_s


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)")
def test_systemd_accepts_the_unit_and_rates_it_as_safe(path: Path, tmp_path: Path) -> None:
    program = tmp_path / "opt" / "sightline" / "bin" / "sightline"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/sightline", str(tmp_path / "opt" / "sightline")))
    ran("systemd-analyze", "verify", "--recursive-errors=no", unit)
    ran("systemd-analyze", "security", "--offline=true", "--threshold=20", path)  # of 100; fails above it


# -- by the services' own settings -----------------------------------------------------------------------------------


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """Each set of environment variables that something here gives to a service."""
    for path in DOCKERFILES:
        yield path.name, image_environment(path)
    for side in SETTINGS:
        yield f"compose {side}", COMPOSE["services"][side]["environment"]
    yield "kubernetes", manifest("ConfigMap", "sightline-cloud")["data"]
    container = manifest("Deployment", "sightline-cloud")["spec"]["template"]["spec"]["containers"][0]
    yield "deployment", {each["name"]: "x" for each in container["env"]}


@pytest.mark.parametrize(("where", "environment"), list(environments()))
def test_every_variable_is_a_setting(where: str, environment: Mapping[str, str]) -> None:
    for name in environment:
        match = re.fullmatch(r"SIGHTLINE_(EDGE|CLOUD)_(\w+)", name)
        if match is None:
            assert not name.startswith("SIGHTLINE"), name
            continue
        assert match[2].lower() in SETTINGS[match[1].lower()].model_fields, name


@pytest.mark.parametrize("side", SETTINGS)
def test_the_shipped_settings_file_is_read_by_its_service(side: str) -> None:
    path = DEPLOY / "systemd" / f"{side}.toml"
    settings = SETTINGS[side].load(config=path)
    assert str(settings.data_dir) == f"/var/lib/sightline/{side}"
    # What stands there as an example is a setting too.
    commented = re.sub(r"^# (\w+ = )", r"\1", path.read_text(), flags=re.M)
    assert tomllib.loads(commented)[side].keys() <= SETTINGS[side].model_fields.keys()


def test_the_shipped_policies_are_read_as_policies() -> None:
    shipped = (DEPLOY / "compose" / "policy.toml").read_bytes()
    mounted = manifest("ConfigMap", "sightline-policy")["data"]["policy.toml"].encode()
    for text in (shipped, mounted):
        policy = Policy.parse(text)
        assert policy is not None


# -- by execution ----------------------------------------------------------------------------------------------------


class Sandbox:
    """A running command in a place that looks as its container or unit does."""

    def __init__(self, process: "subprocess.Popen[bytes]", inside: int, log: Path) -> None:
        self.process, self.inside, self.log = process, inside, log
        self._enter = ["nsenter", f"--target={inside}", "--user", "--net", "--mount", "--preserve-credentials", "--"]

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """The exit code of another command in the same place."""
        return subprocess.run([*self._enter, *command], env=dict(environment), capture_output=True).returncode

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Another command in the same place, beside the first."""
        with self.log.open("ab") as out:
            return subprocess.Popen([*self._enter, *command], env=dict(environment), stdout=out, stderr=out)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)  # as a container runtime asks, again and again

    def end(self) -> int:
        os.kill(self.inside, signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def sandbox(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    files: Mapping[str, Path],
    writable: Sequence[str],
) -> Iterator[Sandbox]:
    """`files`: path inside -> file here, read-only. `writable`: folders inside."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(sys.base_prefix)
        arguments = ["bwrap", "--unshare-user", "--uid", "10001", "--gid", "10001", "--unshare-net", "--unshare-ipc"]
        arguments += ["--die-with-parent", "--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
        for name in ("lib", "lib64", "bin", "sbin"):
            if Path("/", name).is_symlink():
                arguments += ["--symlink", f"usr/{name}", f"/{name}"]
            elif Path("/", name).is_dir():
                arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        arguments += ["--ro-bind", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        for path in writable:
            own = Path(folder, path.strip("/").replace("/", "-"))
            own.mkdir()
            arguments += ["--bind", str(own), path]
        # This environment stands where it was made, because scripts name their interpreter, and where it is to be.
        for path in {str(base), sys.prefix, str(ROOT)}:
            arguments += ["--ro-bind", path, path]
        arguments += ["--ro-bind", sys.prefix, "/opt/sightline"]
        for path, here in files.items():
            arguments += ["--ro-bind", str(here), path]
        told = Path(folder, "bwrap.json")
        log = Path(folder, "log")
        with told.open("wb") as tell, log.open("wb") as out:
            arguments += ["--remount-ro", "/", "--info-fd", str(tell.fileno()), "--", *command]
            env = {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
            process = subprocess.Popen(arguments, env=env, stdout=out, stderr=out, pass_fds=[tell.fileno()])
        while not told.read_text().rstrip().endswith("}"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        try:
            yield Sandbox(process, json.loads(told.read_text())["child-pid"], log)
        finally:
            process.kill()
            process.wait()


needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None or shutil.which("nsenter") is None,
    reason="needs bubblewrap and util-linux (Debian: apt-get install bubblewrap)",
)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    certs.authority(folder)
    certs.issue(folder, "edge", uri=["spiffe://sightline/edge/one"], dns=["edge", "localhost"])
    certs.issue(folder, "cloud", dns=["cloud", "localhost"])
    return folder


def tls_files(tls: Path, name: str) -> dict[str, Path]:
    at = "/etc/sightline/tls"
    return {f"{at}/ca.crt": tls / "ca.pem", f"{at}/tls.crt": tls / f"{name}.pem", f"{at}/tls.key": tls / f"{name}.key"}


@needs_sandbox
@pytest.mark.slow  # starts every service of every manifest
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_image_s_command_and_health_check_run_as_written(path: Path, tls: Path) -> None:
    text, environment, side = path.read_text(), image_environment(path), path.name.partition(".")[0]
    command = ast.literal_eval(instruction(text, "ENTRYPOINT")) + ast.literal_eval(instruction(text, "CMD"))
    healthy = ast.literal_eval(re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", text.replace("\\\n", " "), re.M)[0])
    data = ast.literal_eval(instruction(text, "VOLUME"))
    with sandbox(command, environment, files=tls_files(tls, side), writable=["/tmp", *data]) as running:
        running.until(lambda: running.run(healthy, environment) == 0)
        assert running.end() == 0


IMAGE = {path.name.partition(".")[0]: path for path in DOCKERFILES}
BROKER = ["/opt/sightline/bin/nats-server", "--config", "/etc/nats/nats.conf"]


def composed(side: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that compose gives to a service's image."""
    service = COMPOSE["services"][side]
    return service["command"], service["environment"]


def orchestrated() -> tuple[list[str], dict[str, str]]:
    [container] = manifest("Deployment", "sightline-cloud")["spec"]["template"]["spec"]["containers"]
    own = {each["name"]: "sightline-cloud-1" for each in container["env"]}  # the pod's name
    return container["args"], manifest("ConfigMap", "sightline-cloud")["data"] | own


@needs_sandbox
@pytest.mark.slow  # starts every service of every manifest
@pytest.mark.parametrize(
    ("side", "given"),
    [("edge", composed("edge")), ("cloud", composed("cloud")), ("cloud", orchestrated())],
    ids=["compose edge", "compose cloud", "kubernetes cloud"],
)
def test_what_compose_and_kubernetes_run_waits_for_its_broker_and_serves(
    side: str, given: tuple[list[str], dict[str, str]], tls: Path, tmp_path: Path
) -> None:
    image = IMAGE[side].read_text()
    arguments, own = given
    environment = image_environment(IMAGE[side]) | own
    policy = tmp_path / "policy.toml"
    policy.write_text(manifest("ConfigMap", "sightline-policy")["data"]["policy.toml"])
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost cloud nats nats.nats.svc\n")
    files = {
        **tls_files(tls, side),
        "/etc/hosts": hosts,
        "/etc/nats/nats.conf": DEPLOY / "compose" / "nats.conf",
        "/etc/sightline/policy.toml": policy,
        "/etc/sightline/policy/policy.toml": policy,
    }
    healthy = ast.literal_eval(re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", image.replace("\\\n", " "), re.M)[0])
    command = ast.literal_eval(instruction(image, "ENTRYPOINT")) + arguments
    brokered = environment.get("SIGHTLINE_CLOUD_LOG") == "jetstream"
    if brokered:  # one server stands for the cluster's three: it cannot keep three copies of anything
        environment["SIGHTLINE_CLOUD_LOG_REPLICAS"] = "1"
    with sandbox(command, environment, files=files, writable=["/tmp", "/var/lib/sightline", "/data"]) as running:
        if brokered:
            assert server_binary().name == "nats-server"  # and is the one that was pinned
            running.until(lambda: "waiting for the log" in running.log.read_text())
            broker = running.start(BROKER, environment)
        running.until(lambda: running.run(healthy, environment) == 0)
        if brokered:
            asked = COMPOSE["services"]["nats"]["healthcheck"]["test"][1:]
            assert running.run(asked, environment) == 0
        assert running.end() == 0
        if brokered:
            broker.terminate()
            broker.wait(30)


@needs_sandbox
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: apt-get install prometheus)")
def test_the_prometheus_of_the_compose_file_runs_as_written() -> None:
    service = COMPOSE["services"]["prometheus"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    files = {"/etc/prometheus": DEPLOY / "compose" / "../prometheus"}
    assert mounts["../prometheus"] == "/etc/prometheus"
    with sandbox(["prometheus", *service["command"]], {}, files=files, writable=["/tmp", "/prometheus"]) as running:
        running.until(lambda: running.run(service["healthcheck"]["test"][1:], {}) == 0)
        running.end()


@needs_sandbox
@pytest.mark.slow  # starts every service of every manifest
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_unit_s_command_runs_as_written(path: Path) -> None:
    unit, side = path.read_text(), path.stem.removeprefix("sightline-")
    command = shlex.split(re.findall(r"^ExecStart=(.*)$", unit, re.M)[0])
    environment = dict(part.split("=", 1) for part in re.findall(r"^Environment=(.*)$", unit, re.M)[0].split())
    state, cache = (re.findall(rf"^{name}Directory=(.*)$", unit, re.M)[0] for name in ("State", "Cache"))
    port = 7412 if side == "edge" else 7422
    asked = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/readyz', timeout=4)"
    with sandbox(
        command,
        environment,
        files={f"/etc/sightline/{side}.toml": DEPLOY / "systemd" / f"{side}.toml"},
        writable=["/tmp", f"/var/lib/{state}", f"/var/cache/{cache}"],
    ) as running:
        running.until(lambda: running.run(["/opt/sightline/bin/python", "-c", asked], environment) == 0)
        assert running.end() == 0
