"""The server kit, with a real server: statuses, metrics, health, drain, ports, and who may read the wire."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry
from pydantic_settings import SettingsConfigDict
from sightline.v1 import detection_pb2, detection_pb2_grpc

from shared import errors
from shared.errors import InvalidSettings, SightlineError, TooLarge
from shared.metrics import BoundedLabel
from shared.rpc import status, tls
from shared.rpc.server import Server
from shared.settings import ServerSettings

SERVICE = "sightline.v1.DetectionService"


class KitSettings(ServerSettings):
    model_config = SettingsConfigDict(env_prefix="SIGHTLINE_KIT_")
    table: ClassVar[str] = "kit"


class Service(detection_pb2_grpc.DetectionServiceServicer):
    """A service that does what the request's first task says."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Detect(self, request: detection_pb2.DetectRequest, context: Any) -> detection_pb2.DetectResponse:
        what = request.tasks[0] if request.tasks else ""
        self.began.set()
        if what == "wait":
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        elif what == "bug":
            raise ZeroDivisionError("secret of the house")
        elif what:
            raise getattr(errors, what)(f"expected this, got {what}")
        return detection_pb2.DetectResponse(width=7)

    async def Subscribe(
        self, request: detection_pb2.SubscribeRequest, context: Any
    ) -> AsyncIterator[detection_pb2.SubscribeResponse]:
        self.began.set()
        for _ in range(3):
            yield detection_pb2.SubscribeResponse()
        raise errors.CursorExpired("expected a newer cursor, got 3")


@asynccontextmanager
async def running(**flags: Any) -> AsyncIterator[tuple[Server, Service, grpc.aio.Channel]]:
    service = Service()
    settings = KitSettings.load(**flags)
    server = Server(
        settings,
        {SERVICE: lambda s: detection_pb2_grpc.add_DetectionServiceServicer_to_server(service, s)},
        registry=CollectorRegistry(),
    )
    await server.start()
    await server.set_serving(SERVICE, True)
    channel = tls.open_channel(f"127.0.0.1:{server.port}", None, max_message_bytes=64 << 20)
    try:
        yield server, service, channel
    finally:
        await channel.close()
        await server.close()


def detect(channel: grpc.aio.Channel, *tasks: str, **fields: Any) -> Any:
    stub = detection_pb2_grpc.DetectionServiceStub(channel)
    return stub.Detect(detection_pb2.DetectRequest(tasks=tasks, **fields))


async def page(server: Server, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


TREE = [
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SightlineError) and kind is not SightlineError
]


@pytest.mark.parametrize("name", TREE)
async def test_every_error_arrives_as_itself_with_its_status_and_sentence(name: str) -> None:
    async with running() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await detect(channel, name)
        kind = getattr(errors, name)
        assert caught.value.code().name == kind.status
        back = status.from_rpc_error(caught.value)
        assert type(back) is kind
        assert str(back) == f"expected this, got {name}"
        assert (await detect(channel)).width == 7  # and the service goes on


