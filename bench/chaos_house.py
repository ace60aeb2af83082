"""The house that `bench.chaos` sets on fire: its parts as processes, and the books that tell whether anything was lost.

    cameras --> edges --> cloud (log) --> consumers        each a process that may be killed at any moment
       |                       |             |
       `--- receipts        records          `--- events   told to the books of this process, which is not killed

What must be true once everything receipted has had its time:
  * every name on a receipt has one record in the log, and that is DETECTIONS;
  * no record has a name that no camera was ever told: a retry with its token has made no second frame;
  * every consumer was shown every record, each after its cursor, though it was killed and resumed.

The parts are forked from a server process that has imported what they need and started nothing (multiprocessing's
forkserver), because importing torch takes longer than all else of a start. Each is a process with its own memory, and
SIGKILL is the kernel's.
"""

import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import grpc
from sightline.v1 import common_pb2, detection_pb2_grpc

from bench.chaos_parts import camera, consumer, name_of, service, subscription

START_S = 600.0  # on a machine that is busy with other things; nothing is timed here
SETTLE_S = 600.0
Name = tuple[str, int, int]

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["edge.server", "cloud.server", "bench.chaos_parts", "bench.chaos_steps"])


class PartFailed(Exception):
    """A part ended by itself, or did not start, with the end of what it wrote on stderr."""


class Part:
    """One process that is started again whenever it dies. `arguments` are asked for at each start."""

    def __init__(
        self,
        kind: str,
        name: str,
        folder: Path,
        target: Callable[..., None],
        arguments: Callable[[], tuple[Any, ...]],
        on_line: Callable[[dict[str, Any]], None],
    ) -> None:
        self.kind = kind
        self.name = name
        self.lives = 0
        self.up = asyncio.Event()
        self.dead = asyncio.Event()
        self._log = folder / f"{name}.log"
        self._target = target
        self._arguments = arguments
        self._on_line = on_line
        self._process: ForkServerProcess | None = None
        self._orders: Connection | None = None
        self._doomed = False

    @property
    def alive(self) -> bool:
        """There is a process to kill; it need not be ready."""
        return self._process is not None and not self._doomed

    def kill(self) -> None:
        """SIGKILL, now."""
        if self._process is not None:
            self._doomed = True
            self.up.clear()
            self._process.kill()

    def arm(self, step: str) -> None:
        """It dies when a frame comes to this step."""
        self._doomed = True
        self.order(step)

    def order(self, what: str) -> None:
        """Tells it something, if it lives to hear it."""
        if self._orders is not None:
            with suppress(OSError):
                self._orders.send(what)

    async def live(self) -> None:
        """Starts it again and again. Raises PartFailed."""
        while True:
            await self._live_once()

    async def _live_once(self) -> None:
        out, told = _forked.Pipe(duplex=False)
        ordered, self._orders = _forked.Pipe(duplex=False)
        self._doomed = False
        self.dead.clear()
        process = _forked.Process(
            target=self._target, args=(told, ordered, self._log, *self._arguments()), name=self.name, daemon=True
        )
        await asyncio.to_thread(process.start)
        self._process = process
        told.close()
        ordered.close()
        self.lives += 1
        try:
            await self._listen(out)
            await asyncio.to_thread(process.join)
        finally:
            process.kill()
            self._process = None
            self.up.clear()
            self.dead.set()
            self._orders.close()
            out.close()
        if not self._doomed:
            raise PartFailed(f"{self.name} ended with {process.exitcode}:\n{self.last_words()}")

    async def _listen(self, out: Connection) -> None:
        """Until the pipe breaks, which is the death of the process."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(out.fileno()), "rb")
        )
        try:
            async for line in reader:
                facts = json.loads(line)
                if not facts.get("ready"):
                    self._on_line(facts)
                elif not self._doomed:
                    self.up.set()
        finally:
            transport.close()

    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""


class BrokerNode:
    """A NATS server as a part: the same to kill and to wait for, without steps and orders."""

    kind = "broker"

    def __init__(self, node: Any) -> None:
        self.name = node.name
        self.up = asyncio.Event()
        self.dead = asyncio.Event()
        self._node = node

    @property
    def alive(self) -> bool:
        """There is a process to kill; it need not be ready."""
        return self._node.process is not None and self._node.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, now."""
        if self.alive:
            self.up.clear()
            self._node.process.kill()

    async def live(self) -> None:
        """Starts it again and again. Raises RuntimeError."""
        while True:
            self.dead.clear()
            await asyncio.to_thread(self._node.start)
            self.up.set()
            await asyncio.to_thread(self._node.process.wait)
            self.up.clear()
            self.dead.set()


