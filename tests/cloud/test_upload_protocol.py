"""Breaking the upload protocol ends the stream with a typed error, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from sightline.v1 import ingest_pb2, ingest_pb2_grpc

from shared.codec.types import Bitstream
from tests.cloud.harness import RunningCloud

StartCloud = Callable[..., Awaitable[RunningCloud]]


def hello(**changes: Any) -> ingest_pb2.UploadRequest:
    fields: dict[str, Any] = {"protocol_version": 1, "edge_id": "edge"}
    return ingest_pb2.UploadRequest(hello=ingest_pb2.Hello(**(fields | changes)))


def request(**message: Any) -> ingest_pb2.UploadRequest:
    return ingest_pb2.UploadRequest(**message)


def source(index: int = 0, camera_id: str = "gate", epoch: int = 1) -> ingest_pb2.UploadRequest:
    return request(source=ingest_pb2.SourceAnnouncement(index=index, camera_id=camera_id, epoch=epoch))


def model(index: int = 0, model_id: str = "0" * 64) -> ingest_pb2.UploadRequest:
    return request(model=ingest_pb2.ModelAnnouncement(index=index, model_id=model_id))


FRAME = request(frame=ingest_pb2.FrameUpload())


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([FRAME], "hello"),
        ([request()], "hello"),
        ([hello(), hello()], "announcement"),
        ([hello(), request()], "announcement"),
        ([hello(edge_id="")], "edge_id"),
        ([hello(edge_id="a b")], "edge_id"),
        ([hello(), FRAME], "source index 0"),
        ([hello(), source(), FRAME], "model index 0"),
        ([hello(), source(camera_id="")], "camera id"),
        ([hello(), source(camera_id="x" * 65)], "camera id"),
        ([hello(), source(camera_id="a\nb")], "camera id"),
        ([hello(), source(index=65_536)], "below 65536"),
        ([hello(), source(), source(epoch=2)], "source index 0 stands for"),
        ([hello(), model(model_id="xyz")], "64 hex"),
        ([hello(), model(index=256)], "below 256"),
        ([hello(), model(), model(model_id="1" * 64)], "model index 0 stands for"),
        ([hello(), source(), request(tombstone=ingest_pb2.FrameTombstone(outcome=1))], "outcome"),
        ([hello(), request(tombstone=ingest_pb2.FrameTombstone(outcome=4))], "source index 0"),
    ],
)
async def test_breaking_the_protocol_ends_the_stream_with_invalid_argument(
    cloud: RunningCloud, messages: list[ingest_pb2.UploadRequest], said: str
) -> None:
    call = ingest_pb2_grpc.IngestServiceStub(cloud.channel()).Upload(iter_async(messages))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_to_end(call), 60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert said in (caught.value.details() or "")


async def iter_async(messages: list[ingest_pb2.UploadRequest]) -> Any:
    for message in messages:
        yield message
    await asyncio.Event().wait()  # does not half-close


async def read_to_end(call: Any) -> None:
    async for _ in call:
        pass


async def test_another_protocol_version_is_refused_as_a_failed_precondition(cloud: RunningCloud) -> None:
    call = ingest_pb2_grpc.IngestServiceStub(cloud.channel()).Upload(iter_async([hello(protocol_version=2)]))
    with pytest.raises(grpc.aio.AioRpcError, match="version 1") as caught:
        await asyncio.wait_for(read_to_end(call), 60)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_frames_beyond_the_credit_break_the_protocol(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(stream_credit_frames=2)
    cloud.spot.seconds_a_batch = 0.5
    async with cloud.edge() as edge:
        for seq in range(3):
            await edge.send_without_credit("gate", seq, spot)
        await edge.call.code()
        assert await edge.call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "credit" in await edge.call.details()


async def test_a_stream_that_ends_without_a_word_ends_well(cloud: RunningCloud) -> None:
    call = ingest_pb2_grpc.IngestServiceStub(cloud.channel()).Upload()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK
