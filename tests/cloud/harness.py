"""What the cloud's tests share: a cloud on a free port in this process, an edge that speaks Upload by hand, and a small
task model with a known right answer. Codec, log, batching and gRPC are the real ones.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sightline.v1 import common_pb2, detection_pb2, detection_pb2_grpc, ingest_pb2, ingest_pb2_grpc
from torch import Tensor

from cloud.admin import BundleAdmin
from cloud.console.server import Console, system_facts
from cloud.detections.opening import open_log
from cloud.inference import Inference
from cloud.ingest import IngestService
from cloud.kept import KeptFrames
from cloud.metrics import CloudMetrics
from cloud.pipeline import Pipeline
from cloud.quarantine import Quarantine
from cloud.replay import Replayer
from cloud.review import Reviewer
from cloud.server import DETECTION, INGEST, Watched, admin_services
from cloud.service import DetectionService
from cloud.settings import CloudSettings
from cloud.tasks.types import Detections, TaskKind
from shared import tracing
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from shared.quarantine import QuarantineService
from shared.rpc.frames import to_upload
from shared.rpc.server import Server

EPOCH = 0xFEDCBA9876543210
FINAL = (ingest_pb2.ACK_STATE_PERSISTED, ingest_pb2.ACK_STATE_REJECTED, ingest_pb2.ACK_STATE_RETRY_LATER)


class BrightSpot:
    """A task model that finds the box around what is bright: one "kite" (COCO 38) with its mask.

    It fails on red pictures, until `fears_red` is mended. `seconds_a_batch` makes it as slow as a large network.
    """

    name = "bright-spot"
    kind = TaskKind.INSTANCE_SEGMENTATION
    model_id = "b" * 64

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.fears_red = True
        self.seconds_a_batch = 0.0
        self.busy = threading.Event()  # set once it has begun with a batch

    def predict(self, images: Sequence[Tensor], min_score: float = 0.0) -> list[Detections]:
        self.batches.append(len(images))
        self.busy.set()
        if self.seconds_a_batch:
            time.sleep(self.seconds_a_batch)  # in the networks' thread, as a large network would take it
        return [self._look(image).at_least(min_score) for image in images]

    def _look(self, image: Tensor) -> Detections:
        red, green, blue = (float(channel.float().mean()) for channel in image)
        if self.fears_red and red > 150 and green < 100 and blue < 100:
            raise ValueError("this network cannot look at red pictures")
        bright = image.float().mean(0) > 128
        if not bool(bright.any()):
            return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())
        rows, columns = torch.where(bright)
        box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
        return Detections(box, torch.tensor([0.75]), torch.tensor([38]), ("kite",), masks=bright[None])


def spot_frame(left: int = 16, top: int = 16, size: int = 32, side: int = 64) -> Frame:
    """A dark picture with one bright square."""
    rgb = np.full((side, side, 3), 24, np.uint8)
    rgb[top : top + size, left : left + size] = 230
    return Frame(rgb)


def red_frame(side: int = 64) -> Frame:
    rgb = np.zeros((side, side, 3), np.uint8)
    rgb[..., 0] = 255
    return Frame(rgb)


def settings(folder: Path, **changes: Any) -> CloudSettings:
    """Small and quick: one thread, free ports, no HTTP page."""
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "",
        "cloud_id": "test-cloud",
        "data_dir": folder,
        "threads": 1,
        "unpack_threads": 1,
        "max_delay_ms": 0,
        "drain_s": 10,
        "stream_grace_s": 1,
        "progress_interval_s": 0.05,
        "retry_after_ms": 20,
    }
    return CloudSettings.load(**(values | changes))


class RunningCloud:
    """The services of cloud.server around a codec and task models that the test made."""

    def __init__(self, settings: CloudSettings, codecs: Sequence[Codec], spot: BrightSpot) -> None:
        self.settings = settings
        self.spot = spot
        self.registry = CollectorRegistry()
        self._codecs = codecs
        self._channels: list[grpc.aio.Channel] = []

    async def start(self) -> "RunningCloud":
        settings, metrics = self.settings, CloudMetrics(self.registry)
        self.tracer = tracing.start(settings, "sightline-cloud", settings.cloud_id)
        draining = asyncio.Event()
        self.log = await open_log(settings)
        self.quarantine = Quarantine(
            settings.data_dir / "quarantine.sqlite",
            max_frames=settings.quarantine_max_frames,
            max_bytes=int(settings.quarantine_max_bytes),
        )
        self.kept = KeptFrames(settings.data_dir / "review.sqlite", settings.review_bounds)
        self.watched = Watched(self.kept)
        self.inference = Inference(
            self._codecs, [self.spot], limits=settings.batch_limits, threads=1, unpack_threads=1, metrics=metrics
        )
        self.inference.start()
        self.pipeline = Pipeline(
            self.inference, self.log, self.quarantine,
            tasks=[self.spot.name], min_score=settings.min_score, limits=settings.pipeline_limits, metrics=metrics,
            tracer=self.tracer,
            on_seen=self.watched.see,
        )  # fmt: skip
        self.ingest = IngestService(settings.cloud_id, settings.stream_limits, draining, metrics)
        self.detection = DetectionService(settings.subscription_limits, settings.max_subscribers, metrics)
        bundles = BundleAdmin(self.ingest, lambda reference: Codec.load(reference), metrics)
        bundles.open(self.inference)
        rejected = QuarantineService()
        rejected.open(Replayer(self.pipeline, self.quarantine))
        self.server = Server(
            settings,
            {
                INGEST: lambda server: ingest_pb2_grpc.add_IngestServiceServicer_to_server(self.ingest, server),
                DETECTION: lambda server: detection_pb2_grpc.add_DetectionServiceServicer_to_server(
                    self.detection, server
                ),
            },
            registry=self.registry,
            draining=draining,
            admin=admin_services(self.ingest, self.detection, bundles, rejected),
        )
        await self.server.start()
        self.ingest.open(self.pipeline)
        self.reviewer = Reviewer(self.log, self.inference, self.kept, self.ingest, settings.max_pixels)
        self.detection.open(self.pipeline, self.log, self.reviewer)
        if settings.console_listen:
            await self.open_console(settings.console_listen)
        return self

    async def open_console(self, listen: str) -> None:
        """`console` is its address then."""
        settings = self.settings.model_copy(update={"console_listen": listen})
        self.watched.console = Console(
            settings, self.server.access, self.log, self.reviewer,
            lambda: system_facts(settings, self.pipeline, self.ingest),
        )  # fmt: skip
        self.console = await self.watched.console.start()

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close()
        if self.watched.console is not None:
            await self.watched.console.close()
        await self.server.close()
        await self.pipeline.close()
        await self.inference.close()
        await self.kept.close()
        await self.quarantine.close()
        await self.log.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    def channel(self) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self._channels.append(channel)
        return channel

    @asynccontextmanager
    async def edge(self, name: str = "edge") -> AsyncIterator["Edge"]:
        edge = Edge(self.channel(), self._codecs[0].model_id, name)
        await edge.open()
        try:
            yield edge
        finally:
            edge.call.cancel()
            await asyncio.gather(edge.reading, return_exceptions=True)

    @property
    def model_id(self) -> str:
        return self._codecs[0].model_id

    def consumers(self) -> detection_pb2_grpc.DetectionServiceStub:
        return detection_pb2_grpc.DetectionServiceStub(self.channel())

    async def events(self) -> list[detection_pb2.DetectionEvent]:
        """All of the log."""
        return [detection_pb2.DetectionEvent.FromString(r.event) for r in await self.log.read(0, 100_000)]

    def metric(self, name: str, **labels: str) -> float:
        """One sample's value, 0 if there is none."""
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0


