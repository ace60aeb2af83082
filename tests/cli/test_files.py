"""What a command reads and writes is decided before any work, and a file is written whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli.files import PICTURE_SUFFIXES, Job, expand, plan, write_atomically


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return paths


def test_a_folder_means_its_own_pictures_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", "c.webp", "inner/d.png")
    assert [path.name for path in expand([tmp_path], PICTURE_SUFFIXES)] == ["a.png", "b.JPG", "c.webp"]


def test_a_file_named_outright_is_taken_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    odd, picture = touch(tmp_path, "odd.bin", "a.png")
    assert expand([odd, picture, odd, tmp_path], PICTURE_SUFFIXES) == [odd, picture]


def test_a_missing_input_and_a_folder_without_pictures_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(typer.BadParameter, match=r"'.*nowhere\.png' does not exist"):
        expand([tmp_path / "nowhere.png"], PICTURE_SUFFIXES)
    with pytest.raises(typer.BadParameter, match=r"has no file ending in \.jpeg, \.jpg, \.png, \.webp"):
        expand([tmp_path], PICTURE_SUFFIXES)


def test_outputs_are_named_like_their_inputs(tmp_path: Path) -> None:
    sources = [Path("in/a.jpg"), Path("in/b.tar.png")]
    assert plan(sources, tmp_path, ".slc") == [
        Job(sources[0], tmp_path / "a.slc"),
        Job(sources[1], tmp_path / "b.tar.slc"),
    ]


def test_two_inputs_that_would_share_an_output_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"'x/a\.jpg' and 'y/a\.png' would both become"):
        plan([Path("x/a.jpg"), Path("x/b.jpg"), Path("y/a.png")], tmp_path, ".slc")


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    (source,) = touch(tmp_path, "a.png")
    with pytest.raises(typer.BadParameter, match="would be overwritten"):
        plan([source], tmp_path / "sub" / "..", ".png")


def test_writing_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.slc"
    write_atomically(target, b"first")
    write_atomically(target, b"second")
    assert target.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.slc"]


def test_a_write_that_fails_keeps_the_old_file_and_removes_its_own(tmp_path: Path) -> None:
    target = tmp_path / "a.slc"
    target.mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"a\.slc"):
        write_atomically(target, b"data")
    assert os.listdir(tmp_path) == ["a.slc"]


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """The child writes two whole contents in turn, for ever, and is killed at a moment that is not of its choosing."""
    target = tmp_path / "a.slc"
    contents = [bytes([n]) * 3_000_000 for n in (1, 2)]
    program = (
        "import sys; from pathlib import Path; from cli.files import write_atomically\n"
        "contents = [bytes([n]) * 3_000_000 for n in (1, 2)]\n"
        "write_atomically(Path(sys.argv[1]), contents[0]); print(flush=True)\n"
        "while True:\n    for content in contents: write_atomically(Path(sys.argv[1]), content)"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()  # from now on it overwrites
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert target.read_bytes() in contents
