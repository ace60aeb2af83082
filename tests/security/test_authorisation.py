"""The authorisation matrix: every method of the wire contract, called by everybody who may not and by the one who may.

Edge and cloud are the real ones with mTLS and a policy, on free ports. A method that is new and not in CALLS fails the
test, and one that the table of shared.rpc.access does not name is refused to everybody.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from sightline.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    detection_pb2,
    detection_pb2_grpc,
    edge_pb2,
    edge_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    quarantine_pb2,
    quarantine_pb2_grpc,
)

from shared.codec import bitstream as bits
from shared.codec.types import Bitstream
from shared.rpc import tls
from shared.rpc.certificates import Pair
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import Edge as HandMadeEdge
from tests.cloud.harness import RunningCloud
from tests.edge.conftest import RunningEdge
from tests.shared.authority import ADMIN, CONSUMER, EDGE, NOBODY, POLICY, Authority

OTHER_CAMERAS = "spiffe://example.org/other"
Codes = grpc.StatusCode
DENIED = {Codes.PERMISSION_DENIED}
NO_CONNECTION = {Codes.UNAVAILABLE}
CALLERS = ("no TLS", "no certificate", "wrong CA", "expired", "wrong camera or permission", "right")


@dataclass(frozen=True)
class Ports:
    edge: int
    edge_admin: int
    cloud: int
    cloud_admin: int


@dataclass(frozen=True)
class Context:
    """What calls need to be valid but for who makes them."""

    jpeg: bytes
    coded: Bitstream
    bundle: Path


Call = Callable[[grpc.aio.Channel, Context], Awaitable[grpc.StatusCode]]


def unary(stub: Any, method: str, request: Callable[[Context], Any]) -> Call:
    async def call(channel: grpc.aio.Channel, context: Context) -> grpc.StatusCode:
        await getattr(stub(channel), method)(request(context), timeout=60)
        return Codes.OK

    return call


async def compress_stream(channel: grpc.aio.Channel, context: Context) -> grpc.StatusCode:
    call = edge_pb2_grpc.EdgeServiceStub(channel).CompressStream(timeout=60)
    await call.write(edge_pb2.CompressStreamRequest(request_id=1, request=picture(context)))
    await call.done_writing()
    [response] = [each async for each in call]
    return by_number(response.error.code) if response.HasField("error") else Codes.OK


async def upload(channel: grpc.aio.Channel, context: Context) -> grpc.StatusCode:
    edge = HandMadeEdge(channel, context.coded.model_id, "edge")
    await edge.call.write(ingest_pb2.UploadRequest(hello=edge.hello))
    first = await edge.call.read()
    if first is grpc.aio.EOF:
        return await edge.call.code()
    edge.reading = asyncio.create_task(edge._read())
    answer = await edge.deliver("gate-1", 1, context.coded)
    await edge.call.done_writing()
    await edge.reading
    return {
        ingest_pb2.ACK_STATE_PERSISTED: Codes.OK,
        ingest_pb2.ACK_STATE_REJECTED: Codes.PERMISSION_DENIED,
    }[answer.state]


async def subscribe(channel: grpc.aio.Channel, _: Context) -> grpc.StatusCode:
    request = detection_pb2.SubscribeRequest(filter=detection_pb2.EventFilter(camera_ids=["gate-1"]))
    call = detection_pb2_grpc.DetectionServiceStub(channel).Subscribe(request, timeout=60)
    first = await call.read()
    if first is grpc.aio.EOF:
        return await call.code()
    assert first.progress.caught_up
    call.cancel()
    return Codes.OK


def picture(context: Context) -> edge_pb2.CompressRequest:
    return edge_pb2.CompressRequest(camera_id="gate-1", encoded=context.jpeg)


def by_number(number: int) -> grpc.StatusCode:
    return next(code for code in Codes if code.value[0] == number)


EDGE_STUB, CLOUD_STUB = edge_pb2_grpc.EdgeServiceStub, ingest_pb2_grpc.IngestServiceStub
EDGE_ADMIN, CLOUD_ADMIN = admin_pb2_grpc.EdgeAdminServiceStub, admin_pb2_grpc.CloudAdminServiceStub
BUNDLES = admin_pb2_grpc.BundleAdminServiceStub
BOUNDS = admin_pb2.SetQualityBoundsRequest(lowest=1, highest=8)
# Method -> (ports it is served on, who may call it, who has a certificate and may not, the call).
CALLS: dict[str, tuple[tuple[str, ...], str, str, Call]] = {
    "EdgeService/Compress": (("edge",), EDGE, OTHER_CAMERAS, unary(EDGE_STUB, "Compress", picture)),
    "EdgeService/CompressStream": (("edge",), EDGE, OTHER_CAMERAS, compress_stream),
    "IngestService/Upload": (("cloud",), EDGE, OTHER_CAMERAS, upload),
    "IngestService/ListModels": (
        ("cloud",), EDGE, NOBODY, unary(CLOUD_STUB, "ListModels", lambda _: ingest_pb2.ListModelsRequest()),
    ),
    "DetectionService/Subscribe": (("cloud",), CONSUMER, OTHER_CAMERAS, subscribe),
    "DetectionService/Detect": (
        ("cloud",), CONSUMER, EDGE,
        unary(
            detection_pb2_grpc.DetectionServiceStub, "Detect",
            lambda context: detection_pb2.DetectRequest(bitstream=bits.to_bytes(context.coded)),
        ),
    ),
    "DetectionService/Review": (
        ("cloud",), CONSUMER, OTHER_CAMERAS,
        unary(
            detection_pb2_grpc.DetectionServiceStub, "Review",
            lambda _: detection_pb2.ReviewRequest(frame=common_pb2.FrameName(camera_id="gate-1", epoch=1, seq=404)),
        ),
    ),
    "EdgeAdminService/ListCameras": (
        ("edge_admin",), ADMIN, EDGE, unary(EDGE_ADMIN, "ListCameras", lambda _: admin_pb2.ListCamerasRequest()),
    ),
    "EdgeAdminService/PauseCamera": (
        ("edge_admin",), ADMIN, EDGE,
        unary(EDGE_ADMIN, "PauseCamera", lambda _: admin_pb2.PauseCameraRequest(camera_id="gate-9")),
    ),
    "EdgeAdminService/ResumeCamera": (
        ("edge_admin",), ADMIN, EDGE,
        unary(EDGE_ADMIN, "ResumeCamera", lambda _: admin_pb2.ResumeCameraRequest(camera_id="gate-9")),
    ),
    "EdgeAdminService/GetSpool": (
        ("edge_admin",), ADMIN, EDGE, unary(EDGE_ADMIN, "GetSpool", lambda _: admin_pb2.GetSpoolRequest()),
    ),
    "EdgeAdminService/GetQualityBounds": (
        ("edge_admin",), ADMIN, EDGE,
        unary(EDGE_ADMIN, "GetQualityBounds", lambda _: admin_pb2.GetQualityBoundsRequest()),
    ),
    "EdgeAdminService/SetQualityBounds": (
        ("edge_admin",), ADMIN, EDGE, unary(EDGE_ADMIN, "SetQualityBounds", lambda _: BOUNDS),
    ),
    "CloudAdminService/ListUploads": (
        ("cloud_admin",), ADMIN, EDGE, unary(CLOUD_ADMIN, "ListUploads", lambda _: admin_pb2.ListUploadsRequest()),
    ),
    "CloudAdminService/ListConsumers": (
        ("cloud_admin",), ADMIN, EDGE,
        unary(CLOUD_ADMIN, "ListConsumers", lambda _: admin_pb2.ListConsumersRequest()),
    ),
    "BundleAdminService/ListBundles": (
        ("edge_admin", "cloud_admin"), ADMIN, EDGE,
        unary(BUNDLES, "ListBundles", lambda _: admin_pb2.ListBundlesRequest()),
    ),
    "BundleAdminService/LoadBundle": (
        ("edge_admin", "cloud_admin"), ADMIN, EDGE,
        unary(BUNDLES, "LoadBundle", lambda _: admin_pb2.LoadBundleRequest(reference="detection")),
    ),
    "BundleAdminService/RetireBundle": (
        ("edge_admin", "cloud_admin"), ADMIN, EDGE,
        unary(
            BUNDLES, "RetireBundle", lambda context: admin_pb2.RetireBundleRequest(model_id=context.coded.model_id)
        ),
    ),
    **{
        f"QuarantineService/{method}": (
            ("edge_admin", "cloud_admin"), ADMIN, EDGE,
            unary(
                quarantine_pb2_grpc.QuarantineServiceStub, method,
                lambda _, method=method: getattr(quarantine_pb2, f"{method}Request")(),  # type: ignore[misc]
            ),
        )
        for method in ("ListQuarantine", "FetchQuarantined", "ReplayQuarantined")
    },
}  # fmt: skip
# Calls whose right caller is told no for another reason: a service's last bundle cannot be retired, nothing is in
# quarantine, and the frame to review never was.
ENDS_OTHERWISE = {
    "BundleAdminService/RetireBundle": Codes.FAILED_PRECONDITION,
    "DetectionService/Review": Codes.NOT_FOUND,
    "QuarantineService/FetchQuarantined": Codes.NOT_FOUND,
    "QuarantineService/ReplayQuarantined": Codes.NOT_FOUND,
}


def test_the_matrix_has_every_method_of_the_contract() -> None:
    pool = descriptor_pool.Default()
    rooms = sorted(path.stem for path in (Path(__file__).parents[2] / "proto" / "sightline" / "v1").glob("*.proto"))
    contract = {
        f"{service.name}/{method.name}"
        for room in rooms
        for service in pool.FindFileByName(f"sightline/v1/{room}.proto").services_by_name.values()
        for method in service.methods
    }
    assert contract == set(CALLS)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs")


@pytest.fixture
def secured(tmp_path: Path, authority: Authority) -> dict[str, Any]:
    """Settings of a service with mTLS and a policy."""
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY + f'[[grant]]\nidentity = "{OTHER_CAMERAS}"\nsend = ["yard"]\nsubscribe = ["yard"]\n')
    return {**authority.server_settings(), "policy": policy, "admin_listen": "127.0.0.1:0"}


async def test_only_the_right_caller_gets_through(
    tmp_path: Path,
    authority: Authority,
    secured: dict[str, Any],
    start_cloud: StartCloud,
    running_edge: RunningEdge,
    small_jpeg: bytes,
    spot: Bitstream,
) -> None:
    stranger = Authority(tmp_path / "stranger", "of strangers")
    cloud: RunningCloud = await start_cloud(**secured)
    async with running_edge(**secured) as (edge, _):
        ports = Ports(edge.server.port, edge.server.admin_port, cloud.server.port, cloud.server.admin_port)
        context = Context(small_jpeg, spot, tmp_path)
        outcomes: dict[tuple[str, str, str], grpc.StatusCode] = {}
        for method, (served_on, right, wrong, call) in CALLS.items():
            owns: dict[str, grpc.ChannelCredentials | None] = {
                "no TLS": None,
                "no certificate": authority.credentials(None),
                "wrong CA": authority.credentials(stranger.client(right)),
                "expired": authority.credentials(authority.client(right, days=-1)),
                "wrong camera or permission": authority.credentials(authority.client(wrong)),
                "right": authority.credentials(authority.client(right)),
            }
            assert tuple(owns) == CALLERS
            for who, credentials in owns.items():
                for port in served_on:
                    outcomes[method, port, who] = await outcome(getattr(ports, port), credentials, call, context)
    wrong_ones = {
        key: code
        for key, code in outcomes.items()
        if code
        not in {
            "right": {ENDS_OTHERWISE.get(key[0], Codes.OK)},
            "wrong camera or permission": DENIED,
        }.get(key[2], NO_CONNECTION)
    }
    assert wrong_ones == {}
    assert len(outcomes) == 6 * sum(len(served_on) for served_on, *_ in CALLS.values())


async def test_the_admin_services_are_on_no_other_port(
    authority: Authority, secured: dict[str, Any], start_cloud: StartCloud, running_edge: RunningEdge
) -> None:
    cloud = await start_cloud(**secured)
    admin = authority.credentials(authority.client(ADMIN))
    context = Context(b"", None, Path())  # type: ignore[arg-type]
    async with running_edge(**secured) as (edge, _):
        for port, method in ((edge.server.port, "EdgeAdminService/ListCameras"),
                             (cloud.server.port, "CloudAdminService/ListUploads")):  # fmt: skip
            assert await outcome(port, admin, CALLS[method][3], context) is Codes.UNIMPLEMENTED
        health = "/grpc.health.v1.Health/Check"
        for port in (edge.server.admin_port, cloud.server.admin_port):
            async with tls.open_channel(f"127.0.0.1:{port}", admin, max_message_bytes=1 << 20) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(health)(health_pb2.HealthCheckRequest().SerializeToString())
                assert refused.value.code() is Codes.UNIMPLEMENTED


async def test_a_frame_for_anothers_camera_leaves_no_record_and_a_consumer_sees_its_own_cameras_only(
    authority: Authority, secured: dict[str, Any], start_cloud: StartCloud, spot: Bitstream
) -> None:
    cloud = await start_cloud(**secured)
    address = f"127.0.0.1:{cloud.server.port}"

    def channel(pair: Pair) -> grpc.aio.Channel:
        return tls.open_channel(address, authority.credentials(pair), max_message_bytes=1 << 24)

    async with channel(authority.client(EDGE)) as own, channel(authority.client(OTHER_CAMERAS)) as other:
        north, south = HandMadeEdge(own, spot.model_id, "north"), HandMadeEdge(other, spot.model_id, "south")
        await north.open()
        await south.open()
        refused = await south.deliver("gate-1", 1, spot)
        assert refused.reject_reason == ingest_pb2.REJECT_REASON_NOT_AUTHORISED
        assert (await south.deliver("yard", 1, spot)).state == ingest_pb2.ACK_STATE_PERSISTED
        assert (await north.deliver("gate-1", 1, spot)).state == ingest_pb2.ACK_STATE_PERSISTED
        assert [event.frame.camera_id for event in await cloud.events()] == ["yard", "gate-1"]
        assert cloud.metric("sightline_rpc_refused_total", reason="camera") == 1
    async with channel(authority.client(CONSUMER)) as consumer:
        request = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
        call = detection_pb2_grpc.DetectionServiceStub(consumer).Subscribe(request, timeout=60)
        seen = []
        async for message in call:
            if message.HasField("event"):
                seen.append(message.event.frame.camera_id)
            elif message.progress.caught_up:
                break
        assert seen == ["gate-1"]


async def outcome(
    port: int, credentials: grpc.ChannelCredentials | None, call: Call, context: Context
) -> grpc.StatusCode:
    async with tls.open_channel(f"127.0.0.1:{port}", credentials, max_message_bytes=1 << 24) as channel:
        try:
            return await call(channel, context)
        except grpc.aio.AioRpcError as error:
            return error.code()
