"""What operators ask an edge, and tell it. Every change is logged with who made it.

An upgrade of the weights, old and new side by side:

    LoadBundle(B)    loaded and warmed up on a thread -> beside A in the engine -> the uplink's next stream speaks of it
    RetireBundle(A)  new pictures get another -> those in work are coded -> the spool has no frame of A -> A is freed
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sightline.v1 import admin_pb2, admin_pb2_grpc

from edge.control import Control
from edge.models import Loaded, Models
from edge.spool import Spool
from shared.codec.codec import Codec
from shared.errors import InvalidBundle
from shared.logs import facts
from shared.rpc.access import caller

_log = logging.getLogger("sightline.edge.admin")
_LOOK_AGAIN_S = 0.1


class EdgeAdmin(admin_pb2_grpc.EdgeAdminServiceServicer):
    """Cameras, spool and bounds. `connected`: the cloud has welcomed this edge. `spool_max_bytes`: as set."""

    def __init__(self, control: Control, spool: Spool, spool_max_bytes: int, connected: Callable[[], bool]) -> None:
        self._control = control
        self._spool = spool
        self._spool_max_bytes = spool_max_bytes
        self._connected = connected

    async def ListCameras(self, request: admin_pb2.ListCamerasRequest, context: Any) -> admin_pb2.ListCamerasResponse:
        response = admin_pb2.ListCamerasResponse()
        for name, seen in self._control.cameras().items():
            camera = response.cameras.add(camera_id=name, frames=seen.frames, paused=name in self._control.paused)
            if seen.last_s:
                camera.last_seen.FromMicroseconds(int(seen.last_s * 1e6))
        return response

    async def PauseCamera(self, request: admin_pb2.PauseCameraRequest, context: Any) -> admin_pb2.PauseCameraResponse:
        await asyncio.to_thread(self._control.pause, request.camera_id)
        _note("paused a camera", camera=request.camera_id)
        return admin_pb2.PauseCameraResponse()

    async def ResumeCamera(
        self, request: admin_pb2.ResumeCameraRequest, context: Any
    ) -> admin_pb2.ResumeCameraResponse:
        await asyncio.to_thread(self._control.resume, request.camera_id)
        _note("resumed a camera", camera=request.camera_id)
        return admin_pb2.ResumeCameraResponse()

    async def GetSpool(self, request: admin_pb2.GetSpoolRequest, context: Any) -> admin_pb2.GetSpoolResponse:
        stats = self._spool.stats
        response = admin_pb2.GetSpoolResponse(
            frames=stats.frames,
            used_bytes=stats.used_bytes,
            max_bytes=self._spool_max_bytes,
            writable=stats.writable,
            uplink_connected=self._connected(),
        )
        if stats.oldest_us is not None:
            response.oldest.FromMicroseconds(stats.oldest_us)
        return response

    async def GetQualityBounds(
        self, request: admin_pb2.GetQualityBoundsRequest, context: Any
    ) -> admin_pb2.GetQualityBoundsResponse:
        lowest, highest = self._control.quality_bounds
        return admin_pb2.GetQualityBoundsResponse(lowest=lowest, highest=highest)

    async def SetQualityBounds(
        self, request: admin_pb2.SetQualityBoundsRequest, context: Any
    ) -> admin_pb2.SetQualityBoundsResponse:
        await asyncio.to_thread(self._control.set_quality_bounds, request.lowest, request.highest)
        _note("set the bounds of quality", lowest=request.lowest, highest=request.highest)
        return admin_pb2.SetQualityBoundsResponse()


class BundleAdmin(admin_pb2_grpc.BundleAdminServiceServicer):
    """The edge's bundles. `load` reads and warms one up, and blocks; `announce` is called when the ids changed."""

    def __init__(
        self, models: Models, spool: Spool, load: Callable[[str], Codec], announce: Callable[[], None]
    ) -> None:
        self._models = models
        self._spool = spool
        self._load = load
        self._announce = announce
        self._one_at_a_time = asyncio.Lock()

    async def ListBundles(self, request: admin_pb2.ListBundlesRequest, context: Any) -> admin_pb2.ListBundlesResponse:
        return admin_pb2.ListBundlesResponse(bundles=[self._describe(each) for each in self._models.loaded()])

    async def LoadBundle(self, request: admin_pb2.LoadBundleRequest, context: Any) -> admin_pb2.LoadBundleResponse:
        async with self._one_at_a_time:
            codec = await asyncio.to_thread(self._load, request.reference)
            if request.expected_model_id not in ("", codec.model_id):
                raise InvalidBundle(f"expected bundle {request.expected_model_id}, got {codec.model_id}")
            new = self._models.add(codec, make_default=request.make_default)
            if new:
                self._announce()
        _note("loaded a bundle", model=codec.model_id, name=codec.bundle.name, default=request.make_default)
        [loaded] = [each for each in self._models.loaded() if each.codec.model_id == codec.model_id]
        return admin_pb2.LoadBundleResponse(bundle=self._describe(loaded), was_loaded=not new)

    async def RetireBundle(
        self, request: admin_pb2.RetireBundleRequest, context: Any
    ) -> admin_pb2.RetireBundleResponse:
        model_id = request.model_id
        loaded = self._models.retire(model_id)
        _note("is retiring a bundle", model=model_id)
        while loaded.retiring and (  # noqa: ASYNC110 - two owners
            loaded.pictures or await self._spool.holds_model(model_id)
        ):
            await asyncio.sleep(_LOOK_AGAIN_S)  # the call's deadline ends it
        if loaded.retiring:
            self._models.remove(model_id)
            self._announce()
        return admin_pb2.RetireBundleResponse()

    def _describe(self, loaded: Loaded) -> admin_pb2.LoadedBundle:
        codec = loaded.codec
        return admin_pb2.LoadedBundle(
            name=codec.bundle.name,
            model_id=codec.model_id,
            is_default=codec.model_id == self._models.default,
            retiring=loaded.retiring,
        )


def _note(what: str, **about: object) -> None:
    _log.info("an operator %s", what, extra=facts(by=caller().name, **about))
