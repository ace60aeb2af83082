"""Certificates, their authority and the policy are renewed under load: nothing restarts and no frame is lost."""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shared.rpc import tls
from shared.rpc.certificates import Names, Pair
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import RunningCloud
from tests.edge.conftest import RunningEdge
from tests.security.load import WAIT_S, Camera, require_nothing_lost
from tests.shared.authority import EDGE, Authority

CAMERA = "spiffe://example.org/camera"
POLICY = f"""
[[grant]]
identity = "{CAMERA}"
send = ["gate-*"]
[[grant]]
identity = "{EDGE}"
send = ["gate-*"]
"""


class Files:
    """What both services and the edge's uplink read, and who signs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "certs"
        self.policy = folder / "policy.toml"
        self.policy.write_text(POLICY)
        self.signer = Authority(self.folder)
        self.issue()

    def issue(self) -> None:
        """New certificates for servers, uplink and camera, by the signer of now."""
        self.signer.issue("server", Names("server", dns=["localhost"], ip=["127.0.0.1"]))
        self.signer.issue("uplink", Names("uplink", uri=[EDGE]))
        self.camera: Pair = self.signer.client(CAMERA)

    def trust(self, *authorities: Authority) -> None:
        path = self.folder / "ca.pem"
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(each.pair.certificate for each in authorities))
        partial.replace(path)

    def server(self) -> dict[str, Any]:
        return {
            "tls_certificate": self.folder / "server.pem",
            "tls_key": self.folder / "server.key",
            "tls_client_ca": self.folder / "ca.pem",
            "policy": self.policy,
        }

    def uplink(self, port: int) -> dict[str, Any]:
        return {
            "cloud": f"localhost:{port}",
            "cloud_ca": self.folder / "ca.pem",
            "cloud_certificate": self.folder / "uplink.pem",
            "cloud_key": self.folder / "uplink.key",
        }

    def camera_channel(self, port: int, own: Pair | None = None) -> grpc.aio.Channel:
        own = own or self.camera
        authority = (self.folder / "ca.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(authority, own.key, own.certificate)
        return tls.open_channel(f"localhost:{port}", credentials, max_message_bytes=1 << 24)


async def another_stream(cloud: RunningCloud, before: set[object]) -> None:
    """Waits until the edge sends over a stream that is not one of those before."""
    async with asyncio.timeout(WAIT_S):
        while not any(stream.frames for stream in cloud.ingest.streams if stream not in before):
            await cloud.log.wait_beyond(cloud.log.newest)


async def test_everything_is_renewed_under_load_and_no_frame_is_lost(
    tmp_path: Path, start_cloud: StartCloud, running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    files = Files(tmp_path)
    old = files.signer
    cloud = await start_cloud(**files.server())
    async with running_edge(**files.server(), **files.uplink(cloud.server.port)) as (edge, _):
        ports = (edge.server.port, cloud.server.port)
        camera = Camera(lambda: files.camera_channel(edge.server.port), small_jpeg)

        async def change(what: Callable[[], None]) -> None:
            before: set[object] = set(cloud.ingest.streams)
            what()
            await another_stream(cloud, before)
            await camera.more()

        async with camera.sending():
            await camera.more()
            await another_stream(cloud, set())
            first = [await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port)) for port in ports]

            await change(files.issue)  # every certificate, by the same authority
            second = [await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port)) for port in ports]
            assert not set(first) & set(second)

            # The authority: both are trusted, then the new one signs, then the old one is forgotten.
            new = Authority(tmp_path / "new")
            await change(lambda: files.trust(old, new))
            new.folder, files.signer = files.folder, new
            await change(files.issue)
            await change(lambda: files.trust(new))

            files.policy.write_text(POLICY.replace("gate-*", "*"))
            reloads = edge.server.reload_metrics.reloads
            async with asyncio.timeout(WAIT_S):
                while not reloads.labels("policy", "used")._value.get():
                    await camera.more(1)
            async with files.camera_channel(edge.server.port, old.client(CAMERA)) as forgotten:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await camera.one(forgotten)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await require_nothing_lost(cloud, camera)
        assert reloads.labels("client certificate", "used")._value.get() >= 4
        assert len(camera.receipts) >= 15


async def test_a_grant_that_is_taken_back_ends_the_upload_and_the_frames_stay_at_the_edge(
    tmp_path: Path, start_cloud: StartCloud, running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    files = Files(tmp_path)
    at_the_cloud = tmp_path / "cloud.toml"
    at_the_cloud.write_text(POLICY)
    cloud = await start_cloud(**{**files.server(), "policy": at_the_cloud})
    async with running_edge(**files.server(), **files.uplink(cloud.server.port)) as (edge, _):
        camera = Camera(lambda: files.camera_channel(edge.server.port), small_jpeg)
        async with camera.sending():
            await another_stream(cloud, set())
            at_the_cloud.write_text(POLICY.replace(EDGE, "spiffe://example.org/nobody"))
            async with asyncio.timeout(WAIT_S):
                while cloud.ingest.streams:  # noqa: ASYNC110 - each picture of the camera is a chance to be refused
                    await asyncio.sleep(0.05)
            await camera.more()
            at_the_cloud.write_text(POLICY)
            await another_stream(cloud, set())
        await require_nothing_lost(cloud, camera)
