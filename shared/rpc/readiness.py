"""Whether a server should be sent work, said in one voice by gRPC health, `/readyz` and `sightline_ready`.

    ready = every service was opened (disk there, log there, models loaded), no problem stands, and no drain began

A problem is a sentence under a name ("spool", "log", "disk"). Whoever watches that part sets it and takes it back, so
a server whose disk is full asks for no more work and comes back by itself. It still answers those who call: with the
typed error of what is wrong, which says more than a refused connection.

What a server needs may not be there yet when it starts: a disk that is mounted late, a broker that is restarted, the
predecessor that still drains and holds the file. `until_there` waits for it instead of ending the process, because a
process that ends is started again, and again, each time more slowly, and says nothing while it is away. `/healthz`
stays good meanwhile: only the event loop's own hanging is cured by a restart.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry, Gauge

from shared.errors import Unavailable
from shared.logs import facts

_log = logging.getLogger("sightline.rpc")
_PAUSE_MIN_S = 0.25
_PAUSE_MAX_S = 10.0
_CHECK_S = 1.0
_NOT_OPEN = "is not open yet"
_T = TypeVar("_T")


class Readiness:
    """See the head of this module. Belongs to one event loop; `ready` and `report` may be read on any thread."""

    def __init__(self, services: Iterable[str], draining: asyncio.Event, registry: CollectorRegistry) -> None:
        self.health = HealthServicer()
        self._services = dict.fromkeys(services, False)
        self._problems: dict[str, str] = {}
        self._draining = draining
        gauge = Gauge("sightline_ready", "1 while this server should be sent work, as /readyz says.", registry=registry)
        gauge.set_function(lambda: self.ready)

    @property
    def ready(self) -> bool:
        """Every service serves, no problem stands, and the server is not draining."""
        return self._draining.is_set() is False and self._whole

    @property
    def _whole(self) -> bool:
        return all(self._services.values()) and not self._problems

    def report(self) -> str:
        """What keeps it from being ready, a line each; "ok" if nothing does."""
        lines = [f"{what}: {sentence}" for what, sentence in dict(self._problems).items()]
        if self._draining.is_set():
            lines.append("server: is stopping")
        if not lines:  # while a problem stands it is the cause that services are not open
            lines = [f"{name}: {_NOT_OPEN}" for name, serves in dict(self._services).items() if not serves]
        return "".join(f"{line}\n" for line in lines or ["ok"])

    async def tell(self) -> None:
        """Brings the health service up to date; watchers hear of changes only."""
        for name, serves in self._services.items():
            await self.health.set(name, _status(serves and not self._problems))
        await self.health.set("", _status(self._whole))

    async def set_serving(self, service: str, serving: bool) -> None:
        """Says that a service was opened, or closed."""
        self._services[service] = serving
        await self.tell()

    async def set_problem(self, what: str, sentence: str) -> None:
        """Says what is wrong with a part; "" says that nothing is any more."""
        if sentence == self._problems.get(what, ""):
            return
        if sentence:
            if what not in self._problems:
                _log.warning("not ready", extra=facts(what=what, problem=sentence))
            self._problems[what] = sentence
        else:
            del self._problems[what]
            _log.info("no longer a problem", extra=facts(what=what))
        await self.tell()

    async def keep_checking(self, checks: Mapping[str, Callable[[], Awaitable[str]]]) -> None:
        """For ever: asks each part once a second what is wrong with it, "" for nothing."""
        while True:
            for what, check in checks.items():
                try:
                    sentence = await check()
                except Exception as error:  # a check that fails must not end all checks
                    _log.exception("a readiness check failed", extra=facts(what=what))
                    sentence = f"cannot be checked: {error!r}"
                await self.set_problem(what, sentence)
            await asyncio.sleep(_CHECK_S)

    async def until_there(self, what: str, open_it: Callable[[], Awaitable[_T]]) -> _T:
        """What `open_it` gives, tried again while that raises Unavailable, with pauses that double up to 10 s.

        Raises anything else that `open_it` raises: wrong settings do not mend themselves.
        """
        pause_s = _PAUSE_MIN_S
        while True:
            try:
                opened = await open_it()
            except Unavailable as error:
                await self.set_problem(what, str(error))
                _log.warning("waiting for the %s", what, extra=facts(error=error, again_in_s=pause_s))
            else:
                await self.set_problem(what, "")
                return opened
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)


def _status(serving: bool) -> int:
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
