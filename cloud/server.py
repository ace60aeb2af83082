"""The cloud process: from settings to a service that serves, and to an end that loses nothing.

start   ports bound, NOT_SERVING -> log opened (a disk or broker that is not there yet is waited for)
        -> models loaded and warmed up -> SERVING, ports told
SIGTERM NOT_SERVING -> upload streams hear DRAIN, what they hold is carried to the log and answered
        -> consumers get the last events -> log closed -> exit 0
"""

from shared import collecting  # before all else, as it says

# isort: split
import asyncio
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import torch
from prometheus_client import CollectorRegistry
from sightline.v1 import admin_pb2_grpc, detection_pb2_grpc, ingest_pb2_grpc, quarantine_pb2_grpc

from cloud.admin import BundleAdmin, CloudAdmin
from cloud.detections.log import DetectionLog
from cloud.detections.opening import open_log
from cloud.inference import Inference, Inferred
from cloud.ingest import IngestService
from cloud.kept import KeptFrames
from cloud.metrics import CloudMetrics
from cloud.pipeline import Pipeline, ReceivedFrame
from cloud.quarantine import Quarantine
from cloud.readiness import DiskCheck, LogCheck
from cloud.replay import Replayer
from cloud.review import Reviewer
from cloud.service import DetectionService
from cloud.settings import CloudSettings
from cloud.tasks.loading import load_task
from shared import logs, tracing
from shared.codec.codec import Codec
from shared.memory import keep_freed_memory
from shared.metrics import disk_free_bytes, gauge
from shared.quarantine import SERVICE as QUARANTINE
from shared.quarantine import QuarantineService
from shared.rpc.server import Server, stop_on_signal, unless_stopped

if TYPE_CHECKING:
    from cloud.console.server import Console

collecting.resume()

_log = logging.getLogger("sightline.cloud")
INGEST = "sightline.v1.IngestService"
DETECTION = "sightline.v1.DetectionService"


async def serve(settings: CloudSettings) -> None:
    """Runs the cloud until SIGTERM or SIGINT. Raises InvalidSettings, UnknownModel, InvalidBundle, Unavailable."""
    logs.configure(settings.log_level, settings.log_format)
    keep_freed_memory()
    registry = CollectorRegistry()
    metrics = CloudMetrics(registry)
    folder = settings.data_dir.expanduser()
    gauge(registry, "sightline_cloud_disk_free_bytes", "Free on the log's disk.", lambda: disk_free_bytes(folder))
    draining = asyncio.Event()
    ingest = IngestService(settings.cloud_id, settings.stream_limits, draining, metrics)
    detection = DetectionService(settings.subscription_limits, settings.max_subscribers, metrics)
    services: dict[str, Callable[[grpc.aio.Server], None]] = {
        INGEST: functools.partial(ingest_pb2_grpc.add_IngestServiceServicer_to_server, ingest),
        DETECTION: functools.partial(detection_pb2_grpc.add_DetectionServiceServicer_to_server, detection),
    }
    bundles = BundleAdmin(ingest, functools.partial(load_codec, settings), metrics)
    rejected = QuarantineService()
    admin = admin_services(ingest, detection, bundles, rejected)
    server = Server(settings, services, registry=registry, draining=draining, admin=admin)
    async with stop_on_signal() as stop:
        try:
            await server.start()
            await _run(settings, server, ingest, detection, bundles, rejected, metrics, stop)
        finally:
            await server.close()


async def _run(
    settings: CloudSettings,
    server: Server,
    ingest: IngestService,
    detection: DetectionService,
    bundles: BundleAdmin,
    rejected: QuarantineService,
    metrics: CloudMetrics,
    stop: asyncio.Event,
) -> None:
    """Opens what the services need, serves until `stop`, and closes it in the order that loses nothing."""
    folder = settings.data_dir.expanduser()
    tracer = tracing.start(settings, "sightline-cloud", settings.cloud_id)
    until_there = server.readiness.until_there
    log = await unless_stopped(stop, until_there("log", lambda: open_log(settings)))
    if log is None:
        return
    try:
        quarantine = await unless_stopped(stop, until_there("quarantine", lambda: open_quarantine(settings)))
        if quarantine is None:
            return
        kept = await unless_stopped(stop, until_there("review", lambda: open_kept(settings)))
        if kept is None:
            return
        inference = await asyncio.to_thread(load_inference, settings, metrics)
        inference.start()
        watched = Watched(kept)
        pipeline = Pipeline(
            inference,
            log,
            quarantine,
            tasks=settings.task_names,
            min_score=settings.min_score,
            limits=settings.pipeline_limits,
            metrics=metrics,
            tracer=tracer,
            on_seen=watched.see,
        )
        reviewer = Reviewer(log, inference, kept, ingest, settings.max_pixels)
        console = await open_console(settings, server, log, pipeline, ingest, reviewer)
        watched.console = console
        ingest.open(pipeline)
        detection.open(pipeline, log, reviewer)
        bundles.open(inference)
        rejected.open(Replayer(pipeline, quarantine))
        metrics.waiting_frames.set_function(lambda: inference.waiting)
        server.keep_checking({"log": LogCheck(log, pipeline, folder), "disk": DiskCheck(folder)})
        collecting.leave_alone()
        for service in (INGEST, DETECTION):
            await server.set_serving(service, True)
        server.announce(
            log_id=log.log_id,
            models=sorted(inference.codecs),
            tasks=list(inference.tasks),
            console=None if console is None else console.address,
        )

        await stop.wait()
        if console is not None:
            await console.close()
            watched.console = None
        last_events = asyncio.create_task(end_subscriptions(server, ingest, pipeline, detection))
        await server.drain()
        last_events.cancel()
        await asyncio.gather(last_events, return_exceptions=True)
        await inference.close()
        await kept.close()
        await quarantine.close()
    finally:
        await log.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
    _log.info("stopped")


