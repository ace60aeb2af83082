"""`sightline admin` against a real edge on its admin port."""

import asyncio
from pathlib import Path

import grpc
import pytest
from sightline.v1 import edge_pb2

from edge.control import Control
from edge.server import Edge
from shared.errors import InvalidSettings
from tests.cli.conftest import Ended, Sightline
from tests.edge.conftest import RunningEdge, running_edge, small_jpeg, small_rgb

__all__ = ["running_edge", "small_jpeg", "small_rgb"]


async def test_an_operator_sees_pauses_and_bounds_cameras_and_it_outlives_a_restart(
    running_edge: RunningEdge,
    sightline: Sightline,
    small_jpeg: bytes,
) -> None:
    async def admin(edge: Edge, *words: object) -> Ended:
        address = f"127.0.0.1:{edge.server.admin_port}"
        return await asyncio.to_thread(sightline, "admin", "--address", address, *words)

    def request(camera: str, **rate: float) -> edge_pb2.CompressRequest:
        return edge_pb2.CompressRequest(
            camera_id=camera,
            encoded=small_jpeg,
            options=edge_pb2.CompressOptions(**rate),  # type: ignore[arg-type]
        )

    async with running_edge(admin_listen="127.0.0.1:0") as (edge, stub):
        await stub.Compress(request("door"))
        assert (await admin(edge, "pause", "yard")).out == "yard paused\n"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Compress(request("yard"))
        assert (refused.value.code(), "is paused" in str(refused.value.details())) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            True,
        )
        assert (await admin(edge, "quality", 2, 3)).out == "2 3\n"
        assert (await admin(edge, "pause", "no such name")).code == 1
        assert (await admin(edge, "quality", 5, 2)).code == 2
        assert "uplink not connected" in (await admin(edge, "spool")).out
        shown = (await admin(edge, "cameras")).out.splitlines()
        assert [line.split()[0] for line in shown] == ["door", "yard"]
        assert (shown[0].split()[1], shown[1]) == ("1", "yard 0 not seen paused")
        assert (await admin(edge, "bundles")).out.endswith("detection default\n")
    async with running_edge(admin_listen="127.0.0.1:0") as (edge, stub):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Compress(request("yard"))
        for asked, got in (({"quality": 1.0}, 2.0), ({"quality": 8.0}, 3.0), ({"quality": 2.5}, 2.5),
                           ({"target_bytes": 10**6}, 3.0), ({"target_bytes": 1}, 2.0)):  # fmt: skip
            assert (await stub.Compress(request("door", **asked))).receipt.quality == got
        assert (await admin(edge, "resume", "yard")).code == 0
        await stub.Compress(request("yard"))
        assert (await admin(edge, "uploads")).code == 1  # an edge has none
    assert (await asyncio.to_thread(sightline, "admin", "--address", "127.0.0.1:1", "cameras")).code == 1


def test_a_control_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    Control(path, 10).pause("door")
    path.write_text(path.read_text()[:-3])
    with pytest.raises(InvalidSettings, match="paused cameras"):
        Control(path, 10)
