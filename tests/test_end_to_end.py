"""Edge and cloud as the two processes an operator runs: pictures in, detections out, whatever is killed on the way."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import grpc
import pytest
from PIL import Image
from sightline.v1 import common_pb2, detection_pb2, detection_pb2_grpc, edge_pb2, edge_pb2_grpc

from shared.codec.types import Frame

SIGHTLINE = Path(sysconfig.get_path("scripts")) / "sightline"
START_S = 600  # on a machine that is busy; a process that ends is noticed at once
ANSWER_S = 90


class Process:
    """`sightline SERVICE`, restartable on the same port and data; `name` tells several of one service apart."""

    def __init__(self, name: str, folder: Path, *flags: str, service: str = "") -> None:
        self.name = name
        self.service = service or name
        self.folder = folder
        self.flags = flags
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        ready = self.folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        command = [SIGHTLINE, self.service, "--listen", self.address, "--metrics-listen", "127.0.0.1:0"]
        command += ["--data-dir", self.folder / self.name, "--ready-file", ready, "--threads", "1", *self.flags]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)  # the file is the announcement; nothing else tells
        self.ready = json.loads(ready.read_text())

    def send(self, what: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(what)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.send(how)
        return self.process.wait(60)

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-4000:]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Process]:
    process = Process("cloud", tmp_path)
    process.start()
    yield process
    if process.process is not None and process.process.poll() is None:
        process.kill()


@pytest.fixture
def edge(tmp_path: Path, cloud: Process) -> Iterator[Process]:
    process = Process("edge", tmp_path, "--cloud", cloud.address)
    process.start()
    yield process
    if process.process is not None and process.process.poll() is None:
        process.kill()


def jpeg(frame: Frame, size: tuple[int, int] | None = None) -> bytes:
    image = Image.fromarray(frame.rgb)
    out = BytesIO()
    (image.resize(size) if size else image).save(out, "JPEG", quality=90)
    return out.getvalue()


def request(camera: str, data: bytes, delivery: int, token: str = "") -> edge_pb2.CompressRequest:
    options = edge_pb2.CompressOptions(quality=5, delivery=delivery)
    return edge_pb2.CompressRequest(camera_id=camera, encoded=data, options=options, idempotency_token=token)


Name = tuple[str, int, int]


def name_of(frame: common_pb2.FrameName) -> Name:
    return frame.camera_id, frame.epoch, frame.seq


async def events_until(address: str, wanted: set[Name]) -> list[detection_pb2.DetectionEvent]:
    """The log from its beginning until every wanted frame was seen."""
    found: list[detection_pb2.DetectionEvent] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = detection_pb2_grpc.DetectionServiceStub(channel)
        ask = detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
        stream = stub.Subscribe(ask, timeout=ANSWER_S)
        missing = set(wanted)
        async for answer in stream:
            if answer.WhichOneof("message") == "event":
                found.append(answer.event)
                missing.discard(name_of(answer.event.frame))
            if not missing:
                break
        stream.cancel()
    return found


async def test_a_photograph_goes_through_both_processes_and_its_person_comes_out(
    edge: Process, cloud: Process, astronaut: Frame
) -> None:
    async with grpc.aio.insecure_channel(edge.address) as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)
        ask = request("front-door", jpeg(astronaut), edge_pb2.DELIVERY_PERSISTED)
        receipt = (await stub.Compress(ask, timeout=ANSWER_S)).receipt
        assert receipt.state == edge_pb2.RECEIPT_STATE_PERSISTED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Compress(request("front-door", b"not an image", edge_pb2.DELIVERY_SPOOLED), timeout=ANSWER_S)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    [event] = await events_until(cloud.address, {name_of(receipt.frame)})
    assert event.frame == receipt.frame
    assert event.outcome == common_pb2.OUTCOME_DETECTIONS
    labels = {d.label for result in event.results for d in result.detections if d.score >= 0.3}
    assert "person" in labels
    assert receipt.coded_bytes < len(jpeg(astronaut)) / 2
    for process in (edge, cloud):
        assert process.kill(signal.SIGTERM) == 0, process.log()
