"""Places on the way of a frame where a service can be told to die: a SIGKILL that lands between two given steps.

    edge   received | encoded | frame before COMMIT | frame after COMMIT | before upload | uploaded
           | ack before COMMIT | ack after COMMIT
    cloud  received | seen | record before COMMIT | logged | before ack | acked

Random moments seldom hit a place that lasts microseconds. So the services of `bench.chaos` run with these places marked
from outside: the rooms themselves know nothing of it.
"""

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

EDGE_STEPS = (
    "edge: received",
    "edge: encoded",
    "edge: frame before COMMIT",
    "edge: frame after COMMIT",
    "edge: before upload",
    "edge: uploaded",
    "edge: ack before COMMIT",
    "edge: ack after COMMIT",
)
COMMIT_STEP = "cloud: record before COMMIT"  # of the SQLite log; another process commits for JetStream's
CLOUD_STEPS = (
    "cloud: received",
    "cloud: seen",
    COMMIT_STEP,
    "cloud: logged",
    "cloud: before ack",
    "cloud: acked",
)


class Steps:
    """The steps of one process. Once armed, the next frame that comes to that step is the last one."""

    def __init__(self) -> None:
        self._armed = ""

    def arm(self, step: str) -> None:
        self._armed = step

    def reached(self, step: str) -> None:
        if step == self._armed:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: type, method: str, step: str) -> None:
        original = getattr(owner, method)

        def marked(*arguments: Any, **options: Any) -> Any:
            self.reached(step)
            return original(*arguments, **options)

        setattr(owner, method, marked)

    def after(self, owner: type, method: str, step: str) -> None:
        original = getattr(owner, method)

        async def marked_coroutine(*arguments: Any, **options: Any) -> Any:
            result = await original(*arguments, **options)
            self.reached(step)
            return result

        def marked(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            self.reached(step)
            return result

        setattr(owner, method, marked_coroutine if inspect.iscoroutinefunction(original) else marked)


def mark_edge(steps: Steps) -> None:
    """Marks the edge's steps, in this process."""
    from edge.service import EdgeService
    from edge.session import Session
    from edge.spool import Spool

    steps.before(EdgeService, "answer", "edge: received")
    steps.before(Spool, "put", "edge: encoded")
    steps.before(Session, "_send_entry", "edge: before upload")
    steps.after(Session, "_send_entry", "edge: uploaded")
    _mark_commits(steps)


def _mark_commits(steps: Steps) -> None:
    """A transaction is told by what was done in it: frames kept, or acknowledgements."""
    from edge.spool_file import SpoolFile

    done: set[str] = set()

    def noting(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            done.add(kind)
            return original(*arguments)

        return noted

    transaction = SpoolFile.transaction

    @contextmanager
    def marked(file: SpoolFile) -> Iterator[None]:
        done.clear()
        with transaction(file):
            yield
            for kind in done:
                steps.reached(f"edge: {kind} before COMMIT")
        for kind in done:
            steps.reached(f"edge: {kind} after COMMIT")

    SpoolFile.put = noting("frame", SpoolFile.put)  # type: ignore[method-assign]
    SpoolFile.finish = noting("ack", SpoolFile.finish)  # type: ignore[method-assign]
    SpoolFile.transaction = marked  # type: ignore[method-assign]


def mark_cloud(steps: Steps, log: str) -> None:
    """Marks the cloud's steps, in this process. `log`: the backend that it uses."""
    from cloud.pipeline import Pipeline

    steps.before(Pipeline, "process", "cloud: received")
    if log == "jetstream":
        from cloud.detections.jetstream import JetStreamLog

        _mark_appends(steps, JetStreamLog)
    else:
        from cloud.detections.sqlite import SqliteLog

        _mark_appends(steps, SqliteLog)
        steps.after(SqliteLog, "_insert", COMMIT_STEP)
    _mark_acks(steps)


def _mark_appends(steps: Steps, log: type) -> None:
    steps.before(log, "append", "cloud: seen")
    steps.after(log, "append", "cloud: logged")


def _mark_acks(steps: Steps) -> None:
    """The writer asks for the next message once the one before is written."""
    from sightline.v1 import ingest_pb2

    from cloud.ingest import _UploadStream

    next_message = _UploadStream._next_message
    final_is_written: WeakSet[_UploadStream] = WeakSet()

    def marked(stream: _UploadStream) -> ingest_pb2.UploadResponse | None:
        if stream in final_is_written:
            final_is_written.discard(stream)
            steps.reached("cloud: acked")
        message = next_message(stream)
        acks = message.acks.acks if message is not None else ()
        if any(ack.state == ingest_pb2.ACK_STATE_PERSISTED for ack in acks):
            steps.reached("cloud: before ack")
            final_is_written.add(stream)
        return message

    _UploadStream._next_message = marked  # type: ignore[method-assign]
