"""Log lines: the same facts in both forms, one frame id from edge to cloud, and nothing a peer says forges a line."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cloud.detections.log import FrameName
from shared import logs
from shared.logs import facts, frame_id

Say = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """`said(form, message, **facts)`: the line that comes out."""
    before = logging.getLogger().handlers[:], logging.getLogger().level, logging.getLogger("sightline").level

    def say(form: str, message: str, /, **values: object) -> str:
        logs.configure("debug", form)
        logging.getLogger("sightline.test").info(message, extra=facts(**values))
        return capsys.readouterr().err

    yield say
    logging.getLogger().handlers[:], level, ours = before
    logging.getLogger().setLevel(level)
    logging.getLogger("sightline").setLevel(ours)


def test_both_forms_carry_the_same(said: Say) -> None:
    line = json.loads(said("json", "spooled", frame="gate/00000000000000ff/3", bytes=12))
    assert (line["message"], line["level"], line["frame"], line["bytes"]) == (
        "spooled",
        "info",
        "gate/00000000000000ff/3",
        12,
    )
    text = said("console", "spooled", frame="gate/00000000000000ff/3", bytes=12)
    assert text.endswith("info    sightline.test: spooled  frame=gate/00000000000000ff/3  bytes=12\n")


def test_a_frame_has_one_id_at_edge_and_cloud() -> None:
    assert frame_id("gate", 255, 3) == str(FrameName("gate", 255, 3)) == "gate/00000000000000ff/3"


@pytest.mark.parametrize("form", ["json", "console"])
def test_what_a_peer_wrote_stays_inside_its_line(said: Say, form: str) -> None:
    forged = "x\n2026-01-01T00:00:00.000Z error   sightline: all is lost\x1b[2J"
    text = said(form, "rejected a frame", reason=forged, message="mine", level="error", time="never")
    assert text.count("\n") == 1
    assert "\x1b" not in text
    if form == "json":
        line = json.loads(text)
        assert (line["message"], line["level"], line["reason"]) == ("rejected a frame", "info", forged)
    assert said(form, "a message\nof two lines").count("\n") == 1


def test_an_exception_is_kept_with_its_line() -> None:
    program = (
        "import logging\nfrom shared import logs\nlogs.configure('info', 'json')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.getLogger('sightline.x').exception('failed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert "ZeroDivisionError" in line["exception"]
