"""One trace a frame, across both services, without a word more on the wire or on the disk.

A frame waits in a spool, for days perhaps, and is sent again by another process: a trace context that travels with it
would have to be kept wherever the frame is kept. But a frame has a name that both sides know, and names it is made
of never come twice. So the trace id is the name's hash, and so is the id of the trace's first span, the edge's; every
other span of the frame has that one as its parent, whoever records it and whenever.

    trace id       SHA-256(name)[0:16]          sampled: the id's lower half, as a fraction, is below `trace_ratio`,
    first span id  SHA-256(name)[16:24]         OpenTelemetry's own rule, so that both sides choose the same frames

Spans are recorded once a stage is over, from the times that are measured anyway. They leave through OpenTelemetry's
batch processor on its own thread; where the collector is slow or away, spans are dropped and frames are not.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.metrics import software_version
from shared.settings import ServerSettings

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

_log = logging.getLogger("sightline.tracing")
FIRST_SPAN = "edge.compress"
_traceparent: ContextVar[str] = ContextVar("sightline_traceparent", default="")
_CLOSE_MS = 3_000


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a span, in the order in which parts followed each other."""

    name: str
    seconds: float


class Tracer:
    """See the head of this module. Thread-safe. Needs the extra `tracing`."""

    def __init__(self, endpoint: str, ratio: float, service: str, instance: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._ratio = ratio
        self._resource = Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": software_version()}
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)
        self._processor: BatchSpanProcessor = BatchSpanProcessor(exporter, schedule_delay_millis=1_000)

    def record(
        self,
        frame: str,
        name: str,
        *,
        seconds: float,
        stages: Sequence[Stage],
        attributes: Mapping[str, str | int | float],
    ) -> None:
        """A span that ends now and took `seconds`, with its stages as children, the last of which ends now.

        `frame`: camera/epoch/seq. The first span is linked to what the caller said with `traceparent`.
        """
        digest = hashlib.sha256(frame.encode()).digest()
        if not sampled(digest[:16], self._ratio):
            return
        first = int.from_bytes(digest[16:24], "big") or 1
        own = first if name == FIRST_SPAN else _span_id()
        end_ns = time.time_ns()
        trace_id = int.from_bytes(digest[:16], "big")
        parent = None if own == first else first
        about = {"sightline.frame": frame, **attributes}
        self._emit(trace_id, own, parent, name, end_ns - round(seconds * 1e9), end_ns, about)
        side = name.partition(".")[0]
        for stage in reversed(stages):
            start_ns = end_ns - round(stage.seconds * 1e9)
            self._emit(trace_id, _span_id(), own, f"{side}.{stage.name}", start_ns, end_ns, {})
            end_ns = start_ns

    def close(self) -> None:
        """Sends what waits, for a few seconds at most. Blocks."""
        self._processor.force_flush(_CLOSE_MS)
        self._processor.shutdown()  # type: ignore[no-untyped-call,unused-ignore]

    def _emit(
        self,
        trace_id: int,
        span_id: int,
        parent_id: int | None,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, str | int | float],
    ) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Link, SpanKind

        linked = _parse(_traceparent.get()) if parent_id is None else None
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=_context(trace_id, span_id, remote=False),
                parent=None if parent_id is None else _context(trace_id, parent_id, remote=True),
                resource=self._resource,
                attributes=attributes,
                links=[] if linked is None else [Link(linked)],
                kind=SpanKind.SERVER if parent_id is None else SpanKind.INTERNAL,
                start_time=start_ns,
                end_time=end_ns,
            )
        )


def start(settings: ServerSettings, service: str, instance: str) -> Tracer | None:
    """What the settings ask for: None where no collector is set."""
    if not settings.trace_endpoint:
        return None
    _log.info("traces go to %s", settings.trace_endpoint)
    return Tracer(settings.trace_endpoint, settings.trace_ratio, service, instance)


def hear(context: Any) -> None:
    """Notes the `traceparent` (W3C Trace Context) that a call came with, for the spans recorded on its behalf."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            _traceparent.set(value)


def sampled(trace_id: bytes, ratio: float) -> bool:
    """OpenTelemetry's TraceIdRatioBased: by the lower 64 bits of the trace id."""
    return int.from_bytes(trace_id[8:], "big") < round(ratio * (1 << 64))


def _span_id() -> int:
    return secrets.randbits(64) or 1


def _context(trace_id: int, span_id: int, *, remote: bool) -> "SpanContext":
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(trace_id, span_id, is_remote=remote, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _parse(traceparent: str) -> "SpanContext | None":
    """The caller's span out of a `traceparent`; None where there is none or it is not one."""
    parts = traceparent.split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or len(parts[2]) != 16:
        return None
    try:
        return _context(int(parts[1], 16), int(parts[2], 16), remote=True)
    except ValueError:
        return None
