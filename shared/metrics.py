"""What both services' Prometheus metrics share: buckets, build and process info, disk space and bounded labels.

Names follow Prometheus: `sightline_<side>_<what>_<base unit>`. A registry belongs to one server, not to the process,
so that several can run in one. Whatever a peer chooses freely (a camera's id) becomes a label only through
`BoundedLabel`, because each new value of a label is memory that is never given back. Counters whose labels are known
beforehand begin at 0, because a counter that first appears at 1 has no increase that Prometheus could see.
"""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock

from prometheus_client import CollectorRegistry, Gauge, Info, ProcessCollector

SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BYTES_BUCKETS = tuple(float(1 << n) for n in range(8, 25))  # 256 B to 16 MiB
BPP_BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)

OTHER = "other"


class BoundedLabel:
    """Lets the first `limit` values of a label through and turns every later one into "other". Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()
        self._lock = Lock()

    def __call__(self, value: str) -> str:
        with self._lock:
            if value in self._seen:
                return value
            if len(self._seen) >= self._limit:
                return OTHER
            self._seen.add(value)
            return value


def software_version() -> str:
    """Version of the installed package, "unknown" when it runs from a plain folder."""
    try:
        return version("sightline")
    except PackageNotFoundError:
        return "unknown"


def build_info(registry: CollectorRegistry) -> None:
    """Publishes `sightline_build_info`, and memory, CPU and open files of the process as `process_...`."""
    ProcessCollector(registry=registry)
    info = Info("sightline_build", "What is running.", registry=registry)
    info.info({"version": software_version(), "python": platform.python_version(), "machine": platform.machine()})


def gauge(registry: CollectorRegistry, name: str, text: str, value: Callable[[], float]) -> None:
    """A gauge that is asked for its value at each scrape."""
    Gauge(name, text, registry=registry).set_function(value)


def disk_free_bytes(folder: Path) -> float:
    """What may still be written to the disk of `folder`, bytes; NaN while there is no such folder."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return float("nan")
    return float(disk.f_bavail * disk.f_frsize)
