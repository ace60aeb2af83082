"""The bar is for people at a terminal; what a program reads stays clean."""

import os
import pty
import subprocess
import sys

PROGRAM = """
from pathlib import Path
from cli.progress import for_each
from shared.errors import InvalidImage
def work(path):
    if path.name == "bad": raise InvalidImage("expected good, got bad")
    print(f"did {path}", flush=True)
try: for_each([Path("a"), Path("bad"), Path("b")], work, "work")
except BaseException as error: print(type(error).__name__, error)
"""


def test_lines_on_a_pipe_stay_clean_while_the_bar_is_on_the_terminal() -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        seen += part
    out, _ = child.communicate()
    os.close(ours)
    assert out.splitlines() == ["did a", "did b", "Exit 1"]
    assert b"3/3" in seen
    assert b"bad: expected good, got bad" in seen
    assert b"1 of 3 files failed" in seen


def test_without_a_terminal_there_is_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["did a", "did b", "Exit 1"]
    assert done.stderr.splitlines() == [
        "sightline: bad: expected good, got bad",
        "sightline: 1 of 3 files failed",
    ]