async def open_quarantine(settings: CloudSettings) -> Quarantine:
    """Raises Unavailable."""
    return Quarantine(
        settings.data_dir.expanduser() / "quarantine.sqlite",
        max_frames=settings.quarantine_max_frames,
        max_bytes=int(settings.quarantine_max_bytes),
    )


async def open_kept(settings: CloudSettings) -> KeptFrames:
    """Raises Unavailable."""
    return KeptFrames(settings.data_dir.expanduser() / "review.sqlite", settings.review_bounds)


class Watched:
    """What is done with a frame once the networks have looked at it: kept for review, shown where the console is on."""

    def __init__(self, kept: KeptFrames) -> None:
        self._kept = kept
        self.console: Console | None = None

    def see(self, frame: ReceivedFrame, inferred: Inferred) -> None:
        self._kept.keep(frame.name, frame.bitstream)
        if self.console is not None:
            self.console.see(frame.name, inferred.frame)


async def open_console(
    settings: CloudSettings,
    server: Server,
    log: DetectionLog,
    pipeline: Pipeline,
    ingest: IngestService,
    reviewer: Reviewer,
) -> "Console | None":
    """None where it is switched off. Raises InvalidSettings."""
    if not settings.console_listen:
        return None
    from cloud.console.server import Console, system_facts  # an optional part

    def facts() -> dict[str, object]:
        return system_facts(settings, pipeline, ingest)

    console = Console(settings, server.access, log, reviewer, facts)
    _log.info("the console is open", extra=logs.facts(address=await console.start()))
    return console


async def end_subscriptions(
    server: Server, ingest: IngestService, pipeline: Pipeline, detection: DetectionService
) -> None:
    """Once the last upload is answered, lets consumers have what was logged, and go."""
    await server.draining.wait()
    await ingest.until_idle()
    await pipeline.close()
    detection.stop.set()


def admin_services(
    ingest: IngestService, detection: DetectionService, bundles: BundleAdmin, rejected: QuarantineService
) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """What the admin port serves, by name."""
    cloud = CloudAdmin(ingest, detection)
    return {
        "sightline.v1.CloudAdminService": functools.partial(
            admin_pb2_grpc.add_CloudAdminServiceServicer_to_server, cloud
        ),
        "sightline.v1.BundleAdminService": functools.partial(
            admin_pb2_grpc.add_BundleAdminServiceServicer_to_server, bundles
        ),
        QUARANTINE: functools.partial(quarantine_pb2_grpc.add_QuarantineServiceServicer_to_server, rejected),
    }


def load_codec(settings: CloudSettings, reference: str) -> Codec:
    """Blocks. Raises UnknownModel, InvalidBundle."""
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Codec.load(reference, device=settings.device, dtype=dtype)


def load_inference(settings: CloudSettings, metrics: CloudMetrics) -> Inference:
    """Loads and warms up codecs and task models. Blocks. Raises UnknownModel, InvalidBundle, Unavailable."""
    cores = len(os.sched_getaffinity(0))
    codecs = [load_codec(settings, name) for name in settings.model_references]
    threads = settings.threads or cores
    tasks = [load_task(name, device=settings.device, threads=threads) for name in settings.all_task_names]
    for codec in codecs:
        metrics.model_info.labels("codec", codec.bundle.name, codec.model_id).set(1)
    for task in tasks:
        metrics.model_info.labels("task", task.name, task.model_id).set(1)
    inference = Inference(
        codecs,
        tasks,
        limits=settings.batch_limits,
        threads=threads,
        unpack_threads=settings.unpack_threads or cores,
        metrics=metrics,
    )
    inference.warm_up()
    _log.info(
        "models loaded",
        extra=logs.facts(codecs=[codec.bundle.name for codec in codecs], tasks=[task.name for task in tasks]),
    )
    return inference
