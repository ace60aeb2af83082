"""The front door is quick to open, imports only the room asked for, and keeps its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Sightline

HEAVY = ("torch", "torchvision", "grpc", "numpy", "PIL", "pydantic_settings", "supervision", "lightning", "compressai")
COMMANDS = ("compress", "decompress", "detect", "info", "demo", "edge", "cloud", "quarantine", "evaluate", "bench")


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules that a fresh process has loaded once the command has ended with 0."""
    program = (
        "import sys\nfrom cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('\\nMODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after("--help")
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_compress_loads_the_codec_and_no_task_model(pictures: Path, tmp_path: Path) -> None:
    loaded = modules_after("compress", str(pictures / "coffee.webp"), "-o", str(tmp_path))
    assert "torch" in loaded
    assert not loaded & {"torchvision", "supervision", "grpc", "lightning", "compressai", "pydantic_settings"}


def test_the_program_itself_runs_and_passes_its_exit_code_on() -> None:
    done = subprocess.run([sys.executable, "-m", "cli.main", "compress"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_version(sightline: Sightline) -> None:
    ended = sightline("--version")
    assert ended.code == 0
    assert ended.out.split() == ["sightline", "0.1.0"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, sightline: Sightline) -> None:
    assert command in sightline("--help").out
    ended = sightline(command, "--help")
    assert ended.code == 0
    assert f"sightline {command}" in ended.out


@pytest.mark.parametrize("wrong", [("sing",), ("--loud",), ("info", "--loud", "x"), ("info",)])
def test_wrong_usage_ends_with_2(wrong: tuple[str, ...], sightline: Sightline) -> None:
    assert sightline(*wrong).code == 2


def test_a_missing_extra_is_named_with_its_remedy(
    sightline: Sightline, monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what an installation without the extra looks like
    for name in [name for name in sys.modules if name.startswith("cloud.tasks")]:
        monkeypatch.delitem(sys.modules, name)
    ended = sightline("detect", pictures / "coffee.webp")
    assert ended.code == 1
    assert "needs the package torchvision" in ended.err
    assert "pip install 'sightline[cloud]'" in ended.err


def test_benchmarks_are_listed_and_run_with_their_own_flags(sightline: Sightline) -> None:
    listed = sightline("bench")
    assert listed.code == 0
    assert "corruption" in listed.out
    assert "sightline bench corruption" in sightline("bench", "corruption", "--help").out
    assert sightline("bench", "corruption", "--loud").code == 2
    ended = sightline("bench", "nothing-like-it")
    assert ended.code == 2
    assert "corruption" in ended.err


def test_a_file_that_cannot_be_read_is_one_sentence(sightline: Sightline, tmp_path: Path) -> None:
    (tmp_path / "a.slc").symlink_to(tmp_path / "a.slc")  # a loop: it exists to nobody
    ended = sightline("info", tmp_path / "a.slc")
    assert ended.code == 2
    assert "Traceback" not in ended.err
