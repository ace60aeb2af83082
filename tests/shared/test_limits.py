"""How much one caller may ask for, and what a connection may cost: with the clock given, and with a real server."""

import asyncio
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sightline.v1 import detection_pb2, detection_pb2_grpc

from shared.errors import InvalidInput, Overloaded
from shared.rpc import server as server_module
from shared.rpc import status, tls
from shared.rpc.limits import MAX_REMEMBERED, Budgets, CallLimits
from tests.shared.authority import EDGE, Authority
from tests.shared.test_rpc import detect, page, running


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_caller_over_its_rate_waits_and_the_others_do_not() -> None:
    clock = Clock()
    budgets = Budgets(CallLimits(100, 100, rate_caller=10), clock)
    assert [budgets.wait_s("a") for _ in range(20)] == [0.0] * 20  # two seconds' worth at once
    assert budgets.wait_s("a") == pytest.approx(0.1)
    assert budgets.wait_s("b") == 0.0
    clock.now_s += 0.101
    assert (budgets.wait_s("a"), budgets.wait_s("a") > 0) == (0.0, True)
    clock.now_s += 1000
    assert sum(budgets.wait_s("a") == 0.0 for _ in range(100)) == 20
    assert all(budgets.wait_s("local") == 0.0 for _ in range(1000))


def test_calls_under_way_are_bounded_for_one_caller_and_for_all() -> None:
    budgets = Budgets(CallLimits(calls=3, calls_caller=2, rate_caller=0), Clock())
    with budgets.call("a"), budgets.call("a"):
        with pytest.raises(Overloaded, match="a has 2 calls"), budgets.call("a"):
            pass
        with budgets.call("b"), pytest.raises(Overloaded, match="3 calls are under way"), budgets.call("c"):
            pass
        with budgets.call("c"):
            pass
    with budgets.call("a"):
        pass


def test_callers_that_come_and_go_are_forgotten_but_not_their_running_calls() -> None:
    budgets = Budgets(CallLimits(10**6, 1, rate_caller=1), Clock())
    with budgets.call("stays"):
        for number in range(MAX_REMEMBERED + 10):
            budgets.wait_s(f"caller {number}")
        assert len(budgets._budgets) == MAX_REMEMBERED
        with pytest.raises(Overloaded), budgets.call("stays"):
            pass


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.5, 50))
def test_no_pattern_of_asking_gets_more_than_rate_and_burst(pauses: list[float], rate: float) -> None:
    clock = Clock()
    budgets = Budgets(CallLimits(1, 1, rate), clock)
    taken = 0
    for pause in pauses:
        clock.now_s += pause
        while budgets.wait_s("a") == 0.0:
            taken += 1
    assert taken <= rate * (2 + sum(pauses)) + 1e-6


async def test_a_server_refuses_calls_over_the_limit_and_says_so(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    flags = {**authority.server_settings(), "max_calls_caller": 1}
    async with running(**flags) as (server, service, _):
        credentials = authority.credentials(authority.client(EDGE))
        async with tls.open_channel(f"localhost:{server.port}", credentials, max_message_bytes=1 << 20) as channel:
            first = asyncio.ensure_future(detect(channel, "wait"))
            await service.began.wait()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await detect(channel)
            error = status.from_rpc_error(refused.value)
            assert (type(error), "has 1 calls under way" in str(error)) == (Overloaded, True)
            service.go_on.set()
            await first
            await detect(channel)
        _, text = await page(server, "/metrics")
        assert 'sightline_rpc_refused_total{reason="limit"} 1.0' in text


async def test_bytes_that_are_no_message_are_the_callers_fault() -> None:
    async with running() as (_, _, channel):
        for kind, method in ((channel.unary_unary, "Detect"), (channel.unary_stream, "Subscribe")):
            call = kind(f"/sightline.v1.DetectionService/{method}")(b"\xff\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await (call if method == "Detect" else call.read())
            assert type(status.from_rpc_error(refused.value)) is InvalidInput
        await detect(channel)


async def test_giant_metadata_ends_its_call_only() -> None:
    async with running() as (_, _, channel):
        stub = detection_pb2_grpc.DetectionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Detect(detection_pb2.DetectRequest(), metadata=(("x-giant", "a" * 200_000),), timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await detect(channel)


@pytest.mark.parametrize("secure", [True, False])
async def test_a_connection_that_does_not_get_on_is_closed_and_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 1.0)
    authority = Authority(tmp_path)
    flags = authority.server_settings() if secure else {}
    async with running(**flags) as (server, _, plain):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\x16" if secure else b"PRI * HT")
        credentials = authority.credentials(authority.client(EDGE)) if secure else None
        async with tls.open_channel(f"localhost:{server.port}", credentials, max_message_bytes=1 << 20) as channel:
            await detect(channel if secure else plain)
        async with asyncio.timeout(20):
            await reader.read()  # what it says, to its end
            assert reader.at_eof()
        writer.close()


async def test_connections_are_bounded() -> None:
    async with running(max_connections=2) as (server, _, channel):
        await detect(channel)
        held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
        ended = [asyncio.create_task(reader.read()) for reader, _ in held]
        async with asyncio.timeout(8):  # before their time is over
            while sum(task.done() for task in ended) < 5:
                await asyncio.wait([task for task in ended if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        await detect(channel)
        for task in ended:
            task.cancel()
        for _, writer in held:
            writer.close()
