"""`sightline doctor edge|cloud`: what stands between these settings and a service that runs, and what to do about it.

It takes the service's own flags, environment and file, changes nothing, and may run beside the service. Exit code 0 if
all is well or merely worth knowing, 1 if something would not work.
"""

import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.flags import run
from shared.errors import SightlineError

if TYPE_CHECKING:
    from cloud.settings import CloudSettings
    from edge.settings import EdgeSettings
    from shared.settings import ServerSettings

OK, NOTE, FAULT = "ok", "note", "fault"
MIN_FREE_BYTES = 1 << 30
CERTIFICATE_DAYS = 14
ANSWER_S = 5.0
# What is asked for in pyproject.toml, as far as an old one would break the wire or the arithmetic.
OLDEST = {"torch": (2, 6), "grpcio": (1, 85), "protobuf": (7, 35), "numpy": (1, 26)}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `level`: ok, note or fault. `advice`: what to do, for notes and faults."""

    what: str
    level: str
    detail: str
    advice: str = ""


def edge(context: typer.Context) -> None:
    """Check what an edge needs: device, versions, weights, ports, certificates, disk, and the cloud it sends to."""
    from edge.settings import EdgeSettings

    examine(EdgeSettings, edge_findings, context.args, edge.__doc__ or "")


def cloud(context: typer.Context) -> None:
    """Check what a cloud needs: device, versions, weights, ports, certificates and disk."""
    from cloud.settings import CloudSettings

    examine(CloudSettings, cloud_findings, context.args, cloud.__doc__ or "")


def examine(
    model: "type[ServerSettings]",
    findings: Callable[[Any], Iterator[Finding]],
    arguments: Sequence[str],
    about: str,
) -> None:
    """Raises InvalidSettings, which is a finding of its own, and SystemExit."""
    from cli.services import settings_flags

    def start(given: dict[str, Any]) -> None:
        faults = 0
        for finding in findings(model.load(**given)):
            show(finding)
            faults += finding.level == FAULT
        print(f"{faults} fault{'s' * (faults != 1)}" if faults else "nothing stands in the way")
        raise typer.Exit(1 if faults else 0)

    run(settings_flags(model), start, arguments, f"sightline doctor {model.table}", about)


def show(finding: Finding) -> None:
    print(f"{finding.level:5}  {finding.what}: {finding.detail}")
    if finding.advice:
        print(f"       -> {finding.advice}")
    sys.stdout.flush()


def edge_findings(settings: "EdgeSettings") -> Iterator[Finding]:
    """One at a time, the quick ones first."""
    yield from versions()
    yield device(settings.device)
    yield from ports(settings)
    yield from certificates(settings, settings.cloud_certificate, settings.cloud_key, settings.cloud_ca)
    yield disk(settings.data_dir, int(settings.spool_max_bytes), "spool_max_bytes")
    mine: dict[str, str] = {}
    for reference in settings.models:
        finding, model_id = weights(reference)
        mine[model_id] = reference
        yield finding
    if settings.cloud:
        yield from reach_cloud(settings, {model_id: name for model_id, name in mine.items() if model_id})
    else:
        yield Finding("cloud", NOTE, "none is set", "frames stay in the spool until setting cloud names one")


def cloud_findings(settings: "CloudSettings") -> Iterator[Finding]:
    """One at a time, the quick ones first."""
    yield from versions()
    yield device(settings.device)
    yield from ports(settings)
    yield from certificates(settings, None, None, None)
    yield disk(settings.data_dir.expanduser(), int(settings.log_max_bytes), "log_max_bytes")
    for reference in settings.model_references:
        yield weights(reference)[0]
    for name in settings.all_task_names:
        yield task(name)


def versions() -> Iterator[Finding]:
    """Python and the packages that the wire and the arithmetic depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from shared.metrics import software_version

    yield Finding("sightline", OK, f"{software_version()} on Python {sys.version.split()[0]}")
    for package, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, FAULT, f"expected {wanted} or newer, there is none", f"pip install '{package}'")
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
        if numbers < oldest:
            yield Finding(package, FAULT, f"expected {wanted} or newer, got {found}", f"pip install -U '{package}'")
        else:
            yield Finding(package, OK, found)


