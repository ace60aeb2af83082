"""The web console as a part of the cloud process: uvicorn in the cloud's own event loop, on a port of its own.

Plaintext is taken on loopback only, as everywhere (shared.rpc.tls); with the service's certificate it speaks HTTPS. Who
may see what: cloud.console.callers.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import uvicorn

from cloud.console.app import ConsoleApp
from cloud.console.callers import Callers, Connection, tls_context
from cloud.console.live import Live
from cloud.console.pictures import Pictures
from cloud.detections.log import DetectionLog, FrameName
from cloud.ingest import IngestService
from cloud.pipeline import Pipeline
from cloud.review import Reviewer
from cloud.settings import CloudSettings
from shared.codec.types import Frame
from shared.errors import InvalidSettings, NotFound
from shared.rpc import tls
from shared.rpc.access import Access

_log = logging.getLogger("sightline.cloud.console")
_CACHE_BYTES = 64 << 20  # pictures
_LAST_ANSWERS_S = 1
_MAX_REQUESTS = 512  # at once; a page that is watched is one


class Console:
    """`start` binds and serves, `close` ends every request. `see` takes each frame that the networks have seen."""

    def __init__(
        self,
        settings: CloudSettings,
        access: Access,
        log: DetectionLog,
        reviewer: Reviewer,
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        self._settings = settings
        self._reviewer = reviewer
        self._facts = facts
        self._pictures = Pictures(self._decode, max_bytes=_CACHE_BYTES)
        self._live = Live(log, self._pictures)
        self._hosts: frozenset[str] | None = None
        app = ConsoleApp(
            log,
            self._live,
            self._pictures,
            reviewer,
            callers=Callers(access),
            system=self._system,
            hosts=lambda: self._hosts,
        )
        self._app = app.asgi
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> str:
        """The address to open. Raises InvalidSettings."""
        settings = self._settings
        host, port = tls.split_address(settings.console_listen, "console_listen")
        context = tls_context(settings)
        try:
            listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise InvalidSettings(f"setting console_listen: cannot listen on {host} port {port}: {error}") from None
        port = listening.getsockname()[1]
        if tls.is_local(settings.console_listen):
            self._hosts = frozenset(f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]", _url_host(host)))
        config = uvicorn.Config(
            self._app, http=Connection, ws="none", loop="none", lifespan="off", log_config=None, log_level="warning",
            access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=_LAST_ANSWERS_S,
            limit_concurrency=_MAX_REQUESTS,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve([listening]))
        self.address = f"{'http' if context is None else 'https'}://{_url_host(host)}:{port}/"
        return self.address

    def see(self, name: FrameName, frame: Frame) -> None:
        """On the event loop; returns at once."""
        self._pictures.see(name, frame)

    @property
    def pictures_made(self) -> int:
        """JPEGs, for whoever watched, since the start."""
        return self._pictures.made

    async def close(self) -> None:
        await self._live.close()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._pictures.close()

    async def _decode(self, name: FrameName) -> Frame | None:
        try:
            return (await self._reviewer.as_seen(name)).frame
        except NotFound:
            return None

    def _system(self) -> dict[str, Any]:
        kept = self._reviewer.kept
        numbers = {"frames": kept.frames, "bytes": kept.coded_bytes, "not_kept": kept.not_kept}
        return {"version": version("sightline"), "viewers": self._live.watchers, "kept": numbers, **self._facts()}


class _Uvicorn(uvicorn.Server):
    """Signals stay with the service, which closes the console in its own order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def system_facts(settings: CloudSettings, pipeline: Pipeline, ingest: IngestService) -> dict[str, Any]:
    """What the system page says of this process, its models and the edges that are connected to it."""
    inference = pipeline.inference
    return {
        "cloud": settings.cloud_id,
        "device": settings.device,
        "codecs": [{"name": codec.bundle.name, "id": codec.model_id} for codec in inference.codecs.values()],
        "tasks": [
            {
                "name": task.name,
                "kind": str(task.kind),
                "id": task.model_id,
                "runs_on_upload": task.name in pipeline.tasks,
            }
            for task in inference.tasks.values()
        ],
        "in_flight": pipeline.held_frames,
        "waiting": inference.waiting,
        "edges": [
            {
                "id": stream.edge_id,
                "identity": stream.identity,
                "version": stream.software_version,
                "cameras": sorted(stream.cameras),
                "opened": stream.opened_us // 1000,
                "frames": stream.frames,
                "bytes": stream.payload_bytes,
                "unanswered": stream.held_frames,
                "last": stream.last_frame_us // 1000,
            }
            for stream in sorted(ingest.streams, key=lambda stream: (stream.edge_id, stream.opened_us))
            if stream.edge_id
        ],
    }


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
