"""The processes that `bench.chaos` kills: edge and cloud as `sightline` runs them, cameras and consumers as users do.

Each is a process of its own that tells what it has by lines of JSON on stdout, a pipe to the bench. A line is one
write, shorter than PIPE_BUF, so that a SIGKILL leaves it whole or not at all. What a part must remember over its own
death (a camera's next token, a consumer's cursor) is what its last line said; the next life is started with it.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
from sightline.v1 import common_pb2, detection_pb2, detection_pb2_grpc, edge_pb2, edge_pb2_grpc

SIDE = 64  # pixels
RETRY_S = 0.1
CALL_S = 60.0
AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


def service(out: Connection, orders: Connection, log: Path, kind: str, flags: dict[str, Any]) -> None:
    """`sightline edge` or `sightline cloud` with these settings; an order names the step to die at."""
    from bench.chaos_steps import Steps, mark_cloud, mark_edge

    steps = Steps()
    _begin(out, orders, log, steps.arm)
    if kind == "edge":
        from edge.server import serve as serve_edge
        from edge.settings import EdgeSettings

        mark_edge(steps)
        asyncio.run(serve_edge(EdgeSettings.load(**flags)))
    else:
        from cloud.server import serve as serve_cloud
        from cloud.settings import CloudSettings

        mark_cloud(steps, flags.get("log", "sqlite"))
        asyncio.run(serve_cloud(CloudSettings.load(**flags)))


def camera(
    out: Connection,
    orders: Connection,
    log: Path,
    address: str,
    camera_id: str,
    first: int,
    again: bool,
    order: str,
    pause_s: float,
) -> None:
    """Sends frame after frame, each until it holds a SPOOLED receipt; between two it obeys "go" and "rest ...".

    `again`: it has lived before. That life may have sent frame `first` and died before it had the answer, so this one
    asks for it whatever the order is: a receipt that nobody was told would look like a frame that nobody sent.
    """
    inbox: SimpleQueue[str] = SimpleQueue()
    _begin(out, orders, log, inbox.put)
    with grpc.insecure_channel(address, options=_CHANNEL) as channel:
        stub = edge_pb2_grpc.EdgeServiceStub(channel)
        _say(ready=True)
        for token in itertools.count(first):
            while not (again and token == first) and (order != "go" or not inbox.empty()):
                if inbox.empty():
                    _say(rests=order)
                order = inbox.get()
            receipt = _until_receipt(stub, frame_request(camera_id, token))
            _say(receipt=name_of(receipt.frame), token=token)
            time.sleep(pause_s)


def frame_request(camera_id: str, token: int) -> edge_pb2.CompressRequest:
    """Frame number `token` of a camera: the same picture each time it is asked for."""
    rng = random.Random(f"{camera_id} {token}")  # noqa: S311
    left, top, shade = rng.randrange(SIDE // 2), rng.randrange(SIDE // 2), rng.randrange(128, 256)
    rows = []
    for y in range(SIDE):
        row = bytearray(itertools.chain.from_iterable((2 * x, 2 * y, 64) for x in range(SIDE)))
        if top <= y < top + SIDE // 2:
            row[3 * left : 3 * (left + SIDE // 2)] = bytes([shade]) * (3 * SIDE // 2)
        rows.append(bytes(row))
    return edge_pb2.CompressRequest(
        camera_id=camera_id,
        raw=edge_pb2.RawImage(pixel_format=edge_pb2.PIXEL_FORMAT_RGB24, width=SIDE, height=SIDE, data=b"".join(rows)),
        options=edge_pb2.CompressOptions(delivery=edge_pb2.DELIVERY_SPOOLED),
        idempotency_token=f"{camera_id}-{token}",
    )


def _until_receipt(stub: Any, request: edge_pb2.CompressRequest) -> edge_pb2.Receipt:
    while True:
        try:
            receipt: edge_pb2.Receipt = stub.Compress(request, timeout=CALL_S).receipt
            return receipt
        except grpc.RpcError as error:
            if error.code() not in AGAIN:
                raise
            time.sleep(RETRY_S)


def consumer(
    out: Connection, orders: Connection, log: Path, addresses: Sequence[str], log_id: str, sequence: int
) -> None:
    """Follows the log from its cursor on, from whichever cloud answers."""
    _begin(out, orders, log)
    _say(ready=True)
    for address in itertools.cycle(addresses):
        with grpc.insecure_channel(address, options=_CHANNEL) as channel:
            stub = detection_pb2_grpc.DetectionServiceStub(channel)
            try:
                for answer in stub.Subscribe(subscription(log_id, sequence)):
                    if answer.WhichOneof("message") == "event":
                        event = answer.event
                        log_id, sequence = event.cursor.log_id, event.cursor.sequence
                        _say(event=name_of(event.frame), log_id=log_id, sequence=sequence)
            except grpc.RpcError as error:
                if error.code() not in AGAIN:
                    raise
        time.sleep(RETRY_S)


def subscription(log_id: str, sequence: int) -> detection_pb2.SubscribeRequest:
    """Everything after a cursor; from the beginning where there is none yet."""
    if not log_id:
        return detection_pb2.SubscribeRequest(position=detection_pb2.START_POSITION_BEGINNING)
    return detection_pb2.SubscribeRequest(after=detection_pb2.Cursor(log_id=log_id, sequence=sequence))


def name_of(frame: common_pb2.FrameName) -> tuple[str, int, int]:
    return frame.camera_id, frame.epoch, frame.seq


def _begin(out: Connection, orders: Connection, log: Path, obey: Callable[[str], None] = lambda _: None) -> None:
    """stdout becomes the pipe to the bench, stderr a file. Without the bench there is no reason to live on."""
    os.dup2(out.fileno(), 1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the bench, which ends its parts itself

    def listen() -> None:
        try:
            while True:
                obey(orders.recv())
        except EOFError:
            os._exit(3)

    threading.Thread(target=listen, name="orders", daemon=True).start()


def _say(**facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")