def device(name: str) -> Finding:
    """Whether the networks' device is there and computes."""
    import torch

    if not name.startswith("cuda"):
        there = torch.cuda.is_available()
        return Finding(
            "device", NOTE if there else OK, f"{name}, {torch.get_num_threads()} threads",
            f"{torch.cuda.get_device_name()} is idle; set device to cuda to use it" if there else "",
        )  # fmt: skip
    advice = "install NVIDIA's driver and a CUDA build of torch, or set device to cpu"
    try:
        probe = torch.ones(256, 256, device=name)
        if float((probe @ probe)[0, 0]) != 256:
            return Finding("device", FAULT, f"{name} computes 256 ones to something else", "test the card's memory")
        free, total = torch.cuda.mem_get_info(name)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding("device", FAULT, f"{name} cannot be used: {said}", advice)
    detail = f"{torch.cuda.get_device_name(name)}, {free >> 20} of {total >> 20} MiB free"
    if free < MIN_FREE_BYTES:
        return Finding("device", NOTE, detail, "stop what else uses the card, or the first batch may not fit")
    return Finding("device", OK, detail)


def ports(settings: "ServerSettings") -> Iterator[Finding]:
    """Whether each port is free, and open to nobody by omission."""
    from shared.rpc import tls

    for name in ("listen", "metrics_listen", "admin_listen"):
        address = getattr(settings, name)
        if not address or address.startswith("unix:"):
            continue
        try:
            host, port = tls.split_address(address, name)
            if name != "metrics_listen":
                tls.server_credentials(
                    address, settings.tls_certificate, settings.tls_key, settings.tls_client_ca,
                    insecure=settings.insecure, has_policy=settings.policy is not None, setting=name,
                )  # fmt: skip
            elif not (settings.insecure or settings.metrics_insecure or settings.metrics_tls or tls.is_local(address)):
                yield Finding(name, FAULT, f"{address} is open to the network in plaintext", "listen on loopback")
                continue
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except SightlineError as error:
            yield Finding(name, FAULT, str(error), "see SECURITY.md, section Identity")
        except OSError as error:
            yield Finding(
                name, NOTE, f"{address} cannot be taken: {error.strerror}",
                "well if the service runs already; else stop who has it, or set another port",
            )  # fmt: skip
        else:
            plain = settings.tls_certificate is None
            yield Finding(name, OK, f"{address} is free, {'plaintext' if plain or name == 'metrics_listen' else 'TLS'}")
    yield policy(settings)


def policy(settings: "ServerSettings") -> Finding:
    """Whether the policy can be used, and grants anything."""
    from shared.rpc.policy import Policy

    if settings.policy is None:
        if settings.tls_certificate is None:
            return Finding("policy", OK, "none is set; plaintext on loopback may do everything")
        advice = "every certificate of tls_client_ca may send and subscribe; a policy can say less"
        return Finding("policy", NOTE, "none is set", advice)
    try:
        found = Policy.parse(settings.policy.read_bytes())
    except (SightlineError, OSError) as error:
        return Finding("policy", FAULT, str(error), f"mend {settings.policy}; what runs keeps the last good one")
    if not found.grants:
        return Finding("policy", FAULT, f"{settings.policy} grants nobody anything", "add a [[grant]]")
    admins = sum(grant.administer for grant in found.grants)
    detail = f"{len(found.grants)} grants, {admins} may administer, {len(found.token_names)} tokens"
    return Finding("policy", OK, detail)


def certificates(
    settings: "ServerSettings", own: Path | None, own_key: Path | None, own_ca: Path | None
) -> Iterator[Finding]:
    """Whether certificates match their keys, and for how long they are good."""
    pairs = (
        ("tls_certificate", settings.tls_certificate, settings.tls_key),
        ("tls_client_ca", settings.tls_client_ca, None),
        ("cloud_certificate", own, own_key),
        ("cloud_ca", own_ca, None),
    )
    for name, path, key in pairs:
        if path is not None:
            yield certificate(name, path, key)


def certificate(name: str, path: Path, key: Path | None) -> Finding:
    """One certificate, with its key where it has one."""
    from shared.rpc.certificates import inspect, require_pair
    from shared.rpc.reload import read_file

    try:
        found = inspect(read_file(path, f"setting {name}"), f"setting {name}")
        if key is not None:
            require_pair(found, read_file(key, f"key of {name}"), f"key of {name}")
    except SightlineError as error:
        return Finding(name, FAULT, str(error), "issue it again: sightline certs issue")
    days = found.seconds_left() / 86_400
    detail = f"{', '.join(found.names) or found.subject}, good until {found.not_after:%Y-%m-%d %H:%M} UTC"
    if days < 0:
        return Finding(name, FAULT, f"{detail}: expired", "issue it again; a running service takes it as it is written")
    if days < CERTIFICATE_DAYS:
        return Finding(name, NOTE, f"{detail}: {days:.1f} days left", "renew it soon; no restart is needed")
    if key is not None and key.stat().st_mode & 0o077:
        return Finding(name, NOTE, f"{detail}, but others may read {key}", f"chmod 600 {key}")
    return Finding(name, OK, detail)


