"""The uplink against a real IngestService on a real port that keeps the protocol, or breaks it on purpose.

The cloud here is small, checks what an edge may do, and answers as the test says. The true cloud meets the true edge
in tests/test_end_to_end.py.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from sightline.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc

from edge.metrics import EdgeMetrics
from edge.spool import Spool, wall_clock_us
from edge.spool_file import Limits
from edge.spool_rows import Draft, Outcome
from edge.uplink import Uplink, pause_s
from shared.codec.bitstream import payload_crc
from shared.codec.types import Bitstream
from shared.errors import InvalidSettings
from shared.rpc.frames import from_upload
from shared.rpc.tls import open_channel

MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32
LIMITS = Limits(
    max_bytes=1 << 30,
    max_age_us=10**12,
    drop_oldest=False,
    token_keep_us=10**11,
    max_tokens=1000,
    quarantine_frames=10,
    quarantine_bytes=1 << 20,
    max_cameras=100,
)
Key = tuple[str, int, int]


@dataclass
class Cloud(ingest_pb2_grpc.IngestServiceServicer):
    """Keeps what arrives; `answer` says what to do with a frame: an ack, None for silence, or an exception."""

    answer: Callable[["Cloud", ingest_pb2.FrameAck, Any], Any] = lambda cloud, ack, frame: persisted(ack)
    credit_frames: int = 8
    credit_bytes: int = 1 << 20
    models: tuple[str, ...] = (MODEL, OTHER_MODEL)
    grants_again: bool = True
    welcomes: bool = True
    max_frame_bytes: int = 0
    frames: list[tuple[Key, ingest_pb2.FrameUpload]] = field(default_factory=list)
    tombstones: list[tuple[Key, ingest_pb2.FrameTombstone]] = field(default_factory=list)
    hellos: list[ingest_pb2.Hello] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    drain_after: int = 0
    carried: list[list[int]] = field(default_factory=list)  # seqs of each stream's frames
    open_streams: int = 0
    most_open_streams: int = 0

    async def Upload(self, request_iterator: Any, context: Any) -> AsyncIterator[ingest_pb2.UploadResponse]:
        self.open_streams += 1
        self.most_open_streams = max(self.most_open_streams, self.open_streams)
        number = len(self.streams)
        self.streams.append("open")
        try:
            async for response in self._stream(request_iterator):
                yield response
            self.streams[number] = "half-closed"
        finally:
            self.open_streams -= 1

    async def _stream(self, requests: Any) -> AsyncIterator[ingest_pb2.UploadResponse]:
        sources: dict[int, tuple[str, int]] = {}
        models: dict[int, str] = {}
        credit_frames = credit_bytes = 0
        carried: list[int] = []
        self.carried.append(carried)
        first = await anext(requests)
        self._check(first.WhichOneof("message") == "hello", "the first message must be hello")
        self.hellos.append(first.hello)
        models.update({model.index: model.model_id for model in first.hello.models})
        if not self.welcomes:
            await asyncio.Event().wait()
        yield ingest_pb2.UploadResponse(
            welcome=ingest_pb2.Welcome(
                protocol_version=1, cloud_id="test", model_ids=self.models, max_frame_bytes=self.max_frame_bytes
            )
        )
        credit_frames, credit_bytes = self.credit_frames, self.credit_bytes
        yield grant(credit_frames, credit_bytes)
        seen = 0
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "source":
                sources[request.source.index] = (request.source.camera_id, request.source.epoch)
                continue
            if kind == "model":
                models[request.model.index] = request.model.model_id
                continue
            self._check(kind in ("frame", "tombstone"), f"unexpected {kind}")
            message = getattr(request, kind)
            self._check(message.source_index in sources, "unknown source index")
            self._check(credit_frames > 0 and credit_bytes > 0, "more than the credit")
            name = (*sources[message.source_index], message.seq)
            size = 0
            if kind == "frame":
                self._check(message.model_index in models, "unknown model index")
                coded = from_upload(message, models[message.model_index])
                self._check(message.payload_crc == payload_crc(coded), "payload CRC")
                self.frames.append((name, message))
                carried.append(message.seq)
                size = len(message.hyper) + len(message.latents)
            else:
                self.tombstones.append((name, message))
            credit_frames, credit_bytes = credit_frames - 1, credit_bytes - size
            ack = ingest_pb2.FrameAck(source_index=message.source_index, seq=message.seq)
            if kind == "tombstone":
                ack.outcome = message.outcome
            answer = self.answer(self, ack, message)
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                yield ingest_pb2.UploadResponse(acks=ingest_pb2.Acks(acks=[answer]))
                if self.grants_again:
                    yield grant(1, size)
                    credit_frames, credit_bytes = credit_frames + 1, credit_bytes + size
            seen += 1
            if seen == self.drain_after:
                yield ingest_pb2.UploadResponse(drain=ingest_pb2.Drain(reason="test", grace_ms=10_000))

    def _check(self, good: bool, what: str) -> None:
        if not good:
            self.faults.append(what)


def grant(frames: int, size: int) -> ingest_pb2.UploadResponse:
    return ingest_pb2.UploadResponse(credit=ingest_pb2.CreditGrant(frames=frames, bytes=size))


def received(ack: ingest_pb2.FrameAck) -> ingest_pb2.FrameAck:
    ack.state = ingest_pb2.ACK_STATE_RECEIVED
    return ack


def persisted(ack: ingest_pb2.FrameAck) -> ingest_pb2.FrameAck:
    ack.state = ingest_pb2.ACK_STATE_PERSISTED
    ack.outcome = ack.outcome or common_pb2.OUTCOME_DETECTIONS
    return ack


def later(ack: ingest_pb2.FrameAck, reason: int, after_ms: int) -> ingest_pb2.FrameAck:
    ack.state = ingest_pb2.ACK_STATE_RETRY_LATER
    ack.retry_reason = reason  # type: ignore[assignment]
    ack.retry_after_ms = after_ms
    return ack


@asynccontextmanager
async def serving(cloud: Cloud, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    ingest_pb2_grpc.add_IngestServiceServicer_to_server(cloud, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


def draft(number: int, *, camera: str = "door", model: str = MODEL, size: int = 400, expires_us: int = 0) -> Draft:
    noise = random.Random(number).randbytes(size)
    stream = Bitstream(model, 1024, 480, 640, noise[:100], noise[100:], number)
    return Draft(camera, 1_700_000_000_000_000 + number, expires_us, f"token-{number}", noise[:32], stream)


class Edge:
    """A spool and its uplink."""

    def __init__(self, path: Path, port: int, stall_s: float, poison_after: int) -> None:
        self.registry = CollectorRegistry()
        self.spool = Spool(path, LIMITS)
        self.metrics = EdgeMetrics(self.registry, lambda: self.spool.stats)
        self.uplink = Uplink(
            self.spool,
            self.metrics,
            lambda: open_channel(f"127.0.0.1:{port}", None, max_message_bytes=1 << 25),
            edge_id="edge",
            model_ids=[MODEL],
            backoff_max_s=0.5,
            stall_s=stall_s,
            poison_after=poison_after,
        )

    async def put(self, count: int, **options: Any) -> list[Key]:
        placed = [await self.spool.put(draft(number, **options)) for number in range(count)]
        return [(each.name.camera_id, each.name.epoch, each.name.seq) for each, _ in placed]

    async def empty(self, within_s: float = 30) -> None:
        deadline = time.monotonic() + within_s
        while self.spool.stats.frames:
            assert time.monotonic() < deadline, f"{self.spool.stats.frames} frames were left"
            await asyncio.sleep(0.02)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def edge_to(
    port: int, path: Path, *, stall_s: float = 30, start: bool = True, poison_after: int = 5
) -> AsyncIterator[Edge]:
    edge = Edge(path, port, stall_s, poison_after)
    try:
        if start:
            edge.uplink.start()
        yield edge
    finally:
        await edge.uplink.close(2)
        await edge.spool.close()


async def until(true: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


async def test_frames_arrive_whole_in_order_and_leave_the_spool(path: Path) -> None:
    cloud = Cloud()
    async with serving(cloud) as port, edge_to(port, path) as edge:
        names = await edge.put(40)
        await edge.empty()
    assert cloud.faults == []
    assert [name for name, _ in cloud.frames] == names
    for number, (_, frame) in enumerate(cloud.frames):
        made = draft(number)
        assert from_upload(frame, MODEL) == made.bitstream
        assert (frame.capture_time_unix_us, frame.idempotency_token) == (made.captured_us, made.token)
        assert abs(frame.spooled_time_unix_us - wall_clock_us()) < 60_000_000
        assert frame.resends == 0
    hello = cloud.hellos[0]
    assert (hello.protocol_version, hello.edge_id) == (1, "edge")
    assert [(model.index, model.model_id) for model in hello.models] == [(0, MODEL)]
    assert hello.boot_id != 0


async def test_several_cameras_and_models_are_announced_once_each(path: Path) -> None:
    cloud = Cloud()
    async with serving(cloud) as port, edge_to(port, path) as edge:
        for camera in ("a", "b"):
            for model in (MODEL, OTHER_MODEL):
                for number in range(3):
                    await edge.spool.put(dataclasses.replace(draft(number, camera=camera, model=model), token=""))
        await edge.empty()
    assert cloud.faults == []
    assert len(cloud.frames) == 12
    assert {name[0] for name, _ in cloud.frames} == {"a", "b"}


async def test_no_more_is_sent_than_credit_was_given(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: None, credit_frames=5)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(30)
        await until(lambda: len(cloud.frames) == 5)
        await asyncio.sleep(0.3)
        assert len(cloud.frames) == 5
        assert edge.count("sightline_edge_uplink_in_flight_frames") >= 5
        assert edge.spool.stats.frames == 30
    assert cloud.faults == []


async def test_a_frame_larger_than_the_credit_still_passes(path: Path) -> None:
    cloud = Cloud(credit_bytes=1000)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(4, size=50_000)
        await edge.empty()
    assert cloud.faults == []


async def test_frames_behind_a_slow_link_wait_for_it(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: None, credit_frames=5)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(30)
        await until(lambda: len(cloud.frames) == 5)
        assert edge.uplink.waiting_for_link(30) == 30


async def test_frames_behind_a_slow_cloud_do_not_wait_for_the_link(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: received(ack), credit_frames=5, grants_again=False)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(30)
        await until(lambda: edge.count("sightline_edge_uplink_acks_total", kind="received", reason="") == 5)
        assert edge.uplink.waiting_for_link(30) == 0


async def test_frames_that_the_cloud_wants_later_do_not_wait_for_the_link(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: later(ack, ingest_pb2.RETRY_REASON_OVERLOADED, 60_000))
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(30)
        await until(lambda: edge.uplink.waiting_for_link(30) == 0)


async def test_without_a_cloud_all_frames_wait_for_the_link(path: Path) -> None:
    async with edge_to(1, path) as edge:
        assert edge.uplink.waiting_for_link(30) == 30


async def test_received_is_not_enough_to_forget_a_frame(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: received(ack))
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(3)
        await until(lambda: edge.count("sightline_edge_uplink_acks_total", kind="received", reason="") == 3)
        assert edge.spool.stats.frames == 3
        assert len(await edge.spool.take(0, frames=10, max_bytes=1 << 30)) == 3


async def test_what_has_no_final_ack_when_a_stream_breaks_is_sent_again_in_order(path: Path) -> None:
    broken = 0

    def answer(cloud: Cloud, ack: ingest_pb2.FrameAck, frame: Any) -> Any:
        nonlocal broken
        if len(cloud.frames) in (5, 11, 17):
            broken += 1
            return RuntimeError("the cloud falls over")
        return persisted(ack) if len(cloud.frames) % 2 else None  # every other one is left without answer

    cloud = Cloud(answer=answer)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        names = await edge.put(12)
        await until(lambda: broken == 3)
        cloud.answer = lambda cloud, ack, frame: persisted(ack)
        await until(lambda: len({name for name, _ in cloud.frames}) == 12)
        # Frames that were passed over in silence on the last stream are sent on the next.
        await edge.uplink.close(0.2)
    assert broken == 3
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.empty()
    assert cloud.faults == []
    assert {name for name, _ in cloud.frames} == set(names)
    assert max(frame.resends for _, frame in cloud.frames) >= 1
    per_stream_order = [name[2] for name, _ in cloud.frames]
    assert per_stream_order[:5] == [1, 2, 3, 4, 5]


async def test_a_cloud_that_is_not_there_yet_or_again_is_found(path: Path) -> None:
    cloud = Cloud()
    async with serving(cloud) as port:
        pass
    async with edge_to(port, path) as edge:
        names = await edge.put(5)
        await until(lambda: edge.count("sightline_edge_uplink_connects_total", end="unavailable") >= 2)
        assert edge.count("sightline_edge_uplink_connected") == 0
        async with serving(cloud, port):
            await edge.empty()
            assert edge.count("sightline_edge_uplink_connected") == 1
        await until(lambda: edge.count("sightline_edge_uplink_connected") == 0)
        names += [name for name in await edge.put(5, camera="gate")]
        async with serving(cloud, port):
            await edge.empty()
    assert {name for name, _ in cloud.frames} == set(names)


def test_pauses_between_attempts_double_up_to_a_bound_and_differ_between_edges() -> None:
    pauses = [pause_s(failures, 30.0, 1.0) for failures in range(12)]
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0, 30.0]
    assert pause_s(3, 30.0, 0.5) == 0.8
    assert pause_s(10**6, 30.0, 0.5) == 15.0


async def test_a_rejected_frame_is_final_and_kept_for_people(path: Path) -> None:
    def answer(cloud: Cloud, ack: ingest_pb2.FrameAck, frame: Any) -> Any:
        if frame.seq == 2:
            ack.state = ingest_pb2.ACK_STATE_REJECTED
            ack.outcome = common_pb2.OUTCOME_REJECTED
            ack.reject_reason = ingest_pb2.REJECT_REASON_SYMBOLS_CRC
            ack.detail = "expected 1, got 2"
            return ack
        return persisted(ack)

    cloud = Cloud(answer=answer)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        for number in range(3):
            _, final = await edge.spool.put(draft(number), watch=True)
            assert final is not None
            end = await asyncio.wrap_future(final)
            assert end.outcome is (Outcome.REJECTED if number == 1 else Outcome.DETECTIONS)
        assert edge.count("sightline_edge_uplink_acks_total", kind="rejected", reason="symbols_crc") == 1
        rows = edge.spool._file._db.execute("SELECT seq, reason FROM quarantine").fetchall()  # type: ignore[union-attr]
        assert rows == [(2, "expected 1, got 2")]
        assert edge.spool.stats.frames == 0
    assert len(cloud.frames) == 3


async def test_retry_later_pauses_and_then_sends_again_in_order(path: Path) -> None:
    refused: list[float] = []

    def answer(cloud: Cloud, ack: ingest_pb2.FrameAck, frame: Any) -> Any:
        if len(refused) < 3:
            refused.append(time.monotonic())
            return later(ack, ingest_pb2.RETRY_REASON_OVERLOADED, 400)
        return persisted(ack)

    cloud = Cloud(answer=answer, credit_frames=1)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        await edge.put(6)
        await edge.empty()
    assert cloud.faults == []
    assert refused[1] - refused[0] >= 0.35
    seqs = [name[2] for name, _ in cloud.frames]
    assert seqs == [1, 1, 1, 1, 2, 3, 4, 5, 6]


async def test_a_model_the_cloud_lacks_holds_back_only_its_own_frames(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.uplink.MODEL_PAUSE_S", 1.0)
    has_it = False

    def answer(cloud: Cloud, ack: ingest_pb2.FrameAck, frame: Any) -> Any:
        if frame.model_index == 1 and not has_it:
            return later(ack, ingest_pb2.RETRY_REASON_UNKNOWN_MODEL, 100)
        return persisted(ack)

    cloud = Cloud(answer=answer, models=(MODEL,))
    async with serving(cloud) as port, edge_to(port, path, start=False) as edge:
        await edge.put(3, camera="old", model=OTHER_MODEL)
        await edge.put(3, camera="new", model=MODEL)
        edge.uplink.start()
        await until(lambda: edge.spool.stats.frames == 3)
        assert {entry.name.camera_id for entry in await edge.spool.take(0, frames=9, max_bytes=1 << 30)} == {"old"}
        has_it = True
        await edge.empty()
    assert cloud.faults == []


async def test_a_draining_cloud_is_left_for_the_next_stream_first(path: Path) -> None:
    cloud = Cloud(drain_after=10)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        names = await edge.put(35)
        await edge.empty()
        await until(lambda: cloud.streams.count("half-closed") >= 3)
    assert cloud.faults == []
    assert [name for name, _ in cloud.frames] == names  # nothing was sent twice
    assert cloud.most_open_streams == 2


async def test_a_cloud_that_takes_frames_and_never_answers_is_given_up(path: Path) -> None:
    cloud = Cloud(answer=lambda cloud, ack, frame: None)
    async with serving(cloud) as port, edge_to(port, path, stall_s=1) as edge:
        await edge.put(3)
        await until(lambda: edge.count("sightline_edge_uplink_connects_total", end="stalled") >= 1)
        cloud.answer = lambda cloud, ack, frame: persisted(ack)
        await edge.empty()
    assert len(cloud.frames) == 6


async def test_a_cloud_that_never_welcomes_is_given_up(path: Path) -> None:
    cloud = Cloud(welcomes=False)
    async with serving(cloud) as port, edge_to(port, path, stall_s=1) as edge:
        await edge.put(1)
        await until(lambda: edge.count("sightline_edge_uplink_connects_total", end="stalled") >= 1)
        cloud.welcomes = True
        await edge.empty()


async def test_a_silent_cloud_that_owes_nothing_is_kept(path: Path) -> None:
    cloud = Cloud()
    async with serving(cloud) as port, edge_to(port, path, stall_s=1) as edge:
        await edge.put(1)
        await edge.empty()
        await asyncio.sleep(2.5)
        await edge.put(2, camera="gate")
        await edge.empty()
    assert len(cloud.streams) == 1


async def test_expired_frames_are_told_without_their_payload(path: Path) -> None:
    cloud = Cloud()
    async with serving(cloud) as port, edge_to(port, path, start=False) as edge:
        placed, final = await edge.spool.put(draft(1, expires_us=wall_clock_us() - 1), watch=True)
        await edge.spool.put(draft(2))
        edge.uplink.start()
        await edge.empty()
        assert final is not None
        assert final.result(timeout=0).outcome is Outcome.EXPIRED
    assert cloud.faults == []
    ((name, tombstone),) = cloud.tombstones
    assert name == (placed.name.camera_id, placed.name.epoch, placed.name.seq)
    assert tombstone.outcome == common_pb2.OUTCOME_EXPIRED
    assert "older" in tombstone.reason
    assert len(cloud.frames) == 1


async def test_a_frame_the_cloud_would_choke_on_is_told_as_rejected_and_does_not_stop_the_rest(path: Path) -> None:
    cloud = Cloud(max_frame_bytes=1000)
    async with serving(cloud) as port, edge_to(port, path) as edge:
        placed, final = await edge.spool.put(draft(7, size=1001), watch=True)
        await edge.put(2, size=1000)
        await edge.empty()
        assert final is not None
        assert final.result(timeout=0).outcome is Outcome.REJECTED
        rows = edge.spool._file._db.execute("SELECT seq FROM quarantine").fetchall()  # type: ignore[union-attr]
        assert rows == [(placed.name.seq,)]
    assert cloud.faults == []
    ((_, tombstone),) = cloud.tombstones
    assert tombstone.outcome == common_pb2.OUTCOME_REJECTED
    assert "expected at most 1000 bytes of streams, as the cloud takes, got 1001" in tombstone.reason
    assert len(cloud.frames) == 2


async def test_a_frame_that_the_cloud_falls_over_is_sent_alone_then_given_up_and_the_rest_passes(path: Path) -> None:
    falls = 0
    fell = asyncio.Event()

    def answer(cloud: Cloud, ack: ingest_pb2.FrameAck, frame: Any) -> Any:
        nonlocal falls
        ack.state = ingest_pb2.ACK_STATE_RECEIVED
        if frame.seq == 7 and not cloud.tombstones:
            falls += 1
            asyncio.get_running_loop().call_later(0.1, fell.set)
            return ack
        return ack if frame.seq == 6 and falls < 2 else persisted(ack)

    cloud = Cloud(answer=answer)

    async def fall_and_come_back(port: int) -> None:
        while True:
            fell.clear()
            async with serving(cloud, port):
                await fell.wait()

    async with serving(cloud) as port:
        pass
    coming = asyncio.create_task(fall_and_come_back(port))
    async with edge_to(port, path, start=False, poison_after=2) as edge:
        names = await edge.put(12)
        edge.uplink.start()
        await edge.empty(within_s=120)
        assert edge.count("sightline_edge_uplink_poison_frames_total") == 1
        rows = edge.spool._file._db.execute("SELECT seq, reason FROM quarantine").fetchall()  # type: ignore[union-attr]
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    assert cloud.faults == []
    assert rows == [(7, "the cloud was lost 3 times while it worked on this frame alone")]
    ((buried, tombstone),) = cloud.tombstones
    assert (buried[2], tombstone.outcome) == (7, common_pb2.OUTCOME_REJECTED)
    assert {name for name, _ in cloud.frames} == set(names)
    fatal = [seqs for seqs in cloud.carried if 7 in seqs]
    assert falls == len(fatal) >= 5
    assert [seqs[-1] for seqs in fatal[-3:]] == [7, 7, 7], "something was sent beside a suspect"
    assert fatal[-1] == [7]
    assert fatal[-3] == [6, 7], "6 was under way at as many falls, and passed alone"


async def test_closing_takes_the_acks_of_what_is_under_way(path: Path) -> None:
    slow: list[ingest_pb2.FrameAck] = []
    cloud = Cloud(answer=lambda cloud, ack, frame: slow.append(ack), credit_frames=64)
    async with serving(cloud) as port:
        async with edge_to(port, path) as edge:
            await edge.put(5)
            await until(lambda: len(cloud.frames) == 5)
        # Nothing was acknowledged: all five are still there for the next life.
        cloud.answer = lambda cloud, ack, frame: persisted(ack)
        async with edge_to(port, path) as edge:
            assert edge.spool.stats.frames == 5
            await edge.empty()
    assert len(cloud.frames) == 10


async def test_an_uplink_whose_files_are_missing_goes_on_trying(path: Path) -> None:
    tries = 0

    def no_files() -> grpc.aio.Channel:
        nonlocal tries
        tries += 1
        raise InvalidSettings("no file yet")

    async with edge_to(9, path, start=False) as edge:
        edge.uplink._open_channel = no_files
        edge.uplink.start()
        await until(lambda: tries >= 2)
