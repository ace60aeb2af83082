"""One trace a frame, recorded by a running edge and a running cloud, received by an OpenTelemetry collector."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from sightline.v1 import edge_pb2, edge_pb2_grpc

from edge.server import Edge
from edge.settings import EdgeSettings
from shared import tracing
from shared.codec.codec import Codec
from shared.logs import frame_id
from shared.tracing import sampled
from tests.cloud.harness import BrightSpot, RunningCloud, settings, spot_frame
from tests.test_end_to_end import jpeg, request

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """The receiving end of OTLP: keeps spans by service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        self._news = threading.Condition()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._news:
            for each in request.resource_spans:
                about = {item.key: item.value.string_value for item in each.resource.attributes}
                self.spans += [(about["service.name"], span) for scope in each.scope_spans for span in scope.spans]
            self._news.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> tuple[str, trace_pb2.Span]:
        return next(each for each in self.spans if each[1].name == name)


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(0)


async def test_a_frame_has_one_trace_across_both_services(
    collector: tuple[Collector, str], codec: Codec, tmp_path: Path
) -> None:
    spans, endpoint = collector
    cloud = await RunningCloud(settings(tmp_path / "cloud", trace_endpoint=endpoint), [codec], BrightSpot()).start()
    edge = await Edge.start(
        EdgeSettings.load(
            listen="127.0.0.1:0",
            metrics_listen="",
            data_dir=tmp_path / "edge",
            cloud=f"127.0.0.1:{cloud.server.port}",
            trace_endpoint=endpoint,
        )
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.server.port}") as channel:
            ask = request("gate", jpeg(spot_frame()), edge_pb2.DELIVERY_PERSISTED)
            call = edge_pb2_grpc.EdgeServiceStub(channel).Compress(ask, metadata=(("traceparent", CALLER),))
            receipt = (await call).receipt
    finally:
        await edge.close()  # sends what waits
        await cloud.stop()
    name = frame_id(receipt.frame.camera_id, receipt.frame.epoch, receipt.frame.seq)
    assert {span.trace_id for _, span in spans.spans} == {spans.spans[0][1].trace_id}
    side, first = spans.named(tracing.FIRST_SPAN)
    assert (side, first.parent_span_id) == ("sightline-edge", b"")
    assert first.links[0].trace_id.hex() == CALLER.split("-")[1]
    side, seen = spans.named("cloud.frame")
    assert (side, seen.parent_span_id) == ("sightline-cloud", first.span_id)
    for span in (first, seen):
        assert {item.key: item.value.string_value for item in span.attributes}["sightline.frame"] == name
        children = [child for _, child in spans.spans if child.parent_span_id == span.span_id and child != seen]
        assert all(
            span.start_time_unix_nano
            <= child.start_time_unix_nano
            <= child.end_time_unix_nano
            <= span.end_time_unix_nano
            for child in children
        )
    found = {span.name for _, span in spans.spans}
    assert found >= {"edge.image", "edge.analyse", "edge.pack", "edge.spool", "cloud.unpack", "cloud.task", "cloud.log"}


async def test_a_collector_that_is_away_costs_no_frame(codec: Codec, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:1"
    cloud = await RunningCloud(settings(tmp_path, trace_endpoint=nobody), [codec], BrightSpot()).start()
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, codec.encode(spot_frame()))
    assert len(await cloud.events()) == 1
    await cloud.stop()


def test_both_sides_choose_the_same_frames_and_about_as_many_as_asked_for() -> None:
    ids = [tracing.hashlib.sha256(f"gate/00/{i}".encode()).digest()[:16] for i in range(2000)]
    chosen = [trace_id for trace_id in ids if sampled(trace_id, 0.25)]
    assert 400 < len(chosen) < 600
    assert all(sampled(trace_id, 1.0) for trace_id in ids)
    assert not any(sampled(trace_id, 0.0) for trace_id in ids)