@pytest.mark.parametrize("name", TREE)
def test_errors_survive_the_way_inside_a_stream(name: str) -> None:
    error = getattr(errors, name)("expected a, got b")
    back = status.from_message(status.to_message(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


async def test_a_bug_is_internal_and_keeps_its_details_at_home() -> None:
    async with running() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await detect(channel, "bug")
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(caught.value.details())


async def test_a_status_without_kind_becomes_the_nearest_error() -> None:
    async with running(max_message_bytes=64 << 10) as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await detect(channel, bitstream=bytes(100_000))
        assert isinstance(status.from_rpc_error(caught.value), errors.Overloaded)


async def test_calls_and_streams_are_counted_and_timed_from_first_to_last_message() -> None:
    async with running() as (server, _, channel):
        await detect(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await detect(channel, "TooLarge")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in detection_pb2_grpc.DetectionServiceStub(channel).Subscribe(detection_pb2.SubscribeRequest()):
                pass
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/sightline.v1.DetectionService/Guess")(b"")
        _, text = await page(server, "/metrics")
    method = f'grpc_method="Detect",grpc_service="{SERVICE}",grpc_type="unary"'
    assert f"grpc_server_started_total{{{method}}} 2.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{method}}} 1.0' in text
    assert f'grpc_server_handled_total{{grpc_code="RESOURCE_EXHAUSTED",{method}}} 1.0' in text
    assert f"grpc_server_handling_seconds_count{{{method}}} 2.0" in text
    stream = f'grpc_method="Subscribe",grpc_service="{SERVICE}",grpc_type="server_stream"'
    assert f'grpc_server_handled_total{{grpc_code="OUT_OF_RANGE",{stream}}} 1.0' in text
    assert f"grpc_server_handling_seconds_count{{{stream}}} 1.0" in text
    assert "Guess" not in text
    assert "sightline_build_info{" in text


async def test_cancellation_reaches_the_handler_and_the_counters() -> None:
    async with running() as (server, service, channel):
        call = detect(channel, "wait")
        await service.began.wait()
        call.cancel()
        await asyncio.wait_for(service.cancelled.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError):
            await detection_pb2_grpc.DetectionServiceStub(channel).Detect(
                detection_pb2.DetectRequest(tasks=["wait"]), timeout=0.2
            )
        for _ in range(100):
            _, text = await page(server, "/metrics")
            if 'grpc_code="DEADLINE_EXCEEDED"' in text:
                break
        assert 'grpc_code="CANCELLED"' in text
        assert 'grpc_code="DEADLINE_EXCEEDED"' in text


async def test_health_follows_each_service_and_watchers_hear_it() -> None:
    async with running() as (server, _, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(SERVICE, False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await page(server, "/readyz"))[0] == 503
        assert (await page(server, "/healthz"))[0] == 200
        await server.set_serving(SERVICE, True)
        assert (await page(server, "/readyz"))[0] == 200
        assert (await page(server, "/other"))[0] == 404
        watch.cancel()


async def test_draining_finishes_what_runs_refuses_what_is_new_and_does_not_wait_for_watchers() -> None:
    async with running(drain_s=30) as (server, service, channel):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        await watch.read()
        call = asyncio.ensure_future(detect(channel, "wait"))
        await service.began.wait()
        drain = asyncio.create_task(server.drain())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await detect(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        service.go_on.set()
        assert (await call).width == 7
        await asyncio.wait_for(drain, 10)


async def test_draining_is_bounded() -> None:
    async with running(drain_s=0.2) as (server, service, channel):
        call = asyncio.ensure_future(detect(channel, "wait"))
        await service.began.wait()
        await asyncio.wait_for(server.drain(), 10)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
        assert service.cancelled.is_set()


async def test_reflection_only_where_switched_on() -> None:
    async def services(channel: grpc.aio.Channel) -> list[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async for answer in stub.ServerReflectionInfo(requests()):
            return [service.name for service in answer.list_services_response.service]
        return []

    async with running(reflection=True) as (_, _, channel):
        assert SERVICE in await services(channel)
    async with running() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(channel)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_ports_are_told_on_stdout_and_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ready"
    async with running(ready_file=path) as (server, _, _):
        server.announce(edge_id="e")
        told = json.loads(path.read_text())
        assert told == {"ready": True, "port": server.port, "metrics_port": server.metrics_port, "edge_id": "e"}
        assert json.loads(capsys.readouterr().out) == told


async def test_a_port_that_is_taken_is_an_error_that_names_the_setting() -> None:
    async with running() as (server, _, _):
        with pytest.raises(InvalidSettings, match="setting listen"):
            async with running(listen=f"127.0.0.1:{server.port}"):
                pass
        with pytest.raises(InvalidSettings, match="setting metrics_listen"):
            async with running(metrics_listen=f"127.0.0.1:{server.metrics_port}"):
                pass


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"listen": "0.0.0.0:0"}, "would be open to the network"),
        ({"listen": "somewhere"}, "must be host:port"),
        ({"listen": "127.0.0.1:99999"}, "must be host:port"),
        ({"metrics_listen": "0.0.0.0:0"}, "would be open to the network"),
        ({"tls_certificate": "/no/such/file"}, "must be given together"),
        ({"tls_certificate": "/no/such", "tls_key": "/no/such"}, "must name a readable file"),
        ({"tls_client_ca": "/no/such"}, "needs tls_certificate and tls_key"),
    ],
)
async def test_a_server_that_could_be_read_by_strangers_does_not_start(flags: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        async with running(**flags):
            pass


async def test_plaintext_beyond_loopback_can_be_asked_for() -> None:
    async with running(listen="0.0.0.0:0", insecure=True) as (_, _, channel):
        assert (await detect(channel)).width == 7


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_loopback_is_told_from_the_network(address: str, local: bool) -> None:
    assert tls.is_local(address) is local


def test_labels_are_bounded() -> None:
    label = BoundedLabel(2)
    assert [label(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


class TestSettings:
    def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "s.toml"
        file.write_text('[kit]\ndrain_s = 1\nlog_level = "error"\nmax_message_bytes = "1MiB"\n[edge]\nx = 1\n')
        monkeypatch.setenv("SIGHTLINE_KIT_CONFIG", str(file))
        monkeypatch.setenv("SIGHTLINE_KIT_LOG_LEVEL", "debug")
        monkeypatch.setenv("SIGHTLINE_KIT_DRAIN_S", "2")
        settings = KitSettings.load(drain_s="3", listen=None)
        assert (settings.drain_s, settings.log_level, settings.max_message_bytes) == (3.0, "debug", 1 << 20)
        assert settings.listen == "127.0.0.1:0"

    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            ({"drain_s": "soon"}, ["--drain-s", "SIGHTLINE_KIT_DRAIN_S", "'soon'"]),
            ({"max_message_bytes": "1"}, ["--max-message-bytes", "65536", "got '1'"]),
            ({"log_level": "loud"}, ["--log-level", "got 'loud'"]),
            ({"colour": "red"}, ["colour"]),
        ],
    )
    def test_an_error_names_the_field_and_what_came(self, flags: dict[str, str], parts: list[str]) -> None:
        with pytest.raises(InvalidSettings) as caught:
            KitSettings.load(**flags)
        for part in parts:
            assert part in str(caught.value)

    def test_a_misspelt_name_is_an_error_wherever_it_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "s.toml"
        file.write_text("[kit]\ndrain = 1\n")
        with pytest.raises(InvalidSettings, match="drain in"):
            KitSettings.load(config=file)
        monkeypatch.setenv("SIGHTLINE_KIT_DRAIN", "1")
        with pytest.raises(InvalidSettings, match="SIGHTLINE_KIT_DRAIN"):
            KitSettings.load()

    @pytest.mark.parametrize("text", ["[kit", "kit = 3", None])
    def test_a_file_that_cannot_be_used_is_named(self, tmp_path: Path, text: str | None) -> None:
        file = tmp_path / "s.toml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(InvalidSettings, match=r"s\.toml"):
            KitSettings.load(config=file)

    def test_settings_do_not_change(self) -> None:
        settings = KitSettings.load()
        with pytest.raises(ValueError, match="frozen"):
            settings.drain_s = 1  # type: ignore[misc]


def test_too_large_and_overloaded_share_a_status_but_not_an_error() -> None:
    assert TooLarge.status == errors.Overloaded.status
    assert type(status.from_message(status.to_message(TooLarge("x")))) is TooLarge