def disk(folder: Path, wanted_bytes: int, setting: str) -> Finding:
    """Whether the data folder's disk takes and keeps what the settings allow."""
    import os
    import tempfile

    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".sightline-doctor-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding("disk", FAULT, f"{there} cannot be written: {error.strerror}", "give the service its own folder")
    free = shutil.disk_usage(there).free
    used = sum(each.stat().st_size for each in folder.glob("*") if each.is_file()) if folder.exists() else 0
    detail = f"{folder}: {free >> 20} MiB free, {setting} is {wanted_bytes >> 20} MiB, {used >> 20} in use"
    if free < MIN_FREE_BYTES:
        return Finding("disk", FAULT, detail, "make room")
    if free + used < wanted_bytes:
        return Finding("disk", NOTE, detail, f"the disk would be full first; lower {setting} or make room")
    return Finding("disk", OK, detail)


def weights(reference: str) -> tuple[Finding, str]:
    """A codec bundle, hashed anew; and its model id, "" where it cannot be used."""
    from shared.codec.bundle import load_bundle

    try:
        bundle = load_bundle(reference)
    except SightlineError as error:
        return Finding(f"codec {reference}", FAULT, str(error), "copy the bundle again, or name another"), ""
    return Finding(f"codec {reference}", OK, f"{bundle.model_id}, hash as in its manifest"), bundle.model_id


def task(name: str) -> Finding:
    """A task model that needs no download."""
    from cloud.tasks import loading

    if name not in loading.BUNDLED and not Path(name).exists():
        return Finding(f"task {name}", NOTE, "torchvision's own", "its weights are downloaded at the first start")
    try:
        found = loading.load_task(name)
    except SightlineError as error:
        return Finding(f"task {name}", FAULT, str(error), "copy the model again, or name another")
    return Finding(f"task {name}", OK, found.model_id)


def reach_cloud(settings: "EdgeSettings", mine: dict[str, str]) -> Iterator[Finding]:
    """Whether the cloud answers this edge, and decodes what it encodes. `mine`: model id -> reference."""
    import grpc
    from sightline.v1 import ingest_pb2, ingest_pb2_grpc

    from shared.rpc import tls

    try:
        credentials = tls.channel_credentials(
            settings.cloud, settings.cloud_ca, settings.cloud_certificate, settings.cloud_key,
            insecure=settings.cloud_insecure, setting="cloud", token=settings.cloud_token,
        )  # fmt: skip
    except SightlineError as error:
        yield Finding("cloud", FAULT, str(error), "see SECURITY.md, section Identity")
        return
    if credentials is None:
        opened = grpc.insecure_channel(settings.cloud)
    else:
        opened = grpc.secure_channel(settings.cloud, credentials)
    with opened as channel:
        try:
            stub = ingest_pb2_grpc.IngestServiceStub(channel)
            answer = stub.ListModels(ingest_pb2.ListModelsRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            advice = {
                grpc.StatusCode.UNAUTHENTICATED: "give cloud_certificate or cloud_token",
                grpc.StatusCode.PERMISSION_DENIED: "grant this edge's identity `send` in the cloud's policy",
            }.get(code, "is it up, is the address right, do both trust each other's authority?")
            yield Finding("cloud", FAULT, f"{settings.cloud}: {code.name}: {error.details()}", advice)  # type: ignore[attr-defined]
            return
    yield Finding("cloud", OK, f"{settings.cloud} answers")
    decodes = {codec.model_id for codec in answer.codecs}
    for model_id, reference in mine.items():
        if model_id in decodes:
            yield Finding("models", OK, f"the cloud decodes {reference}")
        else:
            yield Finding(
                "models", FAULT, f"the cloud does not decode {reference} ({model_id})",
                f"load it there: sightline admin load {reference}; until then its frames wait in the spool",
            )  # fmt: skip