@dataclass(frozen=True, slots=True)
class Found:
    """What was wrong, as names; all empty where nothing was lost."""

    lost: frozenset[Name]
    doubled: frozenset[Name]
    strangers: frozenset[Name]
    not_detections: frozenset[Name]
    missed: frozenset[Name]
    out_of_order: frozenset[Name]

    @property
    def nothing(self) -> bool:
        return not any((self.lost, self.doubled, self.strangers, self.not_detections, self.missed, self.out_of_order))


@dataclass
class Books:
    """What every part has said. `records`: name -> sequence; `shown`: of each consumer."""

    receipts: dict[Name, int] = field(default_factory=dict)
    records: dict[Name, int] = field(default_factory=dict)
    doubled: list[Name] = field(default_factory=list)
    not_detections: list[Name] = field(default_factory=list)
    shown: dict[str, set[Name]] = field(default_factory=dict)
    out_of_order: list[Name] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Something was added."""
        self.news.set()
        self.news = asyncio.Event()

    def check(self) -> Found:
        """What is wrong if everything that will come has come."""
        receipts, records = self.receipts.keys(), self.records.keys()
        return Found(
            lost=frozenset(receipts - records),
            doubled=frozenset(self.doubled),
            strangers=frozenset(records - receipts),
            not_detections=frozenset(self.not_detections),
            missed=frozenset(name for shown in self.shown.values() for name in records - shown),
            out_of_order=frozenset(self.out_of_order),
        )


class House:
    """All parts, running from `open` to `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        edges: int,
        cameras: int,
        consumers: int,
        pause_s: float,
        clouds: int = 1,
        brokers: int = 0,
    ) -> None:
        """`cameras`: of each edge. `brokers`: nodes of a JetStream that all clouds share; 0: one cloud, SQLite."""
        self.books = Books()
        self._folder = folder
        self._rests = 0
        self._order = "rest 0"
        self._resting: dict[str, str] = {}
        self._cursors: dict[str, tuple[str, int]] = {}
        self._tokens: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.cloud_addresses = [free_address() for _ in range(clouds)]
        self._log_flags: dict[str, Any] = {}
        self.parts: list[Part | BrokerNode] = [
            *self._brokers(brokers),
            *(self._cloud(address, i + 1) for i, address in enumerate(self.cloud_addresses)),
            *(part for i in range(edges) for part in self._edge(i + 1, cameras, pause_s)),
            *(self._consumer(i + 1) for i in range(consumers)),
        ]

    def of_kind(self, kind: str) -> list[Any]:
        return [part for part in self.parts if part.kind == kind]

    async def open(self) -> None:
        """Starts everything. Raises PartFailed."""
        self._tasks += [asyncio.create_task(part.live()) for part in self.parts]
        self._tasks.append(asyncio.create_task(self._audit()))
        await self.all_up()

    async def all_up(self) -> None:
        """Returns when every part is ready. Raises PartFailed, also if one does not become so."""
        if not await self.until(lambda: True, START_S, also=[part.up for part in self.parts]):
            down = next(part for part in self.parts if not part.up.is_set())
            words = down.last_words() if isinstance(down, Part) else ""
            raise PartFailed(f"{down.name} was not ready within {START_S:g} s:\n{words}")

    def go(self) -> None:
        """Lets the cameras send."""
        self._tell_cameras("go")

    async def until(self, condition: Callable[[], bool], limit_s: float, also: Sequence[asyncio.Event] = ()) -> bool:
        """Waits for news until `condition` holds; False when it does not in time. Raises PartFailed."""

        async def wait() -> None:
            for event in also:
                await event.wait()
            while not condition():
                await self.books.news.wait()

        waiting = asyncio.create_task(wait())
        ends = time.monotonic() + limit_s
        try:
            while not waiting.done():
                running = {task for task in self._tasks if not task.done()}
                left_s = ends - time.monotonic()
                done, _ = await asyncio.wait({waiting, *running}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {waiting}:
                    task.result()
                if not done:
                    return False
            return True
        finally:
            waiting.cancel()

    async def settle(self) -> Found:
        """Lets the cameras rest, waits until all they hold receipts for is in the log and before the consumers, and
        says what is not. Raises PartFailed."""
        self._rests += 1
        self._tell_cameras(f"rest {self._rests}")
        if not await self.until(lambda: {*self._resting.values()} == {self._order}, SETTLE_S):
            raise PartFailed(f"a camera got no receipt within {SETTLE_S:g} s: {self._resting}")
        books = self.books
        receipts = set(books.receipts)
        await self.until(lambda: receipts <= books.records.keys(), SETTLE_S)
        records = set(books.records)
        await self.until(lambda: all(records <= shown for shown in books.shown.values()), SETTLE_S)
        return books.check()

    async def close(self) -> None:
        for part in self.parts:
            part.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tell_cameras(self, order: str) -> None:
        self._order = order  # for those that start later
        for part in self.of_kind("camera"):
            part.order(order)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _brokers(self, count: int) -> list[BrokerNode]:
        if not count:
            return []
        from bench.broker import Broker

        broker = Broker(self._folder / "broker", nodes=count)
        self._log_flags = {"log": "jetstream", "log_replicas": count, "nats_servers": broker.servers}
        return [BrokerNode(node) for node in broker.nodes]

    def _cloud(self, address: str, number: int) -> Part:
        flags = {
            **self._service_flags(f"cloud-{number}", address),
            "cloud_id": f"cloud-{number}",
            "unpack_threads": 1,
            **self._log_flags,
        }
        return Part("cloud", f"cloud-{number}", self._folder, service, lambda: ("cloud", flags), lambda _: None)

    def _edge(self, number: int, cameras: int, pause_s: float) -> list[Part]:
        address = free_address()
        flags = {
            **self._service_flags(f"edge-{number}", address),
            "edge_id": f"edge-{number}",
            "cloud": self.cloud_addresses[number % len(self.cloud_addresses)],
            "uplink_backoff_max_s": 0.5,
            "workers": 1,
        }
        edge = Part("edge", f"edge-{number}", self._folder, service, lambda: ("edge", flags), lambda _: None)
        return [edge, *(self._camera(f"camera-{number}-{i + 1}", address, pause_s) for i in range(cameras))]

    def _service_flags(self, name: str, address: str) -> dict[str, Any]:
        return {
            "listen": address,
            "metrics_listen": "",
            "data_dir": str(self._folder / name),
            "threads": 1,
            "log_level": "warning",
        }

    def _camera(self, name: str, address: str, pause_s: float) -> Part:
        self._resting[name] = ""
        lives = itertools.count()

        def on_line(facts: dict[str, Any]) -> None:
            self._resting[name] = facts.get("rests", "")
            if "receipt" in facts:
                camera_id, epoch, seq = facts["receipt"]
                self._tokens[name] = facts["token"]
                self.books.receipts[camera_id, epoch, seq] = facts["token"]
            self.books.tell()

        return Part(
            "camera",
            name,
            self._folder,
            camera,
            lambda: (address, name, self._tokens.get(name, 0) + 1, next(lives) > 0, self._order, pause_s),
            on_line,
        )

    def _consumer(self, number: int) -> Part:
        name = f"consumer-{number}"
        shown: set[Name] = set()
        self.books.shown[name] = shown

        def on_line(facts: dict[str, Any]) -> None:
            camera_id, epoch, seq = facts["event"]
            if facts["sequence"] <= self._cursors.get(name, ("", 0))[1]:
                self.books.out_of_order.append((camera_id, epoch, seq))
            self._cursors[name] = facts["log_id"], facts["sequence"]
            shown.add((camera_id, epoch, seq))
            self.books.tell()

        return Part(
            "consumer",
            name,
            self._folder,
            consumer,
            lambda: (self.cloud_addresses, *self._cursors.get(name, ("", 0))),
            on_line,
        )

    # -- the auditor: this process, which reads the log like any consumer ------------------------------------------

    async def _audit(self) -> None:
        log_id, sequence = "", 0
        while True:
            for address in self.cloud_addresses:
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = detection_pb2_grpc.DetectionServiceStub(channel)
                    with suppress(grpc.aio.AioRpcError):
                        async for answer in stub.Subscribe(subscription(log_id, sequence)):
                            if answer.WhichOneof("message") == "event":
                                log_id, sequence = answer.event.cursor.log_id, answer.event.cursor.sequence
                                self._note(answer.event)
                await asyncio.sleep(0.1)

    def _note(self, event: Any) -> None:
        name = name_of(event.frame)
        if name in self.books.records:
            self.books.doubled.append(name)
        self.books.records[name] = event.cursor.sequence
        if event.outcome != common_pb2.OUTCOME_DETECTIONS:
            self.books.not_detections.append(name)
        self.books.tell()


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
