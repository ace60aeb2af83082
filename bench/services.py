"""Edge and cloud as processes of their own for the time of a measurement, on a disk: one in memory would flatter."""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.demo.services import Service, service

DISK = "/var/tmp"  # noqa: S108 - not /tmp, which may be memory; TemporaryDirectory makes a private folder


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sightline-bench-", dir=DISK) as name:
        yield Path(name)


@contextmanager
def started(name: str, flags: Sequence[str], folder: Path) -> Iterator[Service]:
    """`sightline edge` or `cloud`, serving."""
    folder.mkdir(exist_ok=True)
    with service(name, ["--data-dir", str(folder / name), *flags], folder) as child:
        asyncio.run(child.wait_ready())
        yield child
