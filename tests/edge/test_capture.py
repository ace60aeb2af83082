"""A camera's loop against a real edge, an RTSP server and files: what is sent, skipped, dropped and counted."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge.capture import Capture, Counts, Mailbox, Plan, Thinner
from edge.sources import Grab, Reading, find_source
from shared.clients import CameraClient, CompressOptions, Delivery, Retry
from shared.errors import InvalidInput, SightlineError, TooLarge, Unavailable
from tests.edge import rtsp
from tests.edge.conftest import RunningEdge
from tests.edge.videos import moving_square, write_video

ENDLESS = Retry(first_s=0.05, max_s=0.2, give_up_s=None)


def client(port: int, **options: object) -> CameraClient:
    chosen = CompressOptions(quality=2, **options)  # type: ignore[arg-type]
    return CameraClient(f"127.0.0.1:{port}", "door", options=chosen, retry=ENDLESS)


def plan(source: object, **changes: object) -> Plan:
    return replace(Plan(find_source(str(source)), Reading(hardware="none", silence_s=5)), **changes)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)  # another thread's counts; nothing tells of a change


async def until_async(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


@contextmanager
def running(capture: Capture) -> Iterator[threading.Thread]:
    """The capture in a thread, stopped at the end whatever the test finds."""
    thread = threading.Thread(target=capture.run)
    thread.start()
    try:
        yield thread
    finally:
        capture.stop()
        thread.join(30)
        assert not thread.is_alive()


async def in_thread(capture: Capture) -> Counts:
    return await asyncio.to_thread(capture.run)


async def test_every_picture_of_a_file_is_spooled_once(running_edge: RunningEdge, tmp_path: Path) -> None:
    video = write_video(tmp_path / "square.mp4", moving_square(25))
    async with running_edge() as (edge, _):
        counts = await in_thread(Capture(plan(video, waiting=2), client(edge.server.port)))
    assert (counts.read, counts.sent, counts.dropped, counts.failed) == (25, 25, 0, 0)
    db = sqlite3.connect(tmp_path / "edge" / "spool.sqlite")
    rows = db.execute("SELECT seq, captured_us FROM frame WHERE camera_id = 'door' ORDER BY seq").fetchall()
    db.close()
    assert [seq for seq, _ in rows] == list(range(1, 26))
    assert len({captured for _, captured in rows}) == 25


async def test_rate_size_and_motion_are_what_was_asked_for(running_edge: RunningEdge, tmp_path: Path) -> None:
    still = moving_square(1) * 20
    video = write_video(tmp_path / "still.mp4", [*still, *moving_square(20)], fps=20)
    sizes: list[tuple[int, int]] = []
    seen = lambda _grab, receipt: sizes.append((receipt.width, receipt.height))  # noqa: E731
    async with running_edge() as (edge, _):
        options = {"delivery": Delivery.NONE}
        wanted = plan(video, fps=10, largest=(48, 48), motion=0.01, refresh_s=0.0)
        counts = await in_thread(Capture(wanted, client(edge.server.port, **options), on_receipt=seen))
    assert (counts.read, counts.thinned) == (40, 20)
    assert counts.unchanged >= 9, "the first second shows nothing new"
    assert counts.sent == 20 - counts.unchanged >= 8
    assert set(sizes) == {(48, 32)}


async def test_a_loop_goes_on_until_it_is_stopped(running_edge: RunningEdge, tmp_path: Path) -> None:
    video = write_video(tmp_path / "square.mp4", moving_square(3))
    enough = threading.Event()
    async with running_edge() as (edge, _):

        def count(grab: Grab, receipt: object) -> None:
            if capture.status().counts.sent >= 8:
                capture.stop()
                enough.set()

        capture = Capture(plan(video, loop=True), client(edge.server.port, delivery=Delivery.NONE), on_receipt=count)
        counts = await in_thread(capture)
    assert enough.is_set()
    assert counts.read >= counts.sent >= 8
    assert capture.status().quality == 2.0


async def test_an_edge_that_refuses_the_first_picture_ends_it_and_later_ones_are_counted(
    running_edge: RunningEdge, tmp_path: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, side in (("a", 32), ("b", 200), ("c", 32)):
        Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(folder / f"{name}.png")
    said: list[SightlineError] = []
    async with running_edge(max_side=100) as (edge, _):
        wanted = plan(folder, window=1)
        counts = await in_thread(Capture(wanted, client(edge.server.port), on_failure=said.append))
        (folder / "a.png").unlink()
        with pytest.raises(TooLarge, match="sides of at most 100"):
            await in_thread(Capture(wanted, client(edge.server.port)))
    assert (counts.sent, counts.failed) == (2, 1)
    assert [type(error) for error in said] == [TooLarge]


async def test_a_file_that_holds_nothing_is_told(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    with pytest.raises(InvalidInput, match="cannot be read as video"):
        await in_thread(Capture(plan(text), client(1)))


def test_while_the_edge_is_away_memory_is_bounded_and_what_was_given_up_is_counted(tmp_path: Path) -> None:
    video = write_video(tmp_path / "square.mp4", moving_square(60), fps=60)
    live = plan(video, reading=Reading(realtime=True, hardware="none"), waiting=3, window=2)
    capture = Capture(live, client(1))  # nobody listens on port 1
    with running(capture):
        until(lambda: capture.status().counts.read == 60, "the file is read though nothing can be sent")
        status = capture.status()
        assert status.waiting == 3
        assert status.counts.dropped == 60 - 3 - 2
        assert "refused" in status.edge_away
    counts = capture.status().counts
    assert counts.sent == 0
    assert counts.dropped == 60


async def test_a_camera_that_is_killed_and_an_edge_that_goes_come_back(running_edge: RunningEdge) -> None:
    """The RTSP server dies by SIGKILL under load and returns; then the edge goes, and returns."""
    rtsp.require()
    server = rtsp.small_server()
    errors: list[SightlineError] = []
    try:
        async with running_edge() as (edge, _):
            port = edge.server.port
            capture = Capture(plan(server.address), client(port), on_failure=errors.append)
            thread = asyncio.create_task(asyncio.to_thread(capture.run))
            await until_async(lambda: capture.status().counts.sent >= 5, "the stream arrives")
            server.kill()
            await until_async(lambda: capture.status().away != "", "the loss is noticed")
            await asyncio.to_thread(server.start)
            await until_async(lambda: capture.status().counts.reconnects == 1, "the stream comes back")
            assert capture.status().away == ""
            before = capture.status().counts.sent
            await until_async(lambda: capture.status().counts.sent >= before + 5, "its pictures are sent")
        dropped = capture.status().counts.dropped
        await until_async(lambda: capture.status().counts.dropped > dropped, "without an edge the oldest give way")
        before = capture.status().counts.sent
        async with running_edge(listen=f"127.0.0.1:{port}"):
            await until_async(lambda: capture.status().counts.sent >= before + 5, "the edge comes back")
            capture.stop()
            await thread
    finally:
        server.kill()
        capture.stop()
    assert not errors


def test_an_address_with_no_camera_is_told_and_a_camera_that_is_off_is_waited_for() -> None:
    rtsp.require()
    server = rtsp.small_server()
    try:
        wrong = find_source(server.address.replace("camera", "cellar"))
        with pytest.raises(Unavailable, match="cannot be opened"):
            Capture(Plan(wrong, Reading(hardware="none")), client(1)).run()
    finally:
        server.kill()
    capture = Capture(plan(server.address), client(1))
    with running(capture):
        until(lambda: "Connection refused" in capture.status().away, "it says why it waits")


def test_a_full_mailbox_drops_its_oldest_or_blocks() -> None:
    grabs = [Grab(None, float(i), None) for i in range(6)]  # type: ignore[arg-type]
    live = Mailbox(3, drops=True)
    assert [live.put(grab) for grab in grabs] == [0, 0, 0, 1, 1, 1]
    live.close()
    assert [live.take() for _ in range(4)] == [*grabs[3:], None]
    patient = Mailbox(1, drops=False)
    patient.put(grabs[0])
    blocked = threading.Thread(target=patient.put, args=(grabs[1],))
    blocked.start()
    assert patient.take() is grabs[0]
    blocked.join(10)
    assert patient.take() is grabs[1]
    assert len(patient) == 0


def test_thinning_is_even_and_keeps_its_rate_under_jitter(rng: np.random.Generator) -> None:
    def taken(times: np.ndarray, fps: float | None) -> list[float]:
        thinner = Thinner(fps)
        return [float(t) for t in times if thinner.takes(float(t))]

    ideal = np.arange(300) / 30
    assert taken(ideal, None) == ideal.tolist()
    assert len(taken(ideal, 30)) == 300
    assert len(taken(ideal, 10)) == 100
    assert len(taken(ideal, 12)) == pytest.approx(120, abs=1)
    jittered = ideal + rng.uniform(-0.01, 0.01, 300)
    assert len(taken(jittered, 10)) == pytest.approx(100, abs=3)
    late = np.concatenate([ideal[:30], ideal[:30] + 60])
    assert len(taken(late, 10)) == 20, "no burst after a pause"
