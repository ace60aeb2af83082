"""EdgeService over real gRPC: pictures become receipts, bad input a status, and the next frame is served."""

import asyncio
import io
import struct
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from PIL import Image
from sightline.v1 import common_pb2, edge_pb2

from edge.server import Edge
from shared.codec.bitstream import from_bytes
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.rpc.status import from_rpc_error
from tests.edge.conftest import RunningEdge

Request = edge_pb2.CompressRequest
Options = edge_pb2.CompressOptions


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def raw(pixel_format: int, width: int, height: int, length: int) -> Request:
    image = edge_pb2.RawImage(pixel_format=pixel_format, width=width, height=height, data=bytes(length))  # type: ignore[arg-type]
    return Request(raw=image)


async def compress(stub: Any, request: Request) -> edge_pb2.Receipt:
    return (await stub.Compress(request, timeout=60)).receipt


async def test_a_picture_becomes_a_receipt_and_a_bitstream_that_decodes(
    running_edge: RunningEdge, small_jpeg: bytes, codec: Codec
) -> None:
    async with running_edge() as (_, stub):
        receipt = await compress(stub, Request(encoded=small_jpeg, options=Options(quality=6, return_bitstream=True)))
    assert receipt.state == edge_pb2.RECEIPT_STATE_ENCODED
    assert not receipt.HasField("frame")
    assert (receipt.width, receipt.height, receipt.quality) == (96, 72, 6.0)
    assert receipt.model_id == codec.model_id
    assert receipt.coded_bytes == len(receipt.bitstream)
    assert receipt.bits_per_pixel == pytest.approx(8 * len(receipt.bitstream) / (96 * 72))
    frame = codec.decode(from_bytes(receipt.bitstream, [codec.model_id]))
    assert (frame.width, frame.height) == (96, 72)
    timings = receipt.timings
    stages = timings.image_decode_ms + timings.queue_ms + timings.analyse_ms + timings.pack_ms
    assert 0 < stages <= timings.total_ms
    assert timings.spool_ms == timings.deliver_ms == 0


