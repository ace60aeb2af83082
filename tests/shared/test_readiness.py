"""Readiness, on a real server: health watchers, /readyz and the gauge say the same, and late parts are waited for."""

import asyncio
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import InvalidSettings, Unavailable
from shared.rpc.server import unless_stopped
from tests.shared.test_rpc import SERVICE, page, running

STATUS = health_pb2.HealthCheckResponse


async def test_a_problem_is_told_to_watchers_probes_and_prometheus_and_so_is_its_end() -> None:
    async with running() as (server, _, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == STATUS.SERVING
        assert await page(server, "/readyz") == (200, "ok\n")
        await server.readiness.set_problem("disk", "expected 64 MiB free, got 3 MiB")
        assert (await watch.read()).status == STATUS.NOT_SERVING
        whole = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert whole.status == STATUS.NOT_SERVING
        assert await page(server, "/readyz") == (503, "disk: expected 64 MiB free, got 3 MiB\n")
        assert (await page(server, "/healthz"))[0] == 200  # a restart makes no room on a disk
        assert "sightline_ready 0.0" in (await page(server, "/metrics"))[1]
        await server.readiness.set_problem("disk", "")
        assert (await watch.read()).status == STATUS.SERVING
        assert "sightline_ready 1.0" in (await page(server, "/metrics"))[1]
        watch.cancel()


async def test_a_server_that_is_not_open_yet_or_stops_says_so() -> None:
    async with running() as (server, _, _):
        await server.set_serving(SERVICE, False)
        assert await page(server, "/readyz") == (503, f"{SERVICE}: is not open yet\n")
        await server.set_serving(SERVICE, True)
        server.draining.set()
        assert await page(server, "/readyz") == (503, "server: is stopping\n")


async def test_checks_are_asked_again_and_again_and_one_that_fails_ends_no_other() -> None:
    asked = asyncio.Event()
    sentences = ["the disk is full", ""]

    async def disk() -> str:
        if not sentences:
            asked.set()
        return sentences.pop(0) if sentences else ""

    async def broken() -> str:
        raise ZeroDivisionError("of the check")

    async with running() as (server, _, _):
        server.keep_checking({"broken": broken, "disk": disk})
        await asyncio.wait_for(asked.wait(), 30)
        code, said = await page(server, "/readyz")
        assert code == 503
        assert "broken: cannot be checked: ZeroDivisionError" in said
        assert "disk" not in said


async def test_what_is_not_there_yet_is_waited_for_and_what_is_wrong_is_not(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    tried = asyncio.Event()

    async def mounted() -> Path:
        tried.set()
        if not path.exists():
            raise Unavailable(f"{path} is not there")
        return path

    async def misspelt() -> Path:
        raise InvalidSettings("setting disk must be a path")

    async with running() as (server, _, _):
        waiting = asyncio.create_task(server.readiness.until_there("disk", mounted))
        await tried.wait()
        assert await page(server, "/readyz") == (503, f"disk: {path} is not there\n")
        path.mkdir()
        assert await asyncio.wait_for(waiting, 30) == path
        assert server.readiness.ready
        with pytest.raises(InvalidSettings):
            await server.readiness.until_there("disk", misspelt)


async def test_waiting_ends_when_the_server_is_told_to_stop() -> None:
    cleaned_up = asyncio.Event()

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.set()

    async def three() -> int:
        return 3

    stop = asyncio.Event()
    assert await unless_stopped(stop, three()) == 3
    asyncio.get_running_loop().call_soon(stop.set)
    assert await unless_stopped(stop, for_ever()) is None
    assert cleaned_up.is_set()