class Edge:
    """An edge's end of one Upload stream, spoken message by message."""

    def __init__(self, channel: grpc.aio.Channel, model_id: str, name: str) -> None:
        self.call = ingest_pb2_grpc.IngestServiceStub(channel).Upload()
        self.hello = ingest_pb2.Hello(
            protocol_version=1,
            edge_id=name,
            boot_id=1,
            models=[ingest_pb2.ModelAnnouncement(index=0, model_id=model_id)],
        )
        self._cameras: dict[str, int] = {}
        self.welcome: ingest_pb2.Welcome | None = None
        self.frames = self.bytes = 0  # credit
        self.acks: list[ingest_pb2.FrameAck] = []
        self.drains: list[ingest_pb2.Drain] = []
        self.asked: list[ingest_pb2.FrameAgainRequest] = []
        self._news = asyncio.Condition()
        self.reading: asyncio.Task[None]

    async def open(self) -> None:
        await self.call.write(ingest_pb2.UploadRequest(hello=self.hello))
        self.reading = asyncio.create_task(self._read())
        await self.until(lambda: self.frames > 0)

    async def _read(self) -> None:
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                async with self._news:
                    self._take(message)
                    self._news.notify_all()
        finally:  # also where a status ended it: who waits must see it
            async with self._news:
                self._news.notify_all()

    def _take(self, message: ingest_pb2.UploadResponse) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self.welcome = message.welcome
            case "credit":
                self.frames += message.credit.frames
                self.bytes += message.credit.bytes
            case "acks":
                self.acks += message.acks.acks
            case "again":
                self.asked.append(message.again)
            case "drain":
                self.drains.append(message.drain)

    async def until(self, condition: Any) -> None:
        """Waits for a condition over what was read; fails at once if the stream ended without it."""
        async with asyncio.timeout(120), self._news:
            await self._news.wait_for(lambda: condition() or self.call.done())
        assert condition(), f"the stream ended: {await self.call.code()} {await self.call.details()}"

    async def camera(self, camera: str) -> int:
        if camera not in self._cameras:
            self._cameras[camera] = len(self._cameras)
            source = ingest_pb2.SourceAnnouncement(index=self._cameras[camera], camera_id=camera, epoch=EPOCH)
            await self.call.write(ingest_pb2.UploadRequest(source=source))
        return self._cameras[camera]

    async def send(self, camera: str, seq: int, coded: Bitstream, **changes: Any) -> None:
        """Sends a frame once there is credit. `changes` are fields of FrameUpload."""
        await self.until(lambda: self.frames > 0 and self.bytes > 0)
        await self.send_without_credit(camera, seq, coded, **changes)

    async def send_without_credit(self, camera: str, seq: int, coded: Bitstream, **changes: Any) -> None:
        frame = to_upload(coded, source_index=await self.camera(camera), seq=seq, model_index=0)
        frame.capture_time_unix_us = 1_700_000_000_000_000
        for field, value in changes.items():
            setattr(frame, field, value)
        self.frames -= 1
        self.bytes -= len(frame.hyper) + len(frame.latents)
        await self.call.write(ingest_pb2.UploadRequest(frame=frame))

    async def tombstone(self, camera: str, seq: int, outcome: common_pb2.Outcome.ValueType) -> None:
        """Tells the end of a frame that never comes, once there is credit."""
        await self.until(lambda: self.frames > 0)
        index = await self.camera(camera)
        self.frames -= 1
        tombstone = ingest_pb2.FrameTombstone(source_index=index, seq=seq, outcome=outcome, reason="no use")
        await self.call.write(ingest_pb2.UploadRequest(tombstone=tombstone))

    def final(self, camera: str, seq: int) -> list[ingest_pb2.FrameAck]:
        index = self._cameras[camera]
        return [ack for ack in self.acks if (ack.source_index, ack.seq) == (index, seq) and ack.state in FINAL]

    async def answer(self, camera: str, seq: int, count: int = 1) -> ingest_pb2.FrameAck:
        """The `count`th final ack of a frame."""
        await self.until(lambda: len(self.final(camera, seq)) >= count)
        return self.final(camera, seq)[count - 1]

    async def deliver(self, camera: str, seq: int, coded: Bitstream, **changes: Any) -> ingest_pb2.FrameAck:
        """Sends a frame and waits for what becomes of it."""
        count = len(self.final(camera, seq)) if camera in self._cameras else 0
        await self.send(camera, seq, coded, **changes)
        return await self.answer(camera, seq, count + 1)
