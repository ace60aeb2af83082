"""The consumer's client against a real cloud and log: resume without gap or double, cursors over runs, and Detect."""

import asyncio
import io
import os
import threading
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from cloud.masks import encode_mask
from shared.clients import (
    Cursor,
    CursorFile,
    DetectionClient,
    DetectionEvent,
    EventFilter,
    FrameName,
    Mask,
    Outcome,
    Progress,
    Retry,
    Start,
)
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Bitstream
from shared.errors import CursorMismatch, InvalidBitstream, InvalidInput, InvalidQuality, NotFound, Unavailable
from tests.cloud.conftest import StartCloud
from tests.cloud.harness import RunningCloud
from tests.shared.clients.conftest import Clients

PATIENT = Retry(give_up_s=60)


async def test_events_come_as_typed_values_with_what_the_cloud_found(
    start_cloud: StartCloud, clients: Clients, spot: Bitstream, red: Bitstream
) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        await edge.deliver("door", 1, spot)
        await edge.deliver("door", 2, red)
    consumer = clients.detections(f"127.0.0.1:{cloud.server.port}")
    async with aclosing(consumer.events(Start.BEGINNING)) as events:
        found, rejected = [await anext(events) for _ in range(2)]
    assert found.outcome is Outcome.DETECTIONS
    assert (found.frame.camera_id, found.frame.seq, found.width, found.height, found.quality) == ("door", 1, 64, 64, 8)
    assert found.capture_time.timestamp() == 1_700_000_000
    [kite] = found.detections
    assert (kite.label, kite.category_id, kite.score) == ("kite", 38, 0.75)
    assert kite.box.x_min == pytest.approx(16, abs=3)
    inside = np.argwhere(kite.mask.to_array())
    assert (inside.min(), inside.max()) == (pytest.approx(16, abs=3), pytest.approx(47, abs=3))
    assert rejected.outcome is Outcome.REJECTED
    assert rejected.detections == ()
    await clients.close()


async def test_a_subscription_outlives_its_cloud_without_gap_or_double(
    start_cloud: StartCloud, clients: Clients, spot: Bitstream
) -> None:
    cloud = await start_cloud()
    address = f"127.0.0.1:{cloud.server.port}"
    async with cloud.edge() as edge:
        await edge.deliver("door", 1, spot)
    consumer = clients.detections(address, retry=PATIENT)
    async with aclosing(consumer.events(Start.BEGINNING)) as events:
        seen = [await anext(events)]
        for life in range(2):
            await cloud.stop()
            cloud = await start_cloud(listen=address)
            async with cloud.edge() as edge:
                for i in range(3):
                    await edge.deliver("door", 2 + 3 * life + i, spot)
            seen += [await anext(events) for _ in range(3)]
    assert [event.frame.seq for event in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.cursor.sequence for event in seen] == sorted({event.cursor.sequence for event in seen})
    await clients.close()


async def test_the_next_run_goes_on_after_the_last_event_that_was_dealt_with(
    start_cloud: StartCloud, clients: Clients, spot: Bitstream, tmp_path: Path
) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        for seq in (1, 2, 3, 4):
            await edge.deliver("door", seq, spot)
    consumer = clients.detections(f"127.0.0.1:{cloud.server.port}")

    async def run(stop_in: int) -> list[int]:
        """Sequences seen by a run that dies while it handles event `stop_in`."""
        seen = []
        file = CursorFile(tmp_path / "cursor")
        async with aclosing(consumer.events(Start.BEGINNING, cursor_file=file)) as events:
            async for event in events:
                seen.append(event.frame.seq)
                if event.frame.seq == stop_in:
                    break
        return seen

    assert await run(2) == [1, 2]
    assert await run(4) == [2, 3, 4]
    assert CursorFile(tmp_path / "cursor").load() == Cursor(cloud.log.log_id, 3)
    assert [name for name in os.listdir(tmp_path) if "cursor" in name] == ["cursor"]
    await clients.close()


async def test_filters_hide_and_progress_says_so(start_cloud: StartCloud, clients: Clients, spot: Bitstream) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        for camera in ("left", "right"):
            await edge.deliver(camera, 1, spot)
    consumer = clients.detections(f"127.0.0.1:{cloud.server.port}")
    only_right = EventFilter(camera_ids=("right",), category_ids=(38,), min_score=0.7, outcomes=(Outcome.DETECTIONS,))
    async with aclosing(consumer.updates(Start.BEGINNING, only_right)) as updates:
        shown, end = await anext(updates), await anext(updates)
    assert isinstance(shown, DetectionEvent)
    assert shown.frame.camera_id == "right"
    assert end == Progress(Cursor(cloud.log.log_id, 2), caught_up=True)
    with pytest.raises(InvalidInput, match=r"min_score must be in \[0, 1\]"):
        await anext(consumer.events(event_filter=EventFilter(min_score=2)))
    await clients.close()


