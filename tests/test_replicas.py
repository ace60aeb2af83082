"""Edges, cloud replicas and brokers as processes behind a balancer: replicas come and are killed under load, so are
brokers, and every receipt ends as exactly one event that a consumer, moved from replica to replica, sees exactly once.
"""

# ruff: noqa: ASYNC110 - cameras and consumer are counted, nobody tells

import asyncio
import random
from collections import Counter
from contextlib import aclosing, suppress
from pathlib import Path

import numpy as np
import pytest

from bench.broker import Broker
from shared.clients.camera import AsyncCameraClient
from shared.clients.detection import AsyncDetectionClient
from shared.clients.retry import Retry
from shared.clients.types import CompressOptions, Delivery, DetectionEvent, FrameName, Outcome, Start
from shared.codec.types import Frame
from tests.test_end_to_end import Process, jpeg

PATIENT = Retry(first_s=0.1, max_s=1.0, give_up_s=None)
SEED = 5
WAIT_S = 900  # for anything at all: the test waits for what happens, on however busy a machine
MAX_BEHIND = 24  # receipts that the consumer has not seen, past which cameras wait: a small machine keeps up
AT_A_KILL = 8  # new receipts between two kills


class Balancer:
    """What stands before the replicas: gives each new connection to the one of those that answer that got fewest."""

    def __init__(self, replicas: list[Process]) -> None:
        self._replicas = replicas
        self.given: Counter[str] = Counter()

    async def __aenter__(self) -> "Balancer":
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for replica in sorted(self._replicas, key=lambda replica: self.given[replica.name]):
            with suppress(OSError):
                host, _, port = replica.address.rpartition(":")
                inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
                self.given[replica.name] += 1
                await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))
                return
        writer.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


class Watcher:
    """A consumer that reads the log from its beginning, wherever the balancer takes it."""

    def __init__(self, address: str) -> None:
        self.events: list[DetectionEvent] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._watch(address))

    async def _watch(self, address: str) -> None:
        async with (
            AsyncDetectionClient(address, retry=PATIENT) as client,
            aclosing(client.events(Start.BEGINNING)) as events,
        ):
            async for event in events:
                self.events.append(event)
                self._news.set()

    async def until_seen(self, frames: set[FrameName]) -> None:
        async with asyncio.timeout(WAIT_S):
            while frames - {event.frame for event in self.events}:
                assert not self.task.done(), self.task.exception()
                self._news.clear()
                await self._news.wait()


async def film(edge: Process, camera: str, picture: bytes, receipts: set[FrameName], watcher: Watcher) -> None:
    """Sends pictures to an edge for as long as it is let; rests while the consumer is far behind."""
    options = CompressOptions(delivery=Delivery.SPOOLED)
    async with AsyncCameraClient(edge.address, camera, options=options, retry=PATIENT) as client:
        while True:
            if len(receipts) - len(watcher.events) < MAX_BEHIND:
                frame = (await client.compress(picture)).frame
                assert frame is not None
                receipts.add(frame)
            await asyncio.sleep(0.1)


async def until_more(receipts: set[FrameName], count: int) -> None:
    """Returns once the cameras hold so many more receipts than now."""
    enough = len(receipts) + count
    async with asyncio.timeout(WAIT_S):
        while len(receipts) < enough:
            await asyncio.sleep(0.05)


@pytest.mark.slow(reason="nine processes, and elections of the brokers")
async def test_replicas_and_brokers_come_and_die_under_load_and_every_receipt_is_one_event(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    picture = jpeg(Frame(np.zeros((64, 64, 3), np.uint8)))
    receipts: set[FrameName] = set()
    running: list[Process] = []

    async def start(process: Process) -> Process:
        running.append(process)
        await asyncio.to_thread(process.start)
        return process

    def replica(label: str) -> Process:
        flags = ["--log", "jetstream", "--nats-servers", broker.servers, "--nats-monitoring", broker.monitoring]
        return Process(label, tmp_path, *flags, service="cloud")

    with Broker(tmp_path / "nats", nodes=3) as broker:
        try:
            replicas = list(await asyncio.gather(*(start(replica(f"replica-{i}")) for i in range(2))))
            async with Balancer(replicas) as balancer:
                edges = await asyncio.gather(
                    *(
                        start(Process(f"edge-{i}", tmp_path, "--cloud", balancer.address, service="edge"))
                        for i in (0, 1)
                    )
                )
                watcher = Watcher(balancer.address)
                cameras = [
                    asyncio.create_task(film(edge, f"{edge.name}-{side}", picture, receipts, watcher))
                    for edge in edges
                    for side in ("left", "right")
                ]
                for victim in (replicas[0], broker.nodes[rng.randrange(3)], "new", replicas[1], broker.nodes[0]):
                    await until_more(receipts, AT_A_KILL)
                    await asyncio.sleep(rng.uniform(0, 1))  # the random moment is the point of this test
                    if victim == "new":
                        replicas.append(await start(replica("replica-2")))
                    else:
                        await asyncio.to_thread(victim.kill)
                        await asyncio.to_thread(victim.start)
                await until_more(receipts, AT_A_KILL)
                for camera in cameras:
                    assert not camera.done(), camera.exception()
                    camera.cancel()
                await asyncio.gather(*cameras, return_exceptions=True)
                await watcher.until_seen(receipts)
                watcher.task.cancel()
        finally:
            for process in running:
                if process.process is not None and process.process.poll() is None:
                    process.kill()
    sequences = [event.cursor.sequence for event in watcher.events]
    frames = [event.frame for event in watcher.events]
    assert sequences == sorted(set(sequences)), "the consumer saw an event twice, or out of order"
    assert len(frames) == len(set(frames)), "a frame has two terminal records"
    # What a camera that was stopped had no receipt for yet may be there too.
    assert receipts <= set(frames)
    assert len(set(frames) - receipts) <= 4
    assert {event.outcome for event in watcher.events} == {Outcome.DETECTIONS}
    assert len(balancer.given) == 3, f"edges and consumer were not spread: {balancer.given}"
