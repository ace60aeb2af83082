"""What keeps the cloud from taking frames: a log that cannot be read or written, a disk that is nearly full.

Asked once a second (shared.rpc.readiness). A failed append says that the log cannot be written, and the next one that
succeeds takes it back. But a replica that is not ready gets no frames to try with, so after a failure the disk is
tried with a file of our own, and after a pause a log elsewhere (a broker) counts as worth another attempt.
"""

import asyncio
import os
import time
from pathlib import Path

from cloud.detections.log import DetectionLog, FrameName
from cloud.pipeline import Pipeline
from shared.errors import Unavailable
from shared.metrics import disk_free_bytes

MIN_FREE_BYTES = 64 << 20
_ANSWER_S = 5.0
_AFTER_FAILURE_S = 5.0
_TRIAL_BYTES = 256 << 10
_NOBODY = FrameName("readiness", 0, 0)  # a name that no log holds: epochs are random


class LogCheck:
    """`await check()`: what is wrong with the log in `folder`, "" for nothing."""

    def __init__(self, log: DetectionLog, pipeline: Pipeline, folder: Path) -> None:
        self._log = log
        self._pipeline = pipeline
        self._folder = folder

    async def __call__(self) -> str:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._log.find(_NOBODY)
        except TimeoutError:
            return f"it has not answered for {_ANSWER_S:g} s"
        except Unavailable as error:
            return str(error)
        failure = self._pipeline.log_failure
        if failure is None:
            return ""
        fault = await asyncio.to_thread(_try_to_write, self._folder / "readiness.trial")
        if not fault and time.monotonic() - failure.at_s > _AFTER_FAILURE_S:
            self._pipeline.log_failure = None
            return ""
        return fault or failure.sentence


class DiskCheck:
    """`await check()`: whether the disk of `folder` has room for what is to come."""

    def __init__(self, folder: Path, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        self._folder = folder
        self._min_free_bytes = min_free_bytes

    async def __call__(self) -> str:
        free = disk_free_bytes(self._folder)
        if free >= self._min_free_bytes:
            return ""
        return f"expected {self._min_free_bytes >> 20} MiB free in {self._folder}, got {free / (1 << 20):.0f} MiB"


def _try_to_write(path: Path) -> str:
    """Writes and syncs a file as the log would; what went wrong, "" for nothing."""
    try:
        with path.open("wb") as out:
            out.write(bytes(_TRIAL_BYTES))
            out.flush()
            os.fsync(out.fileno())
        path.unlink()
    except OSError as error:
        path.unlink(missing_ok=True)
        return f"the disk cannot be written: {error}"
    return ""
