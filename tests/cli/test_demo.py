"""The demo is the whole way of a frame between two processes; it leaves a page behind, and never a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli.demo.results import STAGES
from cli.demo.services import service
from cli.detect import DEFAULT_TASK
from shared.codec.bundle import WEIGHTS
from shared.codec.types import Frame
from shared.errors import Unavailable

pytestmark = pytest.mark.skipif(not (WEIGHTS / DEFAULT_TASK).is_dir(), reason="the bundled detector is not here")
PATIENCE_S = 300.0


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "demo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SIGHTLINE_EDGE_LISTEN": "not an address"},  # the demo's services do not read these
    )


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, Frame]
) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """One run on a JPEG and a PNG at two qualities."""
    folder = tmp_path_factory.mktemp("demo")
    Image.fromarray(photographs["astronaut"].rgb).resize((320, 320)).save(folder / "someone.jpg", quality=92)
    Image.fromarray(photographs["coffee"].rgb[:97, :131]).save(folder / "corner.png")
    process = start(folder / "someone.jpg", folder / "corner.png", "-o", folder / "out", "-q", 7, "-q", 3, "--json")
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), folder


def test_pictures_go_through_both_services_and_come_back_as_detections(
    ended: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    done, folder = ended
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(Path(row["input"]).name, row["quality"]) for row in rows] == [
        ("someone.jpg", 3.0),
        ("someone.jpg", 7.0),
        ("corner.png", 3.0),
        ("corner.png", 7.0),
    ]
    someone, _, corner, _ = rows
    assert someone["jpeg_is_own"]
    assert someone["jpeg_bytes"] == (folder / "someone.jpg").stat().st_size
    assert not corner["jpeg_is_own"]
    assert "person" in someone["found_on_original"]
    assert "person" in rows[1]["found_after_codec"]
    for row in rows:
        assert 0 < row["sent_bytes"] < row["jpeg_bytes"]
        assert list(row["stages_ms"]) == list(STAGES)
        assert all(
            row["stages_ms"][stage] > 0 for stage in ("analyse", "entropy code", "spool", "synthesise", "detect")
        )
        assert row["round_trip_ms"] >= row["stages_ms"]["detect"]


def test_a_page_and_annotated_pictures_are_left(ended: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    _, folder = ended
    page = (folder / "out" / "index.html").read_text()
    assert "Someone" in page
    assert 'id="quality-1" checked' in page
    for name, size in {"someone": (320, 320), "corner": (131, 97)}.items():
        for what in ("seen", "detections"):
            with Image.open(folder / "out" / f"{name}.{what}.png") as picture:
                assert picture.size == size


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_service_outlives_a_demo_that_is_stopped(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start("-o", tmp_path)
    children = wait_for(lambda: services_of(process.pid))
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, err
    wait_for(lambda: not any(alive(child) for child in children))


async def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        service("cloud", ["--models", str(tmp_path / "no-bundle")], tmp_path) as cloud,
        pytest.raises(
            Unavailable, match=r"(?s)the cloud service ended with exit code 1; the end of its log:.*no-bundle"
        ),
    ):
        await cloud.wait_ready()


async def test_a_service_that_is_killed_is_noticed(tmp_path: Path) -> None:
    with service("cloud", [], tmp_path) as cloud:
        os.kill(wait_for(lambda: services_of(os.getpid()))[0], signal.SIGKILL)
        with pytest.raises(Unavailable, match="the cloud service ended by SIGKILL"):
            await cloud.wait_ready()


def wait_for(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def services_of(parent: int) -> list[int]:
    """Process ids of the services that a process has started."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"cli.demo.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def alive(process_id: int) -> bool:
    """Running, not merely waiting for its parent to take note of its end."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
