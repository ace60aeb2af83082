"""What operators ask a cloud, and tell it. Every change is logged with who made it.

An upgrade of the weights, old and new side by side:

    LoadBundle(B)    loaded and warmed up on a thread -> decodes beside A; edges hear of it in their next welcome
    RetireBundle(A)  waits until no upload stream speaks of A and no frame of it is in work -> A is freed

Frames of A that come later than that are told RETRY_LATER: they stay at their edge and nothing is lost.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sightline.v1 import admin_pb2, admin_pb2_grpc

from cloud.inference import Inference
from cloud.ingest import IngestService
from cloud.metrics import CloudMetrics
from cloud.service import DetectionService
from shared.codec.codec import Codec
from shared.errors import InvalidBundle, Unavailable, UnknownModel
from shared.logs import facts
from shared.rpc.access import caller

_log = logging.getLogger("sightline.cloud.admin")
_LOOK_AGAIN_S = 0.1


class CloudAdmin(admin_pb2_grpc.CloudAdminServiceServicer):
    """Who sends and who listens."""

    def __init__(self, ingest: IngestService, detection: DetectionService) -> None:
        self._ingest = ingest
        self._detection = detection

    async def ListUploads(self, request: admin_pb2.ListUploadsRequest, context: Any) -> admin_pb2.ListUploadsResponse:
        return admin_pb2.ListUploadsResponse(
            uploads=[
                admin_pb2.UploadStream(
                    edge_id=stream.edge_id,
                    identity=stream.identity,
                    frames=stream.frames,
                    held_frames=stream.held_frames,
                    model_ids=sorted(stream.model_ids),
                )
                for stream in self._ingest.streams
            ]
        )

    async def ListConsumers(
        self, request: admin_pb2.ListConsumersRequest, context: Any
    ) -> admin_pb2.ListConsumersResponse:
        return admin_pb2.ListConsumersResponse(
            consumers=[
                admin_pb2.Consumer(identity=identity, position=subscription.given, lag_events=subscription.lag)
                for subscription, identity in self._detection.subscriptions.items()
            ]
        )


class BundleAdmin(admin_pb2_grpc.BundleAdminServiceServicer):
    """The cloud's codec bundles, once `open` has given it the networks. `load` reads one, and blocks."""

    def __init__(self, ingest: IngestService, load: Callable[[str], Codec], metrics: CloudMetrics) -> None:
        self._ingest = ingest
        self._load = load
        self._metrics = metrics
        self._inference: Inference | None = None
        self._retiring: set[str] = set()
        self._one_at_a_time = asyncio.Lock()

    def open(self, inference: Inference) -> None:
        self._inference = inference

    async def ListBundles(self, request: admin_pb2.ListBundlesRequest, context: Any) -> admin_pb2.ListBundlesResponse:
        return admin_pb2.ListBundlesResponse(bundles=map(self._describe, self._ready().codecs.values()))

    async def LoadBundle(self, request: admin_pb2.LoadBundleRequest, context: Any) -> admin_pb2.LoadBundleResponse:
        inference = self._ready()
        async with self._one_at_a_time:
            codec = await asyncio.to_thread(self._load, request.reference)
            if request.expected_model_id not in ("", codec.model_id):
                raise InvalidBundle(f"expected bundle {request.expected_model_id}, got {codec.model_id}")
            self._retiring.discard(codec.model_id)
            new = codec.model_id not in inference.codecs
            if new:
                await asyncio.to_thread(inference.add, codec)
                self._metrics.model_info.labels("codec", codec.bundle.name, codec.model_id).set(1)
        _note("loaded a bundle", model=codec.model_id, name=codec.bundle.name)
        return admin_pb2.LoadBundleResponse(bundle=self._describe(codec), was_loaded=not new)

    async def RetireBundle(
        self, request: admin_pb2.RetireBundleRequest, context: Any
    ) -> admin_pb2.RetireBundleResponse:
        inference, model_id = self._ready(), request.model_id
        inference.require_model(model_id)
        if not inference.codecs.keys() - self._retiring - {model_id}:
            raise UnknownModel(f"expected another bundle beside {model_id} before it retires, there is none")
        codec = inference.codecs[model_id]
        self._retiring.add(model_id)
        _note("is retiring a bundle", model=model_id)
        while model_id in self._retiring and self._in_use(inference, model_id):  # noqa: ASYNC110 - several owners
            await asyncio.sleep(_LOOK_AGAIN_S)  # the call's deadline ends it
        if model_id in self._retiring:
            self._retiring.discard(model_id)
            inference.remove(model_id)
            self._metrics.model_info.remove("codec", codec.bundle.name, model_id)
        return admin_pb2.RetireBundleResponse()

    def _in_use(self, inference: Inference, model_id: str) -> bool:
        return inference.busy_with(model_id) or any(model_id in each.model_ids for each in self._ingest.streams)

    def _describe(self, codec: Codec) -> admin_pb2.LoadedBundle:
        return admin_pb2.LoadedBundle(
            name=codec.bundle.name, model_id=codec.model_id, retiring=codec.model_id in self._retiring
        )

    def _ready(self) -> Inference:
        if self._inference is None:
            raise Unavailable("the models are still loading; call again in a moment")
        return self._inference


def _note(what: str, **about: object) -> None:
    _log.info("an operator %s", what, extra=facts(by=caller().name, **about))
