"""The live demo: photographs that move like cameras, through both services, watched in the console until it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.demo.command import LIVE_TASK
from cli.demo.scene import ROUND_S, SIZE, Scene, camera_names
from shared.codec.bundle import WEIGHTS
from shared.codec.types import Frame


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
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo", "--live", "--fps", "2", photograph, video],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
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


def write_video(path: Path, scene: Scene) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for n in range(10):
            frame = av.VideoFrame.from_ndarray(scene.at(n / 5), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
