"""`sightline camera`: its flags, its status line, its ends."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from cli.camera import Failures, read_size, status_line
from edge.capture import Counts, Status
from shared.errors import TooLarge
from tests.cli.conftest import Sightline
from tests.edge.conftest import RunningEdge, running_edge
from tests.edge.videos import moving_square, write_video

__all__ = ["running_edge"]


async def started(*arguments: object) -> asyncio.subprocess.Process:
    """The command in a process of its own, which is where its signals work."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "camera", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


async def test_a_file_goes_through_and_a_loop_ends_well_on_a_signal(running_edge: RunningEdge, tmp_path: Path) -> None:
    video = write_video(tmp_path / "square.mp4", moving_square(12))
    async with running_edge() as (edge, _):
        flags = ("--edge", f"127.0.0.1:{edge.server.port}", "--id", "hall", "--json", "--hardware", "none")
        process = await started(video, *flags, "--size", "48x48", "-q", "3", "--fps", "10", "--window", "1")
        out, err = await process.communicate()
        assert (process.returncode, err.decode().splitlines()) == (0, ["hall: 6 sent, 6 over the frame rate"])
        receipts = [json.loads(line) for line in out.splitlines()]
        assert [one["frame"].split("/")[::2] for one in receipts] == [["hall", str(i)] for i in range(1, 7)]
        assert {(one["width"], one["height"], one["quality"], one["state"]) for one in receipts} == {
            (48, 32, 3.0, "spooled")
        }
        looping = await started(video, *flags, "--realtime", "--loop", "--delivery", "none")
        assert looping.stdout is not None
        for _ in range(3):
            assert json.loads(await looping.stdout.readline())["state"] == "encoded"
        looping.send_signal(signal.SIGINT)
        _, err = await looping.communicate()
        assert looping.returncode == 0
        assert err.decode().startswith("hall: ")


def test_wrong_usage_is_said_before_any_work(sightline: Sightline, tmp_path: Path) -> None:
    video = write_video(tmp_path / "square.mp4", moving_square(2))
    for flags, said in [
        ((video, "--size", "640"), "expected a size as 640x360"),
        ((video, "-q", "3", "--target-bytes", "100"), "cannot both be given"),
        (("rtsp://127.0.0.1/x", "--loop"), "is live already"),
        ((video, "--edge", "10.0.0.1:7411"), "plaintext to 10.0.0.1:7411"),
        ((video, "--motion", "101"), "less than or equal to 100"),
        (("no-such-file.mp4",), "a video file or a folder, got 'no-such-file.mp4'"),
    ]:
        ended = sightline("camera", *flags)
        assert ended.code == 2, ended
        assert said in " ".join(ended.err.replace("│", " ").split())


def test_the_status_line_tells_rates_and_what_became_of_pictures() -> None:
    counts = Counts(read=120, sent=90, thinned=10, unchanged=15, dropped=5, reconnects=2)
    status = Status(counts, 12.34, 386.4, 4.0, 3, 84.2, "")
    assert status_line("door", status) == (
        "door  12.3 fps  386 kbit/s  quality 4.00  backlog 3  latency 84 ms  "
        "90 sent, 10 over the frame rate, 15 unchanged, 5 dropped, 2 reconnects"
    )
    away = status_line("door", Status(Counts(), 0.0, 0.0, None, 0, None, "rtsp://cam/ is lost: Connection refused"))
    assert away.endswith("0 sent  (rtsp://cam/ is lost: Connection refused; trying again)")
    edge_away = status_line("door", Status(Counts(), 0.0, 0.0, None, 8, None, "", "no room now"))
    assert edge_away.endswith("0 sent  (edge: no room now; trying again)")


def test_a_failure_is_said_once_until_another_comes(capsys: pytest.CaptureFixture[str]) -> None:
    say = Failures()
    for text in ("too large", "too large", "other", "too large"):
        say(TooLarge(text))
    assert capsys.readouterr().err.splitlines() == [f"sightline: {t}" for t in ("too large", "other", "too large")]


def test_a_size_is_read_as_people_write_it() -> None:
    assert read_size("640x360") == read_size("640X360") == (640, 360)
