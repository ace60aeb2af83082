"""The trainer's settings come from flags and a TOML file, and every fault is named before anything starts."""

from pathlib import Path

import pytest

from cli.training import build, dataclass_flags, descriptions, run_settings
from shared.errors import InvalidSettings
from tests.cli.conftest import Sightline
from trainer.schedule import Schedule
from trainer.settings import TrainSettings, from_toml, to_toml


def started_with(*arguments: str) -> TrainSettings:
    """What a run would be started with."""
    started: list[TrainSettings] = []
    with pytest.raises(SystemExit) as end:
        run_settings(TrainSettings, started.append, arguments, "sightline train codec", "Train.")
    assert end.value.code == 0
    return started[0]


def test_flags_fill_the_settings_and_their_parts() -> None:
    settings = started_with(
        *("--out", "run", "--images", "pictures", "--steps", "50", "--zoom", "0.5", "--zoom", "2", "--no-bf16"),
        *("--schedule.span", "64", "--architecture.m", "96"),
    )
    assert (settings.out, settings.images, settings.steps, settings.hours) == (Path("run"), Path("pictures"), 50, None)
    assert (settings.zoom, settings.bf16) == ((0.5, 2.0), False)
    assert settings.schedule == Schedule(span=64.0)
    assert settings.architecture is not None
    assert settings.architecture.m == 96


def test_the_file_that_a_run_leaves_starts_it_again_and_flags_go_before_it(tmp_path: Path) -> None:
    first = started_with("--out", "a", "--images", "p", "--hours", "0.5", "--schedule.task", "2.5", "--seed", "7")
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(first))
    assert started_with("--config", str(file)) == first == from_toml(file)
    second = started_with("--config", str(file), "--out", "b", "--schedule.span", "10")
    assert (second.out, second.seed) == (Path("b"), 7)
    assert (second.schedule.task, second.schedule.span) == (2.5, 10.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"images": "p", "steps": 1}, "--out: Field required"),
        ({"out": "a", "images": "p", "steps": "few"}, "--steps: .* got 'few'"),
        ({"out": "a", "images": "p", "schedule": {"span": "wide"}, "steps": 1}, r"--schedule\.span: .* got 'wide'"),
        ({"out": "a", "images": "p", "steps": 1, "speed": 9}, "no setting is called speed"),
        ({"out": "a", "images": "p", "schedule": {"sp": 9}}, r"no setting is called schedule\.sp"),
        ({"out": "a", "images": "p"}, "exactly one of 'steps' and 'hours'"),
    ],
)
def test_every_fault_is_named(values: dict, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        build(TrainSettings, values)


def test_a_fault_ends_the_command_with_2_and_one_sentence(sightline: Sightline, tmp_path: Path) -> None:
    ended = sightline("train", "codec", "--images", tmp_path, "--steps", "few")
    assert ended.code == 2
    assert "--out: Field required" in ended.err
    ended = sightline("train", "codec", "--config", tmp_path / "none.toml")
    assert ended.code == 2
    assert "none.toml" in ended.err


@pytest.mark.parametrize("command", ["train codec", "train task", "evaluate"])
def test_help_shows_every_setting(command: str, sightline: Sightline) -> None:
    from trainer.evaluation.evaluate import EvaluateSettings
    from trainer.train_task import TrainTaskSettings

    model = {"train codec": TrainSettings, "train task": TrainTaskSettings, "evaluate": EvaluateSettings}[command]
    ended = sightline(*command.split(), "--help")
    assert ended.code == 0
    for flag in dataclass_flags(model):
        assert f"--{flag.name.replace('_', '-')} " in ended.out


def test_descriptions_are_read_from_the_docstring() -> None:
    text = """Summary about `things` and more.

    `a`: first thing, `inline` word. `b`, `c`: shared; or
    `d`: on the
    next line.

    A heading:
    `e`: last, with 0.5 in it.
    """
    assert descriptions(text) == {
        "a": "first thing, `inline` word",
        "b": "shared",
        "c": "shared",
        "d": "on the next line",
        "e": "last, with 0.5 in it",
    }
