"""Who may do what, with real TLS: identities from certificates and tokens, the policy, and files that change."""

import asyncio
import base64
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from sightline.v1 import admin_pb2, common_pb2, detection_pb2, detection_pb2_grpc, edge_pb2, ingest_pb2, quarantine_pb2

from shared.errors import InvalidSettings
from shared.rpc import certificates, tls
from shared.rpc.access import METHODS, caller
from shared.rpc.certificates import Names, issue
from shared.rpc.policy import Policy, token_hash
from shared.rpc.reload import Reloaded
from shared.rpc.server import Server
from tests.shared.authority import CONSUMER, EDGE, NOBODY, POLICY, Authority
from tests.shared.test_rpc import SERVICE, KitSettings

TOKEN = "a-token-of-some-length"
OK = grpc.StatusCode.OK
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN_CALLER = grpc.StatusCode.UNAUTHENTICATED
NO_HANDSHAKE = grpc.StatusCode.UNAVAILABLE


class Service(detection_pb2_grpc.DetectionServiceServicer):
    """Answers with who called: its name, and whether it may see `gate-1` and `yard`."""

    async def Detect(self, request: detection_pb2.DetectRequest, context: Any) -> detection_pb2.DetectResponse:
        who = caller()
        return detection_pb2.DetectResponse(
            model_id=who.name, width=int(who.may("subscribe", "gate-1")), height=int(who.may("subscribe", "yard"))
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


@asynccontextmanager
async def running(**flags: Any) -> AsyncIterator[Server]:
    service = Service()
    server = Server(
        KitSettings.load(**{"metrics_listen": "", **flags}),
        {SERVICE: lambda s: detection_pb2_grpc.add_DetectionServiceServicer_to_server(service, s)},
        registry=CollectorRegistry(),
    )
    await server.start()
    await server.set_serving(SERVICE, True)
    try:
        yield server
    finally:
        await server.close()


async def ask(
    server: Server, credentials: grpc.ChannelCredentials | None, token: str | None = None
) -> tuple[grpc.StatusCode, detection_pb2.DetectResponse]:
    """Over a connection of its own."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with tls.open_channel(f"127.0.0.1:{server.port}", credentials, max_message_bytes=1 << 20) as channel:
        stub = detection_pb2_grpc.DetectionServiceStub(channel)
        try:
            return OK, await stub.Detect(detection_pb2.DetectRequest(), timeout=20, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code(), detection_pb2.DetectResponse()


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def test_a_certificates_uri_is_its_identity_and_the_policy_says_what_it_may(
    authority: Authority, policy: Path
) -> None:
    async with running(**authority.server_settings(), policy=policy) as server:
        code, answer = await ask(server, authority.credentials(authority.client(CONSUMER)))
        assert (code, answer.model_id, answer.width, answer.height) == (OK, CONSUMER, 1, 0)
        assert (await ask(server, authority.credentials(authority.client(EDGE))))[0] is DENIED
        assert (await ask(server, authority.credentials(authority.client(NOBODY))))[0] is DENIED
        assert (await ask(server, authority.credentials(None)))[0] is NO_HANDSHAKE


async def test_a_dns_name_cannot_pass_for_a_uri(authority: Authority, policy: Path) -> None:
    write(policy, f'[[grant]]\nidentity = "dns:consumer.example.org"\nsubscribe = ["*"]\n{POLICY}')
    named = issue(authority.pair, Names("c", dns=["consumer.example.org", CONSUMER]), 1)
    async with running(**authority.server_settings(), policy=policy) as server:
        code, answer = await ask(server, authority.credentials(named))
        assert (code, answer.model_id) == (OK, "dns:consumer.example.org")
        only = issue(authority.pair, Names(CONSUMER, dns=[CONSUMER]), 1)
        assert (await ask(server, authority.credentials(only)))[0] is DENIED


async def test_a_token_is_an_identity_over_tls_without_client_certificates(authority: Authority, policy: Path) -> None:
    write(
        policy, f'[[grant]]\nidentity = "token:console"\nsubscribe = ["*"]\n[tokens]\nconsole = "{token_hash(TOKEN)}"\n'
    )
    flags = {**authority.server_settings(), "tls_client_ca": None}
    async with running(**flags, policy=policy) as server:
        code, answer = await ask(server, authority.credentials(None), TOKEN)
        assert (code, answer.model_id) == (OK, "token:console")
        assert (await ask(server, authority.credentials(None), TOKEN + "x"))[0] is UNKNOWN_CALLER
        assert (await ask(server, authority.credentials(None)))[0] is UNKNOWN_CALLER
        file = authority.folder / "token"
        write(file, TOKEN + "\n")
        address = f"127.0.0.1:{server.port}"
        credentials = tls.channel_credentials(
            address, authority.ca, None, None, insecure=False, setting="cloud", token=file
        )
        assert (await ask(server, credentials))[1].model_id == "token:console"
    with pytest.raises(InvalidSettings, match="needs the server's authority"):
        tls.channel_credentials(address, None, None, None, insecure=False, setting="cloud", token=file)


async def test_health_asks_for_no_permission_and_unlisted_methods_for_all(authority: Authority, policy: Path) -> None:
    async with running(**authority.server_settings(), policy=policy, reflection=True) as server:
        credentials = authority.credentials(authority.client(NOBODY))
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(iter(()))
            assert await call.code() is DENIED


async def test_plaintext_on_loopback_is_local_and_may_do_everything_unless_a_policy_says_less(policy: Path) -> None:
    async with running() as server:
        assert (await ask(server, None))[1].model_id == "local"
    async with running(policy=policy) as server:
        assert (await ask(server, None))[0] is DENIED
    write(policy, '[[grant]]\nidentity = "local"\nsubscribe = ["yard"]\n')
    async with running(policy=policy) as server:
        code, answer = await ask(server, None)
        assert (code, answer.width, answer.height) == (OK, 0, 1)


def test_every_method_of_the_contract_has_its_permission() -> None:
    files = [
        module.DESCRIPTOR for module in (admin_pb2, common_pb2, detection_pb2, edge_pb2, ingest_pb2, quarantine_pb2)
    ]
    contract = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert contract == {method for method in METHODS if method.startswith("/sightline.")}


async def test_a_policy_that_changes_takes_effect_and_one_that_is_broken_does_not(
    authority: Authority, policy: Path
) -> None:
    async with running(**authority.server_settings(), policy=policy) as server:
        credentials = authority.credentials(authority.client(NOBODY))

        async def until(code: grpc.StatusCode) -> None:
            for _ in range(200):
                if (await ask(server, credentials))[0] is code:
                    return
            pytest.fail(f"the policy never led to {code}")

        await until(DENIED)
        write(policy, f'[[grant]]\nidentity = "{NOBODY}"\nsubscribe = ["*"]\n')
        await until(OK)
        write(policy, '[[grant]\nidentity = "half a fi')
        failures = server.reload_metrics.reloads.labels("policy", "refused")
        for _ in range(200):
            assert (await ask(server, credentials))[0] is OK
            if failures._value.get():
                break
        assert failures._value.get() == 1
        assert (await ask(server, credentials))[0] is OK
        write(policy, POLICY)
        await until(DENIED)


async def test_a_renewed_certificate_serves_the_next_connection_and_the_old_one_goes_on(authority: Authority) -> None:
    async with running(**authority.server_settings()) as server:
        own = authority.client(EDGE)
        async with grpc.aio.secure_channel(f"localhost:{server.port}", authority.credentials(own)) as before:
            stub = detection_pb2_grpc.DetectionServiceStub(before)
            await stub.Detect(detection_pb2.DetectRequest())
            other = Authority(authority.folder)  # the same files, signed by another authority
            assert (await ask(server, other.credentials(other.client(EDGE))))[0] is OK
            assert (await ask(server, authority.credentials(own)))[0] is NO_HANDSHAKE
            assert (await stub.Detect(detection_pb2.DetectRequest())).model_id == EDGE
        write(authority.folder / "server.pem", "-----BEGIN CERTIFICATE-----\nhalf")
        assert (await ask(server, other.credentials(other.client(EDGE))))[0] is OK
        (told,) = server.reload_metrics.expires.collect()
        assert [(sample.labels["what"], sample.value > time.time()) for sample in told.samples] == [("server", True)]


async def test_the_metrics_page_speaks_tls_to_known_callers_with_the_certificate_of_now(
    authority: Authority, tmp_path: Path
) -> None:
    own = certificates.issue(authority.pair, Names("prometheus", dns=["prometheus"]), 1)
    certificates.write(own, tmp_path / "own.pem", tmp_path / "own.key")

    def scrape(port: int, *, shows_certificate: bool) -> tuple[str, bytes]:
        context = ssl.create_default_context(cafile=str(authority.ca))
        if shows_certificate:
            context.load_cert_chain(tmp_path / "own.pem", tmp_path / "own.key")
        with (
            socket.create_connection(("127.0.0.1", port), 10) as tcp,
            context.wrap_socket(tcp, server_hostname="localhost") as secure,
        ):
            secure.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return str(secure.getpeercert(binary_form=True)), secure.recv(15)

    flags = {**authority.server_settings(), "metrics_listen": "127.0.0.1:0", "metrics_tls": True}
    async with running(**flags) as server:
        with socket.create_connection(("127.0.0.1", server.metrics_port), 10):  # says nothing and holds up nobody
            first, answer = await asyncio.to_thread(scrape, server.metrics_port, shows_certificate=True)
            assert answer == b"HTTP/1.0 200 OK"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(scrape, server.metrics_port, shows_certificate=False)
            authority.issue("server", Names("server", dns=["localhost"]))
            async with asyncio.timeout(30):
                while (await asyncio.to_thread(scrape, server.metrics_port, shows_certificate=True))[0] == first:
                    pass


@pytest.mark.parametrize("days", [-1, -0.001])
async def test_an_expired_certificate_does_not_pass(authority: Authority, days: float) -> None:
    async with running(**authority.server_settings()) as server:
        assert (await ask(server, authority.credentials(authority.client(EDGE, days))))[0] is NO_HANDSHAKE


async def test_tls_to_the_network_needs_a_way_to_tell_callers_apart(authority: Authority, policy: Path) -> None:
    flags = {**authority.server_settings(), "tls_client_ca": None, "listen": "0.0.0.0:0"}
    with pytest.raises(InvalidSettings, match="anybody who reaches"):
        async with running(**flags):
            pass
    async with running(**flags, policy=policy):
        pass


async def test_a_key_of_another_certificate_is_refused_at_start(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with pytest.raises(InvalidSettings, match="must hold the key of the certificate"):
        async with running(**{**authority.server_settings(), "tls_key": other.folder / "server.key"}):
            pass


def test_a_certificate_of_a_kind_that_nobody_knows_is_a_typed_error(authority: Authority) -> None:
    good = base64.b64decode("".join(authority.pair.certificate.decode().splitlines()[1:-1]))
    curve = bytes.fromhex("06082a8648ce3d030107")  # the object identifier of P-256
    assert curve in good
    unknown = good.replace(curve, curve[:-1] + b"\x7f")
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(unknown) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(InvalidSettings, match="must hold a PEM certificate"):
        certificates.inspect(pem, "setting tls_certificate")


def test_files_are_read_again_only_when_they_changed_and_a_link_may_be_switched(tmp_path: Path) -> None:
    reads: list[bytes] = []

    def parse(files: list[bytes]) -> bytes:
        reads.append(files[0])
        return files[0]

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    (tmp_path / "now").symlink_to("a")
    file = Reloaded("file", [tmp_path / "now" / "f"], parse)
    assert [file.get(), file.get()] == [b"a", b"a"]
    (tmp_path / "next").symlink_to("b")
    (tmp_path / "next").rename(tmp_path / "now")
    assert [file.get(), file.get()] == [b"b", b"b"]
    (tmp_path / "b" / "f").unlink()
    assert file.get() == b"b"
    assert reads == [b"a", b"b"]


class TestPolicy:
    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("[[grant]]\nsend = ['a']", "grant.0.identity"),
            ("[[grant]]\nidentity = 'a'\nsned = ['a']", "grant.0.sned"),
            ("[[grant]]\nidentity = 'a'\nsend = 'a'", "grant.0.send"),
            ("[[grant]]\nidentity = 'a*b'", "grant.0.identity"),
            ("[[grant]]\nidentity = 'a'\nadminister = 'no'", "grant.0.administer"),
            ("[tokens]\na = 'secret'", "tokens.a"),
            ("[tokens]\na = '" + "0" * 64 + "'\nb = '" + "0" * 64 + "'", "two tokens"),
            ("identity = ", "TOML"),
            ("\ud800", "TOML"),
        ],
    )
    def test_a_fault_is_named(self, text: str, sentence: str) -> None:
        with pytest.raises(InvalidSettings, match=sentence):
            Policy.parse(text.encode("utf-8", "surrogatepass"))

    def test_grants_of_all_names_of_a_caller_add_up(self) -> None:
        policy = Policy.parse(
            b'[[grant]]\nidentity = "a*"\nsend = ["x"]\n[[grant]]\nidentity = "b"\nsend = ["y*"]\nsubscribe = ["*"]'
        )
        both = policy.rights(("b", "abc"))
        assert [both.allow("send", camera) for camera in ("x", "y", "y2", "z")] == [True, True, True, False]
        assert not policy.rights(("B",)).any
        assert not policy.rights(("a",)).allow("subscribe")

    @settings(max_examples=50, deadline=None)
    @given(st.text(max_size=200))
    def test_any_text_is_a_policy_or_a_typed_error(self, text: str) -> None:
        try:
            policy = Policy.parse(text.encode("utf-8", "surrogatepass"))
        except InvalidSettings:
            return
        assert not policy.rights(("anybody",)).administer
