"""The live demo: photographs that move like cameras, through both services, watched in the console until it ends."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.async_api import async_playwright, expect

from bench.rtsp import NEEDS, RtspServer, available, file
from cli.demo.command import LIVE_TASK
from cli.demo.scene import ROUND_S, SIZE, Scene, camera_names
from shared.codec.bundle import WEIGHTS
from shared.codec.types import Frame

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory, astronaut: Frame) -> Path:
    path = tmp_path_factory.mktemp("photographs") / "someone.png"
    Image.fromarray(astronaut.rgb).save(path)
    return path


def test_a_scene_moves_and_comes_round(photograph: Path) -> None:
    scene = Scene(photograph)
    pictures = [scene.at(time_s).astype(int) for time_s in (0.0, 0.25, 10.0, ROUND_S)]
    assert {picture.shape for picture in pictures} == {(SIZE[1], SIZE[0], 3)}
    step, far, round_ = (float(np.abs(picture - pictures[0]).mean()) for picture in pictures[1:])
    assert 0.1 < step < far
    assert round_ == 0


def test_a_scene_never_looks_beyond_the_photograph(tmp_path: Path) -> None:
    white = np.full((30, 200, 3), 255, np.uint8)
    Image.fromarray(white).save(tmp_path / "wide.png")
    scene = Scene(tmp_path / "wide.png")
    assert all((scene.at(time_s) == 255).all() for time_s in np.arange(0, ROUND_S, 1.7))


def test_cameras_are_named_like_their_pictures_and_no_two_alike() -> None:
    paths = [Path("a b.png"), Path("x/a-b.jpg"), Path("äö.png"), Path(80 * "n" + ".png")]
    names = list(camera_names(paths))
    assert names == ["a-b", "a-b-2", "camera", 56 * "n"]
    assert all(re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", name) for name in names)


@pytest.mark.slow  # starts two services and a camera process, and waits for their first frames
@pytest.mark.skipif(not (WEIGHTS / LIVE_TASK).is_dir(), reason="the bundled network is not here")
def test_pictures_and_sources_are_watched_until_a_signal_and_nothing_stays_behind(
    photograph: Path, tmp_path: Path
) -> None:
    video = tmp_path / "clip.mp4"
    write_video(video, Scene(photograph))
    process, address = start_live("--fps", "2", photograph, video)
    try:
        deadline = time.monotonic() + 180
        seen: set[str] = set()
        while seen != {"someone", "camera-1"}:
            assert time.monotonic() < deadline, f"only {seen} came through"
            with urllib.request.urlopen(f"{address}api/events?outcome=detections", timeout=60) as answer:
                seen = {event["camera"] for event in json.load(answer)["events"]}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=10)


@pytest.mark.slow  # a camera's minute, through GStreamer's RTSP server to a browser
@pytest.mark.skipif(not (WEIGHTS / LIVE_TASK).is_dir(), reason="the bundled network is not here")
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.skipif(not available(), reason=f"needs {NEEDS}")
async def test_a_network_camera_is_seen_in_the_console_with_what_was_found(
    data_dir: Path | None, tmp_path: Path
) -> None:
    if data_dir is None or not (data_dir / "video").is_dir():
        pytest.skip("needs the data folder with video/")
    server = RtspServer(file(data_dir / "video" / "one-by-one-person-detection.mp4")).start()
    try:
        process, address = start_live("--fps", "2", server.address)
        try:
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(
                    executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
                )
                page = await browser.new_page(viewport={"width": 1280, "height": 800})
                said: list[str] = []
                page.on("console", lambda message: said.append(message.text))
                await page.goto(address)
                picture = page.locator(".tile .view img").first
                # a tile asks for 480 pixels across
                await expect(picture).to_have_js_property("naturalWidth", 480, timeout=180_000)
                first = await picture.get_attribute("src")
                await expect(picture).not_to_have_attribute("src", first or "", timeout=60_000)  # live
                await expect(page.locator(".tile .found").first).to_contain_text("person", timeout=120_000)
                await page.screenshot(path=tmp_path / "console.png")
                await browser.close()
                assert said == []
            process.send_signal(signal.SIGINT)
            _, err = await asyncio.to_thread(process.communicate, timeout=60)
            assert process.returncode == 0, err
        finally:
            process.kill()
            process.communicate()
    finally:
        server.kill()


def start_live(*arguments: str | Path) -> tuple["subprocess.Popen[str]", str]:
    """The live demo's process and its console's address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo", "--live", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    assert address.startswith("http://127.0.0.1:")
    return process, address


def write_video(path: Path, scene: Scene) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for n in range(10):
            frame = av.VideoFrame.from_ndarray(scene.at(n / 5), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
