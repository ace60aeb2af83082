"""The console's HTTP side: one page, its data as JSON, pictures as JPEG, live news as server-sent events.

    GET /                      the page; also at /camera/ID, /events and /system, which its script tells apart
    GET /static/NAME           style and scripts, from the package; nothing comes from another host
    GET /api/whoami            the caller's name; POST /api/login and /api/logout
    GET /api/live              server-sent events, see cloud.console.live
    GET /api/events            search: newest first, or `after` a sequence; one event by /api/events/SEQUENCE
    GET /api/system            models, edges, log
    GET /pictures/CAMERA/EPOCH/SEQ   the frame as the networks saw it
    POST /again/CAMERA/EPOCH/SEQ     the frame once more from its edge, ?quality=8

An error is JSON too: {"error": sentence, "kind": its class}. Whether the caller may see a camera is asked for each
camera of each answer (cloud.console.callers), so that the console shows nobody more than Subscribe would.
"""

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sightline.v1 import common_pb2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.console import search
from cloud.console.callers import Callers
from cloud.console.live import Live
from cloud.console.pictures import Pictures, to_jpeg
from cloud.console.views import of_event
from cloud.detections.log import DetectionLog, FrameName
from cloud.detections.subscribe import EventFilter
from cloud.review import Reviewer
from cloud.tasks.labels import COCO_LABELS
from shared.codec.types import quality_to_steps
from shared.errors import CursorExpired, InvalidInput, NotFound, PermissionDenied, SightlineError

_STATIC = Path(__file__).with_name("static")
_MAX_LIMIT = 200
_SIDES = (480, 1280, 8192)  # pictures are made in these sizes only
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "OUT_OF_RANGE": 410,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
}
_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     b"img-src 'self' data: blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


