"""The peer services: what one would write in an afternoon, over the same gRPC, in a process of their own.

echo     takes a picture, commits it to SQLite with the same durability as the spool, answers a few bytes
detect   takes a JPEG, decodes it, runs the task model on it, answers boxes as JSON: no codec, batch or log
"""

import asyncio
import io
import json
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

CALL = "/plain.Service/Call"
_Answer = Callable[[bytes, Any], Awaitable[bytes]]


@contextmanager
def echo(folder: Path) -> Iterator[int]:
    """Its port."""
    with _child(_make_echo, folder) as port:
        yield port


@contextmanager
def detect(task: str, threads: int) -> Iterator[int]:
    """Its port. `task`: as `cloud.tasks.loading.load_task` knows it."""
    with _child(_make_detect, task, threads) as port:
        yield port


def stub(channel: grpc.aio.Channel) -> Any:
    """A picture's bytes in, an answer's bytes out."""
    return channel.unary_unary(CALL, request_serializer=None, response_deserializer=None)


def _make_echo(folder: Path) -> _Answer:
    from concurrent.futures import ThreadPoolExecutor

    def opened() -> sqlite3.Connection:
        db = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE TABLE frames (payload BLOB)")
        return db

    thread = ThreadPoolExecutor(1)
    db = thread.submit(opened).result()

    async def answer(request: bytes, _: Any) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(thread, db.execute, "INSERT INTO frames VALUES (?)", (request[:12_000],))
        return b"kept"

    return answer


def _make_detect(name: str, threads: int) -> _Answer:
    import numpy as np
    import torch
    from PIL import Image

    from cloud.tasks.loading import load_task

    torch.set_num_threads(threads)
    task = load_task(name, threads=threads)
    turn = threading.Lock()

    def see(data: bytes) -> bytes:
        with turn:
            rgb = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            start = time.perf_counter()
            found = task.predict([torch.from_numpy(rgb).permute(2, 0, 1)], 0.1)[0]
            task_s = time.perf_counter() - start
        boxes = {"boxes": found.boxes.tolist(), "scores": found.scores.tolist(), "labels": found.labels}
        return json.dumps(boxes | {"task_s": task_s}).encode()

    async def answer(request: bytes, _: Any) -> bytes:
        return await asyncio.to_thread(see, request)

    return answer


@contextmanager
def _child(make: Callable[..., _Answer], *arguments: Any) -> Iterator[int]:
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    process = spawned.Process(target=_serve, args=(theirs, make, *arguments), daemon=True)
    process.start()
    try:
        yield ours.recv()
        ours.send("end")
        process.join(30)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _serve(told: Connection, make: Callable[..., _Answer], *arguments: Any) -> None:
    async def serve() -> None:
        handler = grpc.unary_unary_rpc_method_handler(make(*arguments))
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 32 << 20)])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("plain.Service", {"Call": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        told.send(port)
        await asyncio.to_thread(told.recv)
        await server.stop(0)

    asyncio.run(serve())
