"""A frame that kills the true cloud, as a process, whenever it is worked on: it is given up, and all others pass."""

# ruff: noqa: ASYNC110 - the spool tells nobody when it is empty

import asyncio
import multiprocessing
import os
import re
import signal
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from sightline.v1 import common_pb2, detection_pb2, detection_pb2_grpc, edge_pb2

from bench.chaos_house import free_address
from bench.chaos_parts import name_of, subscription
from edge.server import Edge
from edge.settings import EdgeSettings
from tests.cloud.harness import spot_frame
from tests.house import send

POISON = 3  # seq


def mortal_cloud(folder: Path, address: str) -> None:
    """`sightline cloud`, which dies as of a fault in native code when the networks get that frame."""
    from cloud.pipeline import Pipeline
    from cloud.server import serve
    from cloud.settings import CloudSettings

    see = Pipeline._see

    async def die(pipeline: Pipeline, frame):  # type: ignore[no-untyped-def]
        if frame.name.seq == POISON:
            await asyncio.sleep(0.1)  # RECEIVED is on its way, as it is long before a network begins
            os.kill(os.getpid(), signal.SIGKILL)
        return await see(pipeline, frame)

    Pipeline._see = die  # type: ignore[method-assign]
    settings = CloudSettings.load(
        listen=address, metrics_listen="", data_dir=folder / "cloud", threads=1, unpack_threads=1, log_level="error"
    )
    asyncio.run(serve(settings))


async def every_event(address: str, count: int) -> dict[int, detection_pb2.DetectionEvent]:
    """The first `count` records of the log, by seq."""
    seen: dict[int, detection_pb2.DetectionEvent] = {}
    log_id, sequence = "", 0
    while len(seen) < count:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = detection_pb2_grpc.DetectionServiceStub(channel)
            with suppress(grpc.aio.AioRpcError):  # it is dead just now
                async for answer in stub.Subscribe(subscription(log_id, sequence)):
                    if answer.WhichOneof("message") == "event":
                        log_id, sequence = answer.event.cursor.log_id, answer.event.cursor.sequence
                        assert name_of(answer.event.frame)[2] not in seen
                        seen[answer.event.frame.seq] = answer.event
                        if len(seen) == count:
                            break
        await asyncio.sleep(0.1)
    return seen


def metrics_page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        return str(page.read().decode())


@pytest.mark.slow(reason="starts the cloud five times, each as a fresh process")
async def test_a_frame_that_kills_the_cloud_is_quarantined_and_every_other_one_is_seen(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["cloud.server"])
    address, deaths = free_address(), 0

    async def keep_alive() -> None:
        nonlocal deaths
        while True:
            process = forked.Process(target=mortal_cloud, args=(tmp_path, address), daemon=True)
            await asyncio.to_thread(process.start)
            try:
                while process.is_alive():
                    await asyncio.sleep(0.1)
                assert process.exitcode == -signal.SIGKILL
                deaths += 1
            finally:
                process.kill()

    settings = EdgeSettings.load(
        listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", cloud=address, data_dir=tmp_path / "edge", threads=1,
        uplink_backoff_max_s=0.5, uplink_poison_after=1, log_level="error",
    )  # fmt: skip
    edge = await Edge.start(settings)
    try:
        for left in range(6):
            await send(edge, spot_frame(left=left), edge_pb2.DELIVERY_SPOOLED)
        cloud = asyncio.create_task(keep_alive())
        async with asyncio.timeout(900):
            events = await every_event(address, 6)
            while edge.spool.stats.frames:
                await asyncio.sleep(0.1)
            (kept,) = await edge.spool.quarantined(0, 10)
        page = await asyncio.to_thread(metrics_page, edge.server.metrics_port)
        cloud.cancel()
        await asyncio.gather(cloud, return_exceptions=True)
    finally:
        await edge.close()
    assert deaths == 4  # once in company, three times alone
    assert (kept.seq, kept.bitstream.height) == (POISON, 64)
    assert "while it worked on this frame alone" in kept.reason
    assert re.search(r"^sightline_edge_uplink_poison_frames_total(\{.*\})? 1\.0$", page, re.MULTILINE)
    outcomes = {seq: event.outcome for seq, event in events.items()}
    assert outcomes.pop(POISON) == common_pb2.OUTCOME_REJECTED
    assert set(outcomes.values()) == {common_pb2.OUTCOME_DETECTIONS}
