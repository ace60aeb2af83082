"""Cyclic garbage is not looked for while a service starts, and later not among what started it."""

import subprocess
import sys
from pathlib import Path

import pytest

COLLECTING = (
    "import gc\n{}\nfrom shared import collecting\nprint(gc.isenabled())\ncollecting.resume()\nprint(gc.isenabled())"
)
SERVING = """
import asyncio, gc, os, signal
from edge import server
from edge.settings import EdgeSettings


async def a_while():
    asyncio.get_running_loop().call_later(1, os.kill, os.getpid(), signal.SIGTERM)
    await server.serve(EdgeSettings.load(listen="127.0.0.1:0", metrics_listen="", data_dir={folder!r}))

asyncio.run(a_while())
looked_through, left_alone = len(gc.get_objects()), gc.get_freeze_count()
kept = [0]
kept.append(kept)
del kept
print(gc.isenabled(), looked_through, left_alone, gc.collect() > 0, sep=",")
"""


def output(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("before", "after"), [("", "True"), ("gc.disable()", "False")])
def test_collecting_goes_on_after_imports_where_it_was_on(before: str, after: str) -> None:
    assert output(COLLECTING.format(before)) == ["False", after]


def test_a_running_edge_collects_and_leaves_alone_what_started_it(tmp_path: Path) -> None:
    told = output(SERVING.format(folder=str(tmp_path / "edge")))[-1]
    collects, looked_through, left_alone, found = told.split(",")
    assert collects == found == "True"
    assert int(left_alone) > 100_000
    assert int(looked_through) < 0.1 * int(left_alone)


def test_what_was_left_alone_is_freed_at_the_end() -> None:
    """Torch's compiler, which the cloud's imports bring, writes a page to stderr where it is not."""
    code = "from shared import collecting\nimport torch._dynamo\ncollecting.resume()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""