class ConsoleApp:
    """The routes. `system` gives the facts of the system page; `hosts` the names it answers to, None: to any."""

    def __init__(
        self,
        log: DetectionLog,
        live: Live,
        pictures: Pictures,
        reviewer: Reviewer,
        *,
        callers: Callers,
        system: Callable[[], dict[str, Any]],
        hosts: Callable[[], frozenset[str] | None],
    ) -> None:
        self._log = log
        self._live = live
        self._pictures = pictures
        self._reviewer = reviewer
        self._callers = callers
        self._may_see = callers.may_see
        self._system = system
        page = [Route(path, self._page) for path in ("/", "/camera/{camera}", "/events", "/system")]
        self.asgi = Starlette(
            routes=[
                *page,
                Route("/static/{name}", self._static),
                Route("/api/whoami", self._whoami),
                Route("/api/login", self._login, methods=["POST"]),
                Route("/api/logout", self._logout, methods=["POST"]),
                Route("/api/live", self._follow),
                Route("/api/events", self._search),
                Route("/api/events/{sequence:int}", self._event),
                Route("/api/system", self._facts),
                Route("/pictures/{camera}/{epoch}/{seq:int}", self._picture),
                Route("/again/{camera}/{epoch}/{seq:int}", self._again, methods=["POST"]),
            ],
            middleware=[Middleware(_Guard, hosts=hosts)],
            exception_handlers={SightlineError: _error},
        )

    async def _page(self, request: Request) -> Response:
        return FileResponse(_STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not re.fullmatch(r"[a-z]+\.(css|js|svg)", name) or not (_STATIC / name).is_file():
            raise NotFound(f"no file {name!r}")
        return FileResponse(_STATIC / name, headers={"cache-control": "no-cache"})

    async def _whoami(self, request: Request) -> Response:
        caller = self._callers.of(request)
        return _json({"name": caller.name, "by_token": self._callers.has_token(request)})

    async def _login(self, request: Request) -> Response:
        response = _json({})
        self._callers.log_in(request, response, await request.body())
        return response

    async def _logout(self, request: Request) -> Response:
        response = _json({})
        self._callers.log_out(response)
        return response

    async def _follow(self, request: Request) -> Response:
        return StreamingResponse(
            self._live.watch(self._may_see(request)),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _search(self, request: Request) -> Response:
        query = _Query(request)
        limit = query.integer("limit", 50, low=1, high=_MAX_LIMIT)
        categories = frozenset(query.integers("category"))
        min_score = query.number("score", 0.0, high=1.0)
        # Who looks for objects does not look for frames that have none.
        outcomes = [common_pb2.OUTCOME_DETECTIONS] if categories or min_score else query.outcomes()
        cameras = frozenset(query.all("camera"))
        event_filter = EventFilter(cameras, categories, min_score, frozenset(outcomes), self._may_see(request))
        if query.has("after"):
            found = await search.after(self._log, event_filter, sequence=query.integer("after", 0), limit=limit)
        else:
            found = await search.before(
                self._log,
                event_filter,
                sequence=query.integer("before", 0) or None,
                since_ns=query.integer("since", 0) * 1_000_000,
                until_ns=_end_of(query.integer("until", 0)),
                limit=limit,
            )
        return _json({"events": found.events, "next": found.next, "scanned": found.scanned})

    async def _event(self, request: Request) -> Response:
        sequence = request.path_params["sequence"]
        everything = EventFilter(frozenset(), frozenset(), 0.0, frozenset(), self._may_see(request))
        try:
            records = await self._log.read(sequence - 1, 1) if sequence > 0 else []
        except CursorExpired as error:
            raise NotFound(f"the log no longer keeps event {sequence}: {error}") from None
        if not records or records[0].sequence != sequence or (event := everything.apply(records[0])) is None:
            raise NotFound(f"there is no event {sequence} here")
        return _json(of_event(event, records[0]))

    async def _facts(self, request: Request) -> Response:
        may_see = self._may_see(request)
        facts = self._system()
        for edge in facts["edges"]:
            edge["cameras"] = [camera for camera in edge["cameras"] if may_see(camera)]
        span = await self._log.span()
        log = {"id": self._log.log_id, "oldest": span.oldest, "newest": span.newest}
        labels = [{"id": number, "name": name} for number, name in COCO_LABELS.items()]
        return _json({"now": time.time_ns() // 1_000_000, "log": log, "categories": labels, **facts})

    async def _picture(self, request: Request) -> Response:
        path = request.path_params
        may_see = self._may_see(request)
        if not may_see(path["camera"]):
            raise PermissionDenied(f"you may not see camera {path['camera']!r}")
        name = _name(request)
        wanted = _Query(request).integer("side", _SIDES[0], low=1, high=_SIDES[-1])
        jpeg = await self._pictures.get(name, next(side for side in _SIDES if side >= wanted))
        if jpeg is None:
            raise NotFound(f"the picture of frame {name} is not kept")
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600, immutable"})

    async def _again(self, request: Request) -> Response:
        if not self._may_see(request)(request.path_params["camera"]):
            raise PermissionDenied(f"you may not see camera {request.path_params['camera']!r}")
        quality = _Query(request).number("quality", 8.0, high=8.0)
        seen = await self._reviewer.again(_name(request), quality_to_steps(quality))
        jpeg = await asyncio.to_thread(to_jpeg, seen.frame, _SIDES[-1])
        coded_bytes = len(seen.bitstream.hyper) + len(seen.bitstream.latents)
        headers = {"cache-control": "no-store", "x-coded-bytes": str(coded_bytes)}
        return Response(jpeg, media_type="image/jpeg", headers=headers)


def _end_of(unix_ms: int) -> int:
    """The last nanosecond of a millisecond, 0 for none."""
    return unix_ms * 1_000_000 + 999_999 if unix_ms else 0


def _name(request: Request) -> FrameName:
    path = request.path_params
    try:
        return FrameName(path["camera"], int(path["epoch"], 16), path["seq"])
    except ValueError as error:
        raise InvalidInput(f"expected CAMERA/EPOCH/SEQ of an event, got {request.url.path}: {error}") from None


class _Query:
    """A request's query, checked. Raises InvalidInput that names the field."""

    def __init__(self, request: Request) -> None:
        self._values = request.query_params

    def has(self, name: str) -> bool:
        return bool(self._values.get(name))

    def all(self, name: str) -> list[str]:
        return [value for value in self._values.getlist(name) if value]

    def integers(self, name: str) -> list[int]:
        return [self._integer(name, value) for value in self.all(name)]

    def integer(self, name: str, default: int, *, low: int = 0, high: int = 1 << 62) -> int:
        value = self._integer(name, self._values[name]) if self.has(name) else default
        if not low <= value <= high:
            raise InvalidInput(f"{name} must be in [{low}, {high}], got {value}")
        return value

    def number(self, name: str, default: float, *, high: float) -> float:
        text = self._values.get(name) or str(default)
        try:
            value = float(text)
        except ValueError:
            raise InvalidInput(f"{name} must be a number, got {text!r}") from None
        if not 0.0 <= value <= high:  # also false for NaN
            raise InvalidInput(f"{name} must be in [0, {high}], got {text}")
        return value

    def outcomes(self) -> list[int]:
        known = {"detections": 1, "rejected": 2, "expired": 3, "dropped": 4}
        unknown = [name for name in self.all("outcome") if name not in known]
        if unknown:
            raise InvalidInput(f"outcome must be one of {', '.join(known)}, got {unknown[0]!r}")
        return [known[name] for name in self.all("outcome")]

    def _integer(self, name: str, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise InvalidInput(f"{name} must be a whole number, got {text!r}")
        return int(text)


class _Guard:
    """Adds the security headers, and refuses a request for another host: a page elsewhere on the web that had its name
    resolve to this address could otherwise read what a console without a login shows."""

    def __init__(self, app: ASGIApp, hosts: Callable[[], frozenset[str] | None]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        hosts = self._hosts()
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        if hosts is not None and host not in hosts:
            said = f"this console answers as {' or '.join(sorted(hosts))}, not as {host!r}"
            await JSONResponse({"error": said, "kind": "Misdirected"}, 421)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


def _json(value: object) -> Response:
    return JSONResponse(value, headers={"cache-control": "no-store"})


async def _error(request: Request, error: Exception) -> Response:
    status = _STATUS.get(error.status, 500) if isinstance(error, SightlineError) else 500
    return JSONResponse({"error": str(error), "kind": type(error).__name__}, status)