async def test_a_cursor_of_another_log_and_a_cloud_that_stays_away_are_told(
    start_cloud: StartCloud, clients: Clients
) -> None:
    cloud = await start_cloud()
    address = f"127.0.0.1:{cloud.server.port}"
    with pytest.raises(CursorMismatch, match="no-such-log"):
        await anext(clients.detections(address).events(Cursor("no-such-log", 3)))
    await cloud.stop()
    with pytest.raises(Unavailable):
        await anext(clients.detections(address, retry=Retry(give_up_s=0.3)).events())
    await clients.close()


async def test_detect_answers_past_the_log(start_cloud: StartCloud, clients: Clients, spot: Bitstream) -> None:
    cloud = await start_cloud()
    consumer = clients.detections(f"127.0.0.1:{cloud.server.port}")
    found = await consumer.detect(to_bytes(spot), min_score=0.5, return_image=True)
    assert [one.label for one in found.detections] == ["kite"]
    assert found.image_png.startswith(b"\x89PNG")
    with pytest.raises(InvalidBitstream):
        await consumer.detect(b"nonsense")
    assert await cloud.events() == []
    await clients.close()


async def test_review_gives_the_picture_of_an_event_and_says_why_it_has_none(
    start_cloud: StartCloud, clients: Clients, spot: Bitstream, codec: Codec
) -> None:
    cloud = await start_cloud()
    async with cloud.edge() as edge:
        await edge.deliver("gate", 1, spot)
        consumer = clients.detections(f"127.0.0.1:{cloud.server.port}", retry=Retry(give_up_s=0))
        async with aclosing(consumer.events(Start.BEGINNING)) as events:
            frame = (await anext(events)).frame
        seen = await consumer.review(frame, return_bitstream=True)
        assert (seen.width, seen.height, seen.quality, seen.model_id) == (64, 64, 8.0, codec.model_id)
        assert seen.bitstream == to_bytes(spot)
        picture = np.asarray(Image.open(io.BytesIO(seen.image_png))).astype(int)
        assert np.abs(picture - codec.decode(spot).rgb).max() <= 1
        assert (await consumer.review(frame)).bitstream == b""
        with pytest.raises(NotFound, match="keeps no originals"):
            await consumer.review(frame, quality=8)
        with pytest.raises(NotFound, match="not kept"):
            await consumer.review(FrameName("gate", 1, 2))
        with pytest.raises(InvalidQuality, match="got 0"):
            await consumer.review(frame, quality=0)
    await until_no_stream(cloud)
    with pytest.raises(Unavailable, match="not connected"):
        await consumer.review(frame, quality=8)
    await clients.close()


async def until_no_stream(cloud: RunningCloud) -> None:
    async with asyncio.timeout(60):
        await cloud.ingest.until_idle()


async def test_closing_a_blocking_client_ends_its_subscription_in_another_thread(start_cloud: StartCloud) -> None:
    cloud = await start_cloud()
    client = DetectionClient(f"127.0.0.1:{cloud.server.port}")
    following = threading.Event()
    seen: list[object] = []

    def consume() -> None:
        for update in client.updates(Start.BEGINNING):
            seen.append(update)
            following.set()

    ended = asyncio.create_task(asyncio.to_thread(consume))
    assert await asyncio.to_thread(following.wait, 30)
    await asyncio.to_thread(client.close)
    async with asyncio.timeout(30):
        await ended
    assert len(seen) == 1


def test_masks_read_back_as_the_cloud_and_pycocotools_wrote_them(rng: np.random.Generator) -> None:
    for height, width, share in [(1, 1, 1.0), (7, 5, 0.0), (9, 14, 0.5), (120, 200, 0.02), (64, 64, 0.97)]:
        mask = rng.random((height, width)) < share
        assert np.array_equal(Mask(height, width, encode_mask(mask)).to_array(), mask)
        assert np.array_equal(coco.decode(coco.encode(np.asfortranarray(mask, np.uint8))), mask)
    blob = np.zeros((300, 400), bool)
    blob[40:260, 100:350] = True
    theirs = coco.encode(np.asfortranarray(blob, np.uint8))["counts"]
    assert np.array_equal(Mask(300, 400, theirs).to_array(), blob)
    with pytest.raises(InvalidInput, match="expected runs over 12 pixels"):
        Mask(3, 4, theirs).to_array()


@pytest.mark.parametrize("text", ["", "log", "log:", ":3", "log:-1", "log:x"])
def test_a_cursor_that_cannot_be_read_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "cursor").write_text(text)
    with pytest.raises(InvalidInput, match="LOG:SEQUENCE"):
        CursorFile(tmp_path / "cursor").load()