async def test_every_input_form_of_one_picture_gives_the_same_bitstream(
    running_edge: RunningEdge, small_rgb: np.ndarray, codec: Codec
) -> None:
    out = io.BytesIO()
    Image.fromarray(small_rgb).save(out, "PNG")
    lossless = io.BytesIO()
    Image.fromarray(small_rgb).save(lossless, "WEBP", lossless=True)
    forms = [
        Request(encoded=out.getvalue()),
        Request(encoded=lossless.getvalue()),
        *(
            Request(raw=edge_pb2.RawImage(pixel_format=layout, width=96, height=72, data=pixels.tobytes()))
            for layout, pixels in (
                (edge_pb2.PIXEL_FORMAT_RGB24, small_rgb),
                (edge_pb2.PIXEL_FORMAT_BGR24, small_rgb[:, :, ::-1]),
            )
        ),
    ]
    streams = set()
    async with running_edge() as (_, stub):
        for request in forms:
            request.options.return_bitstream = True
            streams.add((await compress(stub, request)).bitstream)
        grey = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 96, 72, 96 * 72)
        nv12 = raw(edge_pb2.PIXEL_FORMAT_NV12, 96, 72, 96 * 72 * 3 // 2)
        assert (await compress(stub, grey)).width == (await compress(stub, nv12)).width == 96
    assert len(streams) == 1
    (stream,) = streams
    # No smaller and no larger than the codec itself makes it.
    own = codec.encode(Frame(small_rgb), 4.0)
    assert abs(len(own.latents) + len(own.hyper) - len(stream)) < 64


async def test_target_bytes_are_kept_where_they_can_be(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge() as (_, stub):
        full = await compress(stub, Request(encoded=small_jpeg, options=Options(quality=8)))
        least = await compress(stub, Request(encoded=small_jpeg, options=Options(quality=1)))
        target = (full.coded_bytes + least.coded_bytes) // 2
        fitted = await compress(stub, Request(encoded=small_jpeg, options=Options(target_bytes=target)))
        tiny = await compress(stub, Request(encoded=small_jpeg, options=Options(target_bytes=1)))
    assert fitted.coded_bytes <= target
    assert 1 < fitted.quality < 8
    assert (tiny.quality, tiny.coded_bytes) == (1.0, least.coded_bytes)


BAD = {
    "no picture": (Request(), "INVALID_ARGUMENT", "expected a picture in `encoded` or `raw`, got neither"),
    "empty": (Request(encoded=b""), "INVALID_ARGUMENT", "got 0 bytes"),
    "not an image": (Request(encoded=b"hello"), "INVALID_ARGUMENT", "expected a JPEG, PNG or WebP file"),
    "another format": (Request(encoded=b"GIF89a" + bytes(50)), "INVALID_ARGUMENT", "got a GIF file"),
    "zero-size": (Request(encoded=png_header(0, 4)), "INVALID_ARGUMENT", "at least 1x1 pixels, got 0x4"),
    "only a header": (Request(encoded=png_header(4, 4)), "INVALID_ARGUMENT", "cannot be decoded"),
    "bomb": (Request(encoded=png_header(60000, 60000)), "RESOURCE_EXHAUSTED", "at most 8192 pixels, got 60000x60000"),
    "too many pixels": (Request(encoded=png_header(8000, 8000)), "RESOURCE_EXHAUSTED", "at most 40000000 pixels"),
    "raw without format": (raw(0, 4, 4, 48), "INVALID_ARGUMENT", "expected a pixel_format out of"),
    "raw of unknown format": (raw(77, 4, 4, 48), "INVALID_ARGUMENT", "got 77"),
    "raw too short": (raw(1, 4, 4, 47), "INVALID_ARGUMENT", "expected 48 bytes for RGB24 of 4x4 pixels, got 47"),
    "raw too long": (raw(4, 4, 4, 17), "INVALID_ARGUMENT", "expected 16 bytes for GRAY8"),
    "raw of no size": (raw(1, 0, 4, 0), "INVALID_ARGUMENT", "at least 1x1 pixels"),
    "raw too large": (raw(4, 9000, 1, 9000), "RESOURCE_EXHAUSTED", "at most 8192 pixels, got 9000x1"),
    "odd NV12": (raw(3, 3, 3, 13), "INVALID_ARGUMENT", "expected even sides for NV12"),
    "quality too high": ({"quality": 8.01}, "INVALID_ARGUMENT", "quality must be in [1, 8], got 8.01"),
    "quality too low": ({"quality": 0.0}, "INVALID_ARGUMENT", "quality must be in [1, 8], got 0.0"),
    "quality that is no number": ({"quality": float("nan")}, "INVALID_ARGUMENT", "quality must be in [1, 8]"),
    "no bytes": ({"target_bytes": 0}, "INVALID_ARGUMENT", "target_bytes must be at least 1"),
    "unknown model": ({"model_id": "no-such"}, "FAILED_PRECONDITION", "out of detection"),
    "unknown delivery": ({"delivery": 9}, "INVALID_ARGUMENT", "delivery must be one of"),
    "bad wait": ({"max_wait": Duration(seconds=-1)}, "INVALID_ARGUMENT", "max_wait must be more than 0"),
    "waiting for no cloud": ({"delivery": 3}, "UNAVAILABLE", "needs a cloud"),
    "bad camera": (Request(camera_id="a/b"), "INVALID_ARGUMENT", "camera_id must be 1 to 64 characters"),
    "long camera": (Request(camera_id="a" * 65), "INVALID_ARGUMENT", "camera_id must be 1 to 64 characters"),
    "long token": (Request(idempotency_token="é" * 65), "INVALID_ARGUMENT", "at most 128 bytes, got 130"),
    "bad time": (Request(capture_time=Timestamp(seconds=-5)), "INVALID_ARGUMENT", "capture_time must be"),
}


def bad_request(case: str, jpeg: bytes) -> tuple[Request, str, str]:
    what, code, sentence = BAD[case]
    if isinstance(what, dict):
        return Request(encoded=jpeg, options=Options(**what)), code, sentence
    return what, code, sentence


async def test_bad_input_gets_a_status_and_a_sentence_and_the_next_frame_is_served(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    async with running_edge() as (_, stub):
        for case in BAD:
            request, code, sentence = bad_request(case, small_jpeg)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await compress(stub, request)
            assert (caught.value.code().name, sentence in str(caught.value.details())) == (code, True), case
            assert type(from_rpc_error(caught.value)).status == code
            assert (await compress(stub, Request(encoded=small_jpeg))).width == 96


async def test_a_truncated_picture_is_invalid(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge() as (_, stub):
        for length in (3, 20, len(small_jpeg) // 2, len(small_jpeg) - 40):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await compress(stub, Request(encoded=small_jpeg[:length]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "expected a whole JPEG file" in str(caught.value.details())


async def test_a_message_over_the_limit_is_refused(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge(max_message_bytes="64KiB") as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compress(stub, Request(encoded=bytes(100_000)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await compress(stub, Request(encoded=small_jpeg))).width == 96


async def test_a_stream_answers_every_picture_and_outlives_bad_ones(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    cases = list(BAD)

    async def requests() -> AsyncIterator[edge_pb2.CompressStreamRequest]:
        for number in range(2 * len(cases)):
            good = Request(encoded=small_jpeg, options=Options(delivery=edge_pb2.DELIVERY_SPOOLED))
            request = bad_request(cases[number // 2], small_jpeg)[0] if number % 2 else good
            yield edge_pb2.CompressStreamRequest(request_id=number, request=request)

    async with running_edge(stream_window=4) as (_, stub):
        answers = {answer.request_id: answer async for answer in stub.CompressStream(requests())}
    assert sorted(answers) == list(range(2 * len(cases)))
    for number, answer in answers.items():
        if number % 2 == 0:
            assert answer.receipt.state == edge_pb2.RECEIPT_STATE_SPOOLED
        else:
            _, code, sentence = bad_request(cases[number // 2], small_jpeg)
            assert answer.error.code == grpc.StatusCode[code].value[0]
            assert sentence in answer.error.message
    seqs = [answers[number].receipt.frame.seq for number in sorted(answers) if number % 2 == 0]
    assert sorted(seqs) == list(range(1, len(cases) + 1))


async def test_frames_that_wait_together_are_coded_together_and_come_out_the_same(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    request = Request(encoded=small_jpeg, options=Options(return_bitstream=True))
    async with running_edge(batch_frames=4) as (edge, stub):
        alone = await compress(stub, request)
        together = await asyncio.gather(*(compress(stub, request) for _ in range(24)))
        text = await metrics(edge)
    assert {receipt.bitstream for receipt in together} == {alone.bitstream}
    assert value(text, 'sightline_edge_batch_frames_bucket{le="1.0"}') < 25
    assert value(text, 'sightline_edge_batch_frames_bucket{le="4.0"}') == value(
        text, "sightline_edge_batch_frames_count"
    )


async def test_frames_of_a_camera_are_spooled_as_they_came_whichever_is_coded_first(running_edge: RunningEdge) -> None:
    options = Options(delivery=edge_pb2.DELIVERY_SPOOLED)

    async def requests() -> AsyncIterator[edge_pb2.CompressStreamRequest]:
        for number in range(12):
            side = 16 if number % 3 else 640  # the small ones overtake
            request = raw(edge_pb2.PIXEL_FORMAT_GRAY8, side, side, side * side)
            request.options.CopyFrom(options)
            yield edge_pb2.CompressStreamRequest(request_id=number, request=request)

    async with running_edge(lanes=4) as (_, stub):
        answers = [answer async for answer in stub.CompressStream(requests())]
    assert {answer.request_id: answer.receipt.frame.seq for answer in answers} == {n: n + 1 for n in range(12)}


async def test_what_has_no_room_is_refused_at_once_but_a_stream_waits(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    large = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 640, 480, 640 * 480)  # 1.2 MB in work

    async def requests() -> AsyncIterator[edge_pb2.CompressStreamRequest]:
        for number in range(6):
            yield edge_pb2.CompressStreamRequest(request_id=number, request=large)

    async with running_edge(in_flight_max_bytes="1MiB") as (edge, stub):
        results = await asyncio.gather(*(compress(stub, large) for _ in range(4)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert 1 <= len(refused) < 4
        assert all(error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for error in refused)
        assert "are in work; try again later" in str(refused[0].details())
        answers = [answer async for answer in stub.CompressStream(requests())]
        assert [answer.WhichOneof("result") for answer in answers] == ["receipt"] * 6
        assert edge.engine.in_flight_bytes == 0


async def test_a_camera_that_hangs_up_frees_its_room(running_edge: RunningEdge) -> None:
    large = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 640, 480, 640 * 480)
    async with running_edge() as (edge, stub):
        calls = [stub.Compress(large) for _ in range(4)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        assert (await compress(stub, large)).width == 640
        assert edge.engine.in_flight_bytes == 0


async def test_a_spooled_receipt_names_a_frame_that_is_on_the_disk(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    options = Options(delivery=edge_pb2.DELIVERY_SPOOLED, return_bitstream=True, max_age=Duration(seconds=60))
    async with running_edge() as (_, stub):
        receipts = [
            await compress(
                stub,
                Request(
                    camera_id=f"cam:{n % 2}",
                    encoded=small_jpeg,
                    options=options,
                    capture_time=Timestamp(seconds=1_900_000_000),
                ),
            )
            for n in range(4)
        ]
    async with running_edge() as (edge, _):
        entries = await edge.spool.take(0, frames=10, max_bytes=1 << 30)
    assert [receipt.state for receipt in receipts] == [edge_pb2.RECEIPT_STATE_SPOOLED] * 4
    assert all(receipt.timings.spool_ms > 0 for receipt in receipts)
    names = [(r.frame.camera_id, r.frame.epoch, r.frame.seq) for r in receipts]
    assert names == [(e.name.camera_id, e.name.epoch, e.name.seq) for e in entries]
    assert [name[2] for name in names] == [1, 1, 2, 2]
    for receipt, entry in zip(receipts, entries, strict=True):
        assert entry.bitstream == from_bytes(receipt.bitstream, [receipt.model_id])
        assert entry.captured_us == 1_900_000_000_000_000
        assert entry.expires_us == entry.captured_us + 60_000_000


async def test_a_retry_with_its_token_gets_the_first_frames_name(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    options = Options(delivery=edge_pb2.DELIVERY_SPOOLED)
    request = Request(encoded=small_jpeg, options=options, idempotency_token="shot-1")
    async with running_edge() as (edge, stub):
        first, *others = await asyncio.gather(*(compress(stub, request) for _ in range(4)))
        assert {receipt.frame.seq for receipt in (first, *others)} == {1}
        assert sum(receipt.duplicate for receipt in (first, *others)) == 3
        other = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 4, 4, 16)
        other.idempotency_token = "shot-1"
        other.options.CopyFrom(options)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compress(stub, other)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert len(await edge.spool.take(0, frames=10, max_bytes=1 << 30)) == 1


async def test_a_full_spool_is_told_and_encoding_goes_on(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge(spool_max_bytes="16MiB", max_cameras=1) as (_, stub):
        spooled = Options(delivery=edge_pb2.DELIVERY_SPOOLED)
        await compress(stub, Request(camera_id="a", encoded=small_jpeg, options=spooled))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compress(stub, Request(camera_id="b", encoded=small_jpeg, options=spooled))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await compress(stub, Request(camera_id="b", encoded=small_jpeg))).width == 96


async def test_a_frame_too_large_for_the_cloud_is_refused_before_it_is_spooled(running_edge: RunningEdge) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (448, 448), dtype=np.uint8)
    request = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 448, 448, 0)
    request.raw.data = noise.tobytes()
    request.options.CopyFrom(Options(quality=8, delivery=edge_pb2.DELIVERY_SPOOLED))
    async with running_edge() as (edge, stub):
        size = (await compress(stub, request)).coded_bytes
        edge.service._defaults = replace(edge.service._defaults, max_coded_bytes=size - 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compress(stub, request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"expected at most {size - 1} coded bytes" in str(caught.value.details())
        assert edge.spool.stats.frames == 1


async def test_waiting_for_the_cloud_ends_with_what_is_true_by_then(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    options = Options(delivery=edge_pb2.DELIVERY_PERSISTED, max_wait=Duration(nanos=300_000_000))
    async with running_edge(cloud="127.0.0.1:9") as (_, stub):  # nobody is there
        start = time.monotonic()
        receipt = await compress(stub, Request(encoded=small_jpeg, options=options))
    assert receipt.state == edge_pb2.RECEIPT_STATE_SPOOLED
    assert receipt.outcome == common_pb2.OUTCOME_UNSPECIFIED
    assert time.monotonic() - start < 30


async def test_draining_answers_what_a_stream_has_read_and_tells_the_rest(
    running_edge: RunningEdge, small_jpeg: bytes
) -> None:
    async with running_edge() as (edge, stub):
        call = stub.CompressStream()
        for number in range(3):
            request = Request(encoded=small_jpeg)
            await call.write(edge_pb2.CompressStreamRequest(request_id=number, request=request))
        responses = aiter(call)
        answers = [(await anext(responses)).request_id]
        drain = asyncio.create_task(edge.server.drain())
        try:
            async for answer in responses:
                answers.append(answer.request_id)
        except grpc.aio.AioRpcError as error:
            ended = error.code()
        assert ended is grpc.StatusCode.UNAVAILABLE
        assert len(answers) == len(set(answers))
        await asyncio.wait_for(drain, 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await compress(stub, Request(encoded=small_jpeg))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def metrics(edge: Edge) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{edge.server.metrics_port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)


def value(text: str, name: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + " "))


async def test_metrics_tell_stages_sizes_and_the_spool(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge() as (edge, stub):
        for number in range(3):
            options = Options(delivery=edge_pb2.DELIVERY_SPOOLED)
            await compress(stub, Request(camera_id=f"c{number}", encoded=small_jpeg, options=options))
        text = await metrics(edge)
    for stage in ("image", "queue", "analyse", "pack"):
        assert value(text, f'sightline_edge_encode_seconds_count{{stage="{stage}"}}') == 3
    assert value(text, "sightline_edge_frame_bytes_count") == 3
    assert value(text, "sightline_edge_bits_per_pixel_count") == 3
    assert value(text, "sightline_edge_spool_frames") == 3
    assert value(text, "sightline_edge_spool_oldest_age_seconds") > 0
    assert value(text, "sightline_edge_uplink_connected") == 0
    assert value(text, 'sightline_edge_frames_total{camera="c1",state="spooled"}') == 1
    assert "sightline_edge_model_info{" in text


async def test_a_strangers_camera_ids_cannot_grow_the_labels(running_edge: RunningEdge, small_jpeg: bytes) -> None:
    async with running_edge() as (edge, stub):
        tiny = raw(edge_pb2.PIXEL_FORMAT_GRAY8, 1, 1, 1)
        for number in range(210):
            tiny.camera_id = f"stranger-{number}"
            await compress(stub, tiny)
        text = await metrics(edge)
    lines = [line for line in text.splitlines() if line.startswith("sightline_edge_frames_total")]
    assert len(lines) == 201
    assert value(text, 'sightline_edge_frames_total{camera="other",state="encoded"}') == 10
