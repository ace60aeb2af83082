"""Whoever calls while the cloud's models still load is told so, and to call again: UNAVAILABLE, and nothing else."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from sightline.v1 import detection_pb2, detection_pb2_grpc, ingest_pb2, ingest_pb2_grpc

from cloud.ingest import IngestService
from cloud.metrics import CloudMetrics
from cloud.server import DETECTION, INGEST
from cloud.service import DetectionService
from shared.rpc.server import Server
from tests.cloud.harness import settings

HELLO = ingest_pb2.UploadRequest(hello=ingest_pb2.Hello(protocol_version=1, edge_id="edge"))
AT_ONCE = 20
TIMES = 10


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """A cloud whose ports are bound and whose services nothing has opened yet."""
    values, registry, draining = settings(tmp_path), CollectorRegistry(), asyncio.Event()
    metrics = CloudMetrics(registry)
    ingest = IngestService("loading", values.stream_limits, draining, metrics)
    detection = DetectionService(values.subscription_limits, values.max_subscribers, metrics)
    server = Server(
        values,
        {
            INGEST: lambda server: ingest_pb2_grpc.add_IngestServiceServicer_to_server(ingest, server),
            DETECTION: lambda server: detection_pb2_grpc.add_DetectionServiceServicer_to_server(detection, server),
        },
        registry=registry,
        draining=draining,
    )
    await server.start()
    yield server.port
    await server.close()


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


async def test_every_call_ends_as_unavailable_with_a_sentence(port: int, recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()  # what tests before this one in the same process left is theirs
    recwarn.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        upload = ingest_pb2_grpc.IngestServiceStub(channel)
        consumer = detection_pb2_grpc.DetectionServiceStub(channel)

        async def greet() -> None:
            call: Any = upload.Upload()
            await call.write(HELLO)
            await read_all(call)

        ended: Counter[tuple[str, str | None]] = Counter()

        async def note(call: Any) -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            ended[caught.value.code().name, caught.value.details()] += 1

        for _ in range(TIMES):
            await asyncio.gather(
                *(note(greet()) for _ in range(AT_ONCE)),
                note(upload.ListModels(ingest_pb2.ListModelsRequest())),
                note(read_all(consumer.Subscribe(detection_pb2.SubscribeRequest()))),
                note(consumer.Detect(detection_pb2.DetectRequest(bitstream=bytes(100_000)))),
                note(consumer.Review(detection_pb2.ReviewRequest())),
            )
        sentence = "the models are still loading; call again in a moment"
        assert ended == {("UNAVAILABLE", sentence): TIMES * (AT_ONCE + 4)}
    gc.collect()  # a coroutine that was never awaited is told of when it is freed
    assert [str(warning.message) for warning in recwarn] == []
