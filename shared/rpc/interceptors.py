"""What happens around every call: counted and timed from first to last message, its caller known, its error a status.

The names are those of go-grpc-prometheus, which dashboards know:

    grpc_server_started_total{grpc_type, grpc_service, grpc_method}
    grpc_server_handled_total{..., grpc_code}
    grpc_server_handling_seconds{...}                       a stream counts once, for its whole life

Only methods that exist are counted, so a caller cannot make labels. A SightlineError becomes its status; any other
exception is logged with its traceback and told to the caller as INTERNAL without details. Cancellation is counted
and raised again: swallowing it leaks the call (grpc issue 43360).

While the server drains, new calls are UNAVAILABLE and `until_idle` waits for the running ones. Health and reflection
are neither refused nor waited for: a Watch lasts as long as its watcher wants.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry, Counter, Histogram

from shared.errors import InvalidInput, SightlineError, Unavailable
from shared.metrics import SECONDS_BUCKETS
from shared.rpc import status
from shared.rpc.access import Access

_log = logging.getLogger("sightline.rpc")
_LABELS = ["grpc_type", "grpc_service", "grpc_method"]
_DEADLINE_SLACK_S = 0.1
_ABOUT_THE_SERVER = ("grpc.health.", "grpc.reflection.")


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Counts, times and maps errors; see the head of this module."""

    def __init__(self, registry: CollectorRegistry, draining: asyncio.Event, access: Access) -> None:
        self._draining = draining
        self._access = access
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._started = Counter("grpc_server_started", "Calls started.", _LABELS, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls ended.", [*_LABELS, "grpc_code"], registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Wall clock of whole calls.",
            _LABELS,
            buckets=(*SECONDS_BUCKETS, 300.0, 3600.0),
            registry=registry,
        )

    async def until_idle(self) -> None:
        """Waits until no call runs."""
        await self._idle.wait()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        kinds = {(False, False): "unary", (True, False): "client_stream", (False, True): "server_stream"}
        kind = kinds.get((handler.request_streaming, handler.response_streaming), "bidi_stream")
        name = _behaviour_field(handler)
        wrapped = self._wrap(getattr(handler, name), (kind, service, method))
        reader = _reader(handler.request_deserializer)
        return handler._replace(request_deserializer=reader, **{name: wrapped})

    def _wrap(self, behaviour: Callable[..., Any], labels: tuple[str, str, str]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._observed(labels, context):
                    try:
                        with self._admitted(labels, context):
                            async for response in behaviour(_checked(request), context):
                                yield response
                    except Exception as error:
                        await _end(context, error)

            return generate

        async def call(request: Any, context: Any) -> Any:
            with self._observed(labels, context):
                try:
                    with self._admitted(labels, context):
                        return await behaviour(_checked(request), context)
                except Exception as error:
                    await _end(context, error)

        return call

    @contextmanager
    def _admitted(self, labels: tuple[str, str, str], context: Any) -> Iterator[None]:
        if self._draining.is_set() and not labels[1].startswith(_ABOUT_THE_SERVER):
            raise Unavailable("the server is stopping; call again, it or another one will answer")
        with self._access.entered(f"/{labels[1]}/{labels[2]}", context):
            yield

    @contextmanager
    def _observed(self, labels: tuple[str, str, str], context: Any) -> Iterator[None]:
        self._started.labels(*labels).inc()
        waited_for = not labels[1].startswith(_ABOUT_THE_SERVER)
        self._count(+1 if waited_for else 0)
        start = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
            code = _code(context)
        except (asyncio.CancelledError, GeneratorExit):
            remaining = context.time_remaining()
            # A caller whose deadline is over cancels, a little before that is so here.
            expired = remaining is not None and remaining < _DEADLINE_SLACK_S
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = _code(context)
            raise
        finally:
            self._seconds.labels(*labels).observe(time.perf_counter() - start)
            self._handled.labels(*labels, code.name).inc()
            self._count(-1 if waited_for else 0)

    def _count(self, change: int) -> None:
        self._running += change
        if self._running == 0:
            self._idle.set()
        else:
            self._idle.clear()


class _Malformed:
    """Stands for a message whose bytes are none of its type; gRPC would answer UNKNOWN and log a traceback."""


_MALFORMED = _Malformed()


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _MALFORMED

    return read


class _CheckedRequests:
    """A stream of requests that ends with InvalidInput at a malformed one."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests  # not asked for its iterator before it is read: one never used makes Python warn

    def __aiter__(self) -> "_CheckedRequests":
        return self

    async def __anext__(self) -> Any:
        return _checked(await self._requests.__anext__())


def _checked(request: Any) -> Any:
    """A request or a stream of them as its handler takes it. Raises InvalidInput."""
    if request is _MALFORMED:
        raise InvalidInput("expected a protobuf message of the method's request type, got other bytes")
    return _CheckedRequests(request) if hasattr(request, "__aiter__") else request


def _behaviour_field(handler: Any) -> str:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    return f"{request}_{response}"


async def _end(context: Any, error: Exception) -> None:
    """Gives a call the status of the error that it ended with; always raises."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, SightlineError):
        await status.abort(context, error)
    _log.error("a call failed", exc_info=error)
    await status.abort(context, SightlineError("internal error; the server's log has the details"))


def _code(context: Any) -> grpc.StatusCode:
    """The code a handler left in its context; grpc.aio gives 0, an integer or a StatusCode."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((each for each in grpc.StatusCode if each.value[0] == (code or 0)), grpc.StatusCode.UNKNOWN)
