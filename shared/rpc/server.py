"""A Sightline server: gRPC with health, an HTTP page for Prometheus and probes, and an end that loses nothing.

    start    bind both ports, health NOT_SERVING -> open the service -> SERVING, tell the ports
    SIGTERM  health NOT_SERVING, /readyz 503 -> `draining` is set: streams see it and finish what they hold
             -> new calls are refused, running ones finish -> the caller flushes -> exit 0
             all within `drain_s`; what is still running then is cancelled

One event loop a process. The HTTP page is prometheus_client's own server on its thread; what it reads from here is
some flags and a time, so it answers `/healthz` with 503 when the loop itself hangs. `/readyz` says why it is not ready.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CollectorRegistry, make_wsgi_app, start_wsgi_server

from shared.errors import InvalidSettings
from shared.metrics import build_info
from shared.rpc import tls
from shared.rpc.access import Access
from shared.rpc.http_tls import bound_requests, speak_tls
from shared.rpc.interceptors import ServerInterceptor
from shared.rpc.limits import CallLimits
from shared.rpc.readiness import Readiness
from shared.rpc.reload import ReloadMetrics
from shared.settings import ServerSettings

_log = logging.getLogger("sightline.rpc")
_T = TypeVar("_T")
METADATA_BYTES = 16 << 10
HANDSHAKE_S = 10.0
IDLE_S = 300.0  # a connection without calls; its caller opens another when it needs one
_LOOP_HANGS_S = 30.0
_LAST_ANSWERS_S = 0.5
_REFUSING_S = 0.25  # between the last running call and the end: busy callers learn to call elsewhere


class Server:
    """One gRPC server with its health service and HTTP page.

    `services`: full name of each service and the function that adds it, e.g.
    {"sightline.v1.EdgeService": lambda server: add_EdgeServiceServicer_to_server(servicer, server)}.
    `admin`: likewise, served on `admin_listen` only. `draining` is set when the server is about to stop; long streams
    must watch it.
    """

    def __init__(
        self,
        settings: ServerSettings,
        services: dict[str, Callable[[grpc.aio.Server], None]],
        *,
        registry: CollectorRegistry,
        draining: asyncio.Event | None = None,
        admin: dict[str, Callable[[grpc.aio.Server], None]] | None = None,
    ) -> None:
        self._settings = settings
        self._services = services
        self._registry = registry
        self._beat = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._http: WSGIServer | None = None
        self._started = False
        self.draining = draining or asyncio.Event()
        self.readiness = Readiness(services, self.draining, registry)
        self.port = 0
        self.admin_port = 0
        self.metrics_port = 0
        build_info(registry)
        self.reload_metrics = ReloadMetrics(registry)
        limits = CallLimits(settings.max_calls, settings.max_calls_caller, settings.rate_caller)
        self.access = Access(settings.policy, limits, registry, self.reload_metrics)
        self._calls = ServerInterceptor(registry, self.draining, self.access)
        self._grpc = self._server()
        self._admin_services = admin or {}
        self._admin: grpc.aio.Server | None = None

    def _server(self) -> grpc.aio.Server:
        settings = self._settings
        return grpc.aio.server(
            interceptors=[self._calls],
            options=[
                ("grpc.max_receive_message_length", int(settings.max_message_bytes)),
                ("grpc.max_send_message_length", int(settings.max_message_bytes)),
                # A port that is taken is an error, not half of somebody else's calls.
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                # What a stranger can make this server hold, before and without a call of its own.
                ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1e3)),
                ("grpc.max_connection_idle_ms", round(IDLE_S * 1e3)),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                ("grpc.max_concurrent_streams", settings.max_streams_connection),
                ("grpc.max_metadata_size", METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES),
            ],
        )

    async def start(self) -> None:
        """Binds and starts; every service is NOT_SERVING until `set_serving`. Raises InvalidSettings."""
        settings = self._settings
        for add in self._services.values():
            add(self._grpc)
        await self.readiness.tell()
        health_pb2_grpc.add_HealthServicer_to_server(self.readiness.health, self._grpc)
        if settings.reflection:
            from grpc_reflection.v1alpha import reflection  # an optional package

            names = (*self._services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self.port = self._bind(self._grpc, settings.listen, "listen")
        await self._grpc.start()
        self._started = True
        await self._start_admin()
        self._start_http()
        self._tasks.append(asyncio.create_task(self._keep_beating()))

    async def _start_admin(self) -> None:
        address = self._settings.admin_listen
        if not address or not self._admin_services:
            return
        admin = self._server()
        for add in self._admin_services.values():
            add(admin)
        self.admin_port = self._bind(admin, address, "admin_listen")
        if self._settings.tls_certificate is not None and self._settings.policy is None:
            raise InvalidSettings("setting admin_listen: over TLS a policy must say who may administer, there is none")
        await admin.start()
        self._admin = admin

    def _bind(self, server: grpc.aio.Server, address: str, setting: str) -> int:
        """The port it listens on. Raises InvalidSettings."""
        settings = self._settings
        host, port = tls.split_address(address, setting)
        credentials = tls.server_credentials(
            address,
            settings.tls_certificate,
            settings.tls_key,
            settings.tls_client_ca,
            insecure=settings.insecure,
            has_policy=settings.policy is not None,
            metrics=self.reload_metrics,
            setting=setting,
        )
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InvalidSettings(f"setting {setting}: cannot listen on {host} port {port}: {error}") from None

    async def set_serving(self, service: str, serving: bool) -> None:
        """What the health service says of one service, and through all of them of the whole server."""
        await self.readiness.set_serving(service, serving)

    def keep_checking(self, checks: Mapping[str, Callable[[], Awaitable[str]]]) -> None:
        """Until `close`: readiness follows what these parts say is wrong with them, "" for nothing."""
        self._tasks.append(asyncio.create_task(self.readiness.keep_checking(checks)))

    async def drain(self) -> None:
        """Ends intake and waits for running calls, at most `drain_s`."""
        self.draining.set()
        await self.readiness.health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._calls.until_idle()
        except TimeoutError:
            _log.warning("calls were still running after %g s and are cut off", self._settings.drain_s)
        # What reaches grpc.aio while it stops ends as CANCELLED, which no caller tries again: refuse first.
        await asyncio.sleep(_REFUSING_S)
        # A moment for last answers to leave; health watchers do not end by themselves.
        if self._admin is not None:
            await self._admin.stop(0)
        await self._grpc.stop(_LAST_ANSWERS_S)

    async def close(self) -> None:
        """Ends what is left at once; also after a start that failed."""
        if self._admin is not None:
            await self._admin.stop(0)
        if self._started:  # stopping a grpc.aio server that never started waits for ever
            await self._grpc.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await asyncio.to_thread(self._http.shutdown)
            self._http.server_close()

    def announce(self, **facts: object) -> None:
        """Tells the bound ports: a line of JSON on stdout, and the same in `ready_file` where one is set."""
        told = {"ready": True, "port": self.port, "metrics_port": self.metrics_port, **facts}
        if self.admin_port:
            told["admin_port"] = self.admin_port
        line = json.dumps(told)
        path = self._settings.ready_file
        if path is not None:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(line + "\n")
            os.replace(partial, path)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _start_http(self) -> None:
        if not self._settings.metrics_listen:
            return
        settings = self._settings
        allowed = settings.insecure or settings.metrics_insecure or settings.metrics_tls
        if not allowed and not tls.is_local(settings.metrics_listen):
            raise InvalidSettings(
                f"setting metrics_listen: {settings.metrics_listen} would be open to the network in plaintext; "
                "listen on loopback, set metrics_tls, or set metrics_insecure to allow it"
            )
        host, port = tls.split_address(self._settings.metrics_listen, "metrics_listen")
        try:
            self._http, _ = start_wsgi_server(port, host, self._registry)
        except OSError as error:
            raise InvalidSettings(f"setting metrics_listen: cannot listen on {host} port {port}: {error}") from None
        bound_requests(self._http)
        if settings.metrics_tls:
            certificate, key = settings.tls_certificate, settings.tls_key
            if certificate is None or key is None:
                raise InvalidSettings("setting metrics_tls needs tls_certificate and tls_key beside it")
            speak_tls(self._http, certificate, key, settings.tls_client_ca, self.reload_metrics)
        self._http.set_app(self._page(make_wsgi_app(self._registry)))
        self.metrics_port = self._http.server_port

    def _page(self, metrics: Any) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                body: Iterable[bytes] = metrics(environ, start_response)
                return body
            alive = time.monotonic() - self._beat < _LOOP_HANGS_S
            checks = {
                "/healthz": (alive, "ok\n" if alive else "the event loop hangs\n"),
                "/readyz": (self.readiness.ready, self.readiness.report()),
            }
            if path not in checks:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"/metrics, /healthz and /readyz are here\n"]
            good, said = checks[path]
            start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [said.encode()]

        return answer

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1)


@asynccontextmanager
async def stop_on_signal() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        _log.info("stopping on %s", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns or raises; None if `stop` was set first, after `work` was cancelled and has cleaned up."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return None
    return working.result()
