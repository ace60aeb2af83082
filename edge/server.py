"""The edge process: builds its parts once, in order, and takes them down in the reverse order.

    settings -> codecs -> spool -> engine -> uplink -> gRPC server -> ready
    SIGTERM  -> no new calls, running ones finish -> uplink gets its acknowledgements -> spool is closed -> exit 0

The cloud need not be there: pictures are encoded and spooled, and sent when it is. A spool that cannot be opened (its
disk is mounted late, another process still drains) is waited for: meanwhile the ports answer, and say so.
"""

from shared import collecting  # before all else, as it says

# isort: split
import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry
from sightline.v1 import admin_pb2_grpc, edge_pb2, edge_pb2_grpc, quarantine_pb2_grpc

from edge import images
from edge.admin import BundleAdmin, EdgeAdmin
from edge.control import Control
from edge.engine import Engine
from edge.images import ImageLimits, PixelFormat, RawPicture
from edge.metrics import EdgeMetrics
from edge.models import Models
from edge.originals import Originals, code_again
from edge.rate import TYPICAL_BPP, Pacing, RateController, is_curve
from edge.service import Defaults, EdgeService
from edge.settings import EdgeSettings
from edge.spool import Spool
from edge.spool_file import Limits
from edge.uplink import Uplink
from shared import logs, tracing
from shared.codec.codec import Codec
from shared.errors import InvalidSettings, Unavailable
from shared.logs import facts
from shared.memory import keep_freed_memory, release_file_pages
from shared.metrics import disk_free_bytes, gauge
from shared.quarantine import SERVICE as QUARANTINE
from shared.quarantine import QuarantineService
from shared.rpc import tls
from shared.rpc.reload import ReloadMetrics
from shared.rpc.server import Server, stop_on_signal, unless_stopped

collecting.resume()

_log = logging.getLogger("sightline.edge")

SERVICE = "sightline.v1.EdgeService"
LAST_ACKS_S = 5.0
MESSAGE_OVERHEAD_BYTES = 4096  # of an upload beside its two streams, amply


