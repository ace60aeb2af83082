"""Files that may change while a service runs: certificates, keys, the policy.

They are looked at (`stat`) when somebody needs them and read again only after they changed, so there is no thread, no
signal, and nothing to forget; a link that is switched to another folder, as Kubernetes does it, counts as a change.
What was read last and made sense stays in force until something newer does: a half-written file, or a certificate
whose key has not been written yet, is logged and counted and changes nothing.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.errors import InvalidSettings
from shared.logs import facts

_log = logging.getLogger("sightline.rpc")
T = TypeVar("T")
_Signature = tuple[tuple[int, int, int], ...]


class ReloadMetrics:
    """Counts of what was read anew, and when certificates end; `what` is one of a few fixed words."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reloads = Counter(
            "sightline_reloads",
            "Files that changed while the service ran, by what they hold and whether they could be used.",
            ["what", "result"],
            registry=registry,
        )
        self.expires = Gauge(
            "sightline_certificate_expires_timestamp_seconds",
            "When the certificate in force ends, seconds since 1970.",
            ["what"],
            registry=registry,
        )


class Reloaded(Generic[T]):
    """The value that `parse` makes of some files, as of their last change. Thread-safe.

    The first read is at once and raises what `parse` raises. `check_every_s`: files are looked at no more often.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        parse: Callable[[list[bytes]], T],
        metrics: ReloadMetrics | None = None,
        *,
        check_every_s: float = 0.0,
    ) -> None:
        self.what = what
        self._paths = tuple(paths)
        self._parse = parse
        self._metrics = metrics
        self._check_every_s = check_every_s
        self._lock = Lock()
        self._signature = self._stat()
        self._checked_s = time.monotonic()
        self._value = parse(self._read())
        self.changes = 0  # values that took another's place
        if metrics is not None:
            for result in ("used", "refused"):  # a counter that first appears at 1 has no increase to be seen
                metrics.reloads.labels(what, result)

    def get(self) -> T:
        """The value in force. Never raises."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked_s < self._check_every_s:
                return self._value
            self._checked_s = now
            signature = self._stat()
            if signature == self._signature:
                return self._value
            self._signature = signature
            try:
                self._value = self._parse(self._read())
            except InvalidSettings as error:
                self._count("refused")
                _log.error("%s changed and cannot be used; what was read before stays in force", self.what,
                           extra=facts(error=error))  # fmt: skip
            else:
                self.changes += 1
                self._count("used")
                _log.info("%s was read anew", self.what)
            return self._value

    def _count(self, result: str) -> None:
        if self._metrics is not None:
            self._metrics.reloads.labels(self.what, result).inc()

    def _stat(self) -> _Signature:
        signature = []
        for path in self._paths:
            try:
                found = os.stat(path)
                signature.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                signature.append((0, 0, 0))
        return tuple(signature)

    def _read(self) -> list[bytes]:
        return [read_file(path, self.what) for path in self._paths]


def read_file(path: Path, what: str) -> bytes:
    """Raises InvalidSettings that names `what`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"{what} must name a readable file, got: {error}") from None
