"""From bundle A to bundle B under load, whichever side goes first: no frame is lost and none cannot be decoded."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from sightline.v1 import admin_pb2, admin_pb2_grpc

import edge.uplink
from shared.codec.codec import Codec
from shared.rpc import tls
from tests.cloud.conftest import StartCloud
from tests.edge.conftest import RunningEdge
from tests.security.load import WAIT_S, Camera, require_nothing_lost


class Operator:
    """Calls the admin port of one service."""

    def __init__(self, port: int) -> None:
        self.channel = tls.open_channel(f"127.0.0.1:{port}", None, max_message_bytes=1 << 20)
        self._stub = admin_pb2_grpc.BundleAdminServiceStub(self.channel)

    async def load(self, folder: Path) -> str:
        request = admin_pb2.LoadBundleRequest(reference=str(folder), make_default=True)
        return (await self._stub.LoadBundle(request, timeout=WAIT_S)).bundle.model_id

    async def retire(self, model_id: str, within_s: float = WAIT_S) -> None:
        await self._stub.RetireBundle(admin_pb2.RetireBundleRequest(model_id=model_id), timeout=within_s)

    async def bundles(self) -> list[str]:
        answer = await self._stub.ListBundles(admin_pb2.ListBundlesRequest(), timeout=WAIT_S)
        return [each.model_id for each in answer.bundles]


@pytest.mark.parametrize("first", ["edge", "cloud"])
async def test_an_upgrade_under_load_loses_no_frame_in_either_order(
    first: str,
    codec: Codec,
    bundle_b: Path,
    start_cloud: StartCloud,
    running_edge: RunningEdge,
    small_jpeg: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge.uplink, "MODEL_PAUSE_S", 0.5)  # how soon the edge asks again for B
    cloud = await start_cloud(admin_listen="127.0.0.1:0")
    flags: dict[str, Any] = {"cloud": f"127.0.0.1:{cloud.server.port}", "admin_listen": "127.0.0.1:0"}
    async with running_edge(**flags) as (running, _):
        at_edge, at_cloud = Operator(running.server.admin_port), Operator(cloud.server.admin_port)
        order = (at_edge, at_cloud) if first == "edge" else (at_cloud, at_edge)
        camera = Camera(
            lambda: tls.open_channel(f"127.0.0.1:{running.server.port}", None, max_message_bytes=1 << 24), small_jpeg
        )
        a = codec.model_id
        async with camera.sending():
            await camera.more()
            for operator in order:
                b = await operator.load(bundle_b)
                await camera.more()
            assert await at_edge.bundles() == [b, a]
            with pytest.raises(grpc.aio.AioRpcError) as waiting:  # an edge that has A is connected
                await at_cloud.retire(a, within_s=0.5)
            assert waiting.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await at_edge.retire(a)
            await camera.more()
            await at_cloud.retire(a)
            await camera.more()
        await require_nothing_lost(cloud, camera)
        assert set(camera.receipts.values()) == {a, b}
        assert list(camera.receipts.values())[-1] == b
        assert (await at_edge.bundles(), await at_cloud.bundles()) == ([b], [b])
        with pytest.raises(grpc.aio.AioRpcError) as last:
            await at_edge.retire(b)
        assert last.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await asyncio.gather(at_edge.channel.close(), at_cloud.channel.close())