async def serve(settings: EdgeSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises InvalidSettings, InvalidBundle, UnknownModel."""
    logs.configure(settings.log_level, settings.log_format)
    keep_freed_memory()
    async with stop_on_signal() as stop:
        edge = await unless_stopped(stop, Edge.start(settings))
        if edge is not None:
            collecting.leave_alone()
            try:
                edge.server.announce(edge_id=settings.edge_id)
                _log.info("ready", extra=facts(port=edge.server.port, metrics_port=edge.server.metrics_port))
                await stop.wait()
                await edge.server.drain()
            finally:
                await edge.close()
    _log.info("stopped")


class Edge:
    """All parts of a running edge. Made by `start`, ended by `close`."""

    def __init__(
        self, server: Server, service: EdgeService, spool: Spool, engine: Engine, uplink: Uplink | None
    ) -> None:
        self.server = server
        self.service = service
        self.spool = spool
        self.engine = engine
        self.uplink = uplink
        self.renewal: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, settings: EdgeSettings) -> "Edge":
        """Builds every part and starts to serve. Raises as `serve`."""
        codecs = await asyncio.to_thread(_load_codecs, settings)
        spool = await _open_spool(settings)
        registry = CollectorRegistry()
        metrics = EdgeMetrics(registry, lambda: spool.stats)
        models = Models(codecs)
        metrics.follow_models(models.loaded)
        control = Control(settings.data_dir / "control.json", settings.max_cameras)
        engine = Engine(
            models.encoders,
            in_flight_max_bytes=int(settings.in_flight_max_bytes),
            batch_frames=settings.batch_frames_used,
            batch_pixels=settings.batch_pixels,
            lanes=settings.lanes_used,
            workers=settings.workers,
        )
        draining = asyncio.Event()
        originals = Originals(int(settings.originals_max_bytes), settings.originals_max_age_s)
        pacing = _pacing(settings, models, control, spool, metrics, lambda: edge.uplink)
        service = EdgeService(engine, spool, metrics, _defaults(settings, models, control, pacing), draining, originals)
        server = Server(
            settings,
            {SERVICE: lambda grpc_server: edge_pb2_grpc.add_EdgeServiceServicer_to_server(service, grpc_server)},
            registry=registry,
            draining=draining,
            admin=_admin_services(settings, spool, models, control, lambda: edge.uplink),
        )
        edge = cls(server, service, spool, engine, None)
        _publish_settings(registry, settings)
        service.tracer = tracing.start(settings, "sightline-edge", settings.edge_id)
        try:
            await server.start()
            if settings.cloud:
                credentials = _cloud_credentials(settings, server.reload_metrics)
                edge.uplink = _uplink(settings, credentials, spool, metrics, models.ids, pacing)
                if originals.on:
                    edge.uplink.code_again = partial(code_again, originals, engine, models)
                edge.uplink.start()
                edge.renewal = asyncio.create_task(credentials.watch(edge.uplink.renew))
            server.keep_checking({"spool": edge.check_spool})
            await asyncio.to_thread(release_file_pages)
            await server.set_serving(SERVICE, True)
        except BaseException:
            await edge.close()
            raise
        return edge

    async def check_spool(self) -> str:
        """What is wrong with the spool, "" for nothing."""
        return "" if self.spool.stats.writable else "frames cannot be written: its disk is full or broken"

    async def close(self) -> None:
        """Ends everything: what is spooled stays, what waits for an acknowledgement waits a moment longer."""
        if self.renewal is not None:
            self.renewal.cancel()
        if self.uplink is not None:
            await self.uplink.close(LAST_ACKS_S)
        await self.server.close()
        await self.engine.close()
        await self.spool.close()
        if self.service.tracer is not None:
            await asyncio.to_thread(self.service.tracer.close)


class _NotYet(edge_pb2_grpc.EdgeServiceServicer):
    """What cameras hear while the spool is not there."""

    async def Compress(self, request: edge_pb2.CompressRequest, context: Any) -> edge_pb2.CompressResponse:
        raise Unavailable("the edge is still starting; call again in a moment")

    async def CompressStream(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        raise Unavailable("the edge is still starting; call again in a moment")


async def _open_spool(settings: EdgeSettings) -> Spool:
    """The spool, as soon as it can be opened. Raises InvalidSettings."""

    async def open_it() -> Spool:
        return Spool(settings.data_dir / "spool.sqlite", _spool_limits(settings))

    try:
        return await open_it()
    except Unavailable as error:
        _log.warning("the spool is not there yet", extra=facts(error=error))
    not_yet = partial(edge_pb2_grpc.add_EdgeServiceServicer_to_server, _NotYet())
    server = Server(settings, {SERVICE: not_yet}, registry=CollectorRegistry())
    try:
        await server.start()
        return await server.readiness.until_there("spool", open_it)
    finally:
        await server.close()


def _publish_settings(registry: CollectorRegistry, settings: EdgeSettings) -> None:
    """What alerts compare the spool's and uplink's figures with."""
    limit_bytes = int(settings.spool_max_bytes)
    gauge(registry, "sightline_edge_spool_limit_bytes", "Largest size the spool may have.", lambda: limit_bytes)
    gauge(registry, "sightline_edge_uplink_enabled", "1 if a cloud is set.", lambda: bool(settings.cloud))
    gauge(
        registry, "sightline_edge_disk_free_bytes", "Free on the spool's disk.",
        lambda: disk_free_bytes(settings.data_dir),
    )  # fmt: skip


def _load_codecs(settings: EdgeSettings) -> list[Codec]:
    """The default first; of different names and weights."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.threads_used)
    codecs: dict[str, Codec] = {}
    for reference in settings.models:
        codec = _load_codec(settings, reference)
        name = codec.bundle.name
        if name in codecs:
            raise InvalidSettings(f"setting models: two bundles are named {name!r}; expected different ones")
        if twin := next((other for other in codecs if codecs[other].model_id == codec.model_id), None):
            raise InvalidSettings(f"setting models: {twin!r} and {name!r} are one model: {codec.model_id}")
        codecs[name] = codec
    return list(codecs.values())


def _load_codec(settings: EdgeSettings, reference: str) -> Codec:
    """It has coded a small frame, so that no camera waits for a compiler."""
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    codec = Codec.load(reference, device=settings.device, dtype=dtype)
    nv12 = RawPicture(PixelFormat.NV12, 64, 64, bytes(64 * 96))
    codec.encode(images.decode(nv12), settings.quality)
    return codec


def _defaults(settings: EdgeSettings, models: Models, control: Control, pacing: Pacing | None) -> Defaults:
    return Defaults(
        quality=settings.quality,
        models=models,
        control=control,
        frame_max_age_s=settings.frame_max_age_s,
        camera_max_age_s=settings.camera_deadlines_s,
        delivers=bool(settings.cloud),
        limits=ImageLimits(settings.max_side, settings.max_pixels, settings.max_decode_s),
        max_coded_bytes=int(settings.max_message_bytes) - MESSAGE_OVERHEAD_BYTES,
        stream_window=settings.stream_window,
        pacing=pacing,
    )


def _pacing(
    settings: EdgeSettings,
    models: Models,
    control: Control,
    spool: Spool,
    metrics: EdgeMetrics,
    uplink: Callable[[], Uplink | None],
) -> Pacing | None:
    """None without a budget. The curve is what the default bundle measured at the end of its training."""
    if not settings.uplink_budget_bps:
        return None
    measured = (models.encoders[models.default].bundle.info.get("tuning_curve") or {}).get("bpp", ())

    def queued_frames() -> int:
        there, spooled = uplink(), spool.stats.frames
        return there.waiting_for_link(spooled) if there else spooled

    def tell(capacity_bps: float, quality: float) -> None:
        metrics.uplink_capacity.set(capacity_bps)
        metrics.paced_quality.set(quality)

    return Pacing(
        RateController(settings.uplink_budget_bps, measured if is_curve(measured) else TYPICAL_BPP),
        queued_frames=queued_frames,
        bounds=lambda: control.quality_bounds,
        tell=tell,
    )


def _admin_services(
    settings: EdgeSettings, spool: Spool, models: Models, control: Control, uplink: Callable[[], Uplink | None]
) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """What the admin port serves, by name. `uplink`: None while there is none."""

    def connected() -> bool:
        there = uplink()
        return there is not None and there.connected

    def announce() -> None:
        there = uplink()
        if there is not None:
            there.speak_of(models.ids)

    cameras = EdgeAdmin(control, spool, int(settings.spool_max_bytes), connected)
    rejected = QuarantineService()
    rejected.open(spool)
    bundles = BundleAdmin(models, spool, lambda reference: _load_codec(settings, reference), announce)
    return {
        "sightline.v1.EdgeAdminService": partial(admin_pb2_grpc.add_EdgeAdminServiceServicer_to_server, cameras),
        "sightline.v1.BundleAdminService": partial(admin_pb2_grpc.add_BundleAdminServiceServicer_to_server, bundles),
        QUARANTINE: partial(quarantine_pb2_grpc.add_QuarantineServiceServicer_to_server, rejected),
    }


def _spool_limits(settings: EdgeSettings) -> Limits:
    return Limits(
        max_bytes=int(settings.spool_max_bytes),
        max_age_us=int(settings.spool_max_age_s * 1e6),
        drop_oldest=settings.spool_policy == "drop-oldest",
        token_keep_us=int(settings.token_keep_s * 1e6),
        max_tokens=settings.token_max,
        quarantine_frames=settings.quarantine_max_frames,
        quarantine_bytes=int(settings.quarantine_max_bytes),
        max_cameras=settings.max_cameras,
    )


def _cloud_credentials(settings: EdgeSettings, metrics: ReloadMetrics) -> tls.RenewedCredentials:
    """Raises InvalidSettings where they are wrong now; files that are wrong later change nothing."""
    tls.split_address(settings.cloud, "cloud")
    return tls.RenewedCredentials(
        settings.cloud,
        settings.cloud_ca,
        settings.cloud_certificate,
        settings.cloud_key,
        insecure=settings.cloud_insecure,
        setting="cloud",
        token=settings.cloud_token,
        metrics=metrics,
    )


def _uplink(
    settings: EdgeSettings,
    credentials: tls.RenewedCredentials,
    spool: Spool,
    metrics: EdgeMetrics,
    model_ids: list[str],
    pacing: Pacing | None,
) -> Uplink:
    def open_channel() -> grpc.aio.Channel:
        return tls.open_channel(settings.cloud, credentials.get(), max_message_bytes=int(settings.max_message_bytes))

    return Uplink(
        spool,
        metrics,
        open_channel,
        edge_id=settings.edge_id,
        model_ids=model_ids,
        backoff_max_s=settings.uplink_backoff_max_s,
        stall_s=settings.uplink_stall_s,
        poison_after=settings.uplink_poison_after,
        on_received=None if pacing is None else pacing.on_received,
    )
