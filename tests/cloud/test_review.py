"""A frame once more for a person's eyes: from what the cloud kept, or again from an edge that has the original."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from PIL import Image
from sightline.v1 import common_pb2, detection_pb2, ingest_pb2

from cloud.detections.log import FrameName
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.errors import NotFound
from shared.rpc.status import to_message
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import EPOCH, Edge, RunningCloud, spot_frame


def review(cloud: RunningCloud, seq: int, quality: float = 0, camera: str = "gate") -> "grpc.aio.UnaryUnaryCall":
    name = common_pb2.FrameName(camera_id=camera, epoch=EPOCH, seq=seq)
    return cloud.consumers().Review(
        detection_pb2.ReviewRequest(frame=name, quality=quality, return_bitstream=True), timeout=60
    )


async def refused(call: "grpc.aio.UnaryUnaryCall") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value.code(), failure.value.details() or ""


@asynccontextmanager
async def keeper(cloud: RunningCloud) -> AsyncIterator[Edge]:
    """An edge that says it keeps originals."""
    edge = Edge(cloud.channel(), cloud.model_id, "keeper")
    edge.hello.keeps_originals = True
    await edge.open()
    try:
        yield edge
    finally:
        edge.call.cancel()
        await asyncio.gather(edge.reading, return_exceptions=True)


async def test_the_picture_is_what_the_networks_saw(cloud: RunningCloud, spot: Bitstream, codec: Codec) -> None:
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
    async with asyncio.timeout(30):
        while await cloud.kept.find(FrameName("gate", EPOCH, 1)) is None:  # noqa: ASYNC110 - the writer's own thread
            await asyncio.sleep(0.01)
    seen = await review(cloud, 1)
    rgb = np.asarray(Image.open(io.BytesIO(seen.image_png)))
    assert np.abs(rgb.astype(int) - codec.decode(spot).rgb).max() <= 1
    assert (seen.width, seen.height, seen.quality, seen.model_id) == (64, 64, 8.0, spot.model_id)
    assert seen.bitstream == to_bytes(spot)


async def test_what_is_not_kept_is_said(start_cloud: StartCloud, spot: Bitstream) -> None:
    cloud = await start_cloud(review_max_bytes=0)
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        code, said = await refused(review(cloud, 1))
        assert (code, "is not kept" in said) == (grpc.StatusCode.NOT_FOUND, True)
        code, said = await refused(review(cloud, 1, 8.0))
        assert code == grpc.StatusCode.NOT_FOUND
        assert "keeps no originals; its operator can allow it" in said
        code, said = await refused(review(cloud, 2, 8.0))
        assert (code, "the log has no frame" in said) == (grpc.StatusCode.NOT_FOUND, True)
    async with asyncio.timeout(30):
        await cloud.ingest.until_idle()
    code, said = await refused(review(cloud, 1, 8.0))
    assert (code, "is not connected" in said) == (grpc.StatusCode.UNAVAILABLE, True)


async def test_the_request_travels_down_the_upload_stream_and_the_frame_comes_up_it(
    cloud: RunningCloud, codec: Codec
) -> None:
    coarse, fine = codec.encode(spot_frame(), 1), codec.encode(spot_frame(), 8)
    async with keeper(cloud) as edge:
        await edge.deliver("gate", 5, coarse)
        asking = asyncio.ensure_future(review(cloud, 5, 8.0))
        await edge.until(lambda: edge.asked)
        asked = edge.asked.pop()
        assert (asked.camera_id, asked.epoch, asked.seq, asked.quality_steps) == ("gate", EPOCH, 5, 2048)
        again = ingest_pb2.FrameAgain(request_id=asked.request_id, bitstream=to_bytes(fine))
        await edge.call.write(ingest_pb2.UploadRequest(again=again))
        seen = await asking
        assert seen.bitstream == to_bytes(fine)
        await edge.call.write(ingest_pb2.UploadRequest(again=again))  # nobody waits for it any more

        asking = asyncio.ensure_future(review(cloud, 5, 8.0))
        await edge.until(lambda: edge.asked)
        gone = ingest_pb2.FrameAgain(request_id=edge.asked.pop().request_id)
        gone.error.CopyFrom(to_message(NotFound("the original is gone")))
        await edge.call.write(ingest_pb2.UploadRequest(again=gone))
        assert await refused(asking) == (grpc.StatusCode.NOT_FOUND, "the original is gone")

        asking = asyncio.ensure_future(review(cloud, 5, 8.0))
        await edge.until(lambda: edge.asked)
    code, said = await refused(asking)  # the edge went away meanwhile
    assert (code, "the stream of edge keeper ended" in said) == (grpc.StatusCode.UNAVAILABLE, True)


async def test_one_edge_is_asked_for_few_frames_at_once(cloud: RunningCloud, spot: Bitstream) -> None:
    async with keeper(cloud) as edge:
        await edge.deliver("gate", 1, spot)
        asking = [asyncio.ensure_future(review(cloud, 1, 8.0)) for _ in range(4)]
        await edge.until(lambda: len(edge.asked) == 4)
        code, said = await refused(review(cloud, 1, 8.0))
        assert (code, "try again later" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        for call in asking:
            call.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def test_a_damaged_answer_reaches_nobody_as_a_picture(cloud: RunningCloud, spot: Bitstream) -> None:
    async with keeper(cloud) as edge:
        await edge.deliver("gate", 1, spot)
        asking = asyncio.ensure_future(review(cloud, 1, 8.0))
        await edge.until(lambda: edge.asked)
        damaged = bytearray(to_bytes(spot))
        damaged[len(damaged) // 2] ^= 1
        again = ingest_pb2.FrameAgain(request_id=edge.asked.pop().request_id, bitstream=bytes(damaged))
        await edge.call.write(ingest_pb2.UploadRequest(again=again))
        assert (await refused(asking))[0] == grpc.StatusCode.INVALID_ARGUMENT
