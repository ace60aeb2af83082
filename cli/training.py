"""`sightline train` and `sightline evaluate`: flags and a TOML file become the trainer's settings.

The settings are dataclasses whose docstrings describe each field as "`name`: what it is."; a part that is a dataclass
itself is a table in the file and a prefix with a dot among the flags: [schedule] span, --schedule.span.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typer

from cli.flags import Flag, run, shown, without_none
from shared.errors import InvalidSettings

Settings = TypeVar("Settings")

CONFIG = Flag("config", Path, "TOML file of settings, such as the one that a run leaves", "flags go before it")


def codec(context: typer.Context) -> None:
    """Train a codec for a frozen task network and write its bundle."""
    import_quietly()
    from trainer.settings import TrainSettings
    from trainer.train import train_codec

    def start(settings: TrainSettings) -> None:
        print(f"The bundle is {train_codec(settings)}")

    run_settings(TrainSettings, start, context.args, "sightline train codec", codec.__doc__ or "")


def scales(context: typer.Context) -> None:
    """Choose the sizes at which a codec's bundle codes pictures."""
    import_quietly()
    from trainer.scales import ScaleSettings, train_scales

    def start(settings: ScaleSettings) -> None:
        print(f"The bundle is {train_scales(settings)}")

    run_settings(ScaleSettings, start, context.args, "sightline train scales", scales.__doc__ or "")


def entropy(context: typer.Context) -> None:
    """Train a codec's entropy model on whole pictures, and give it a context model."""
    import_quietly()
    from trainer.entropy import EntropySettings, train_entropy

    def start(settings: EntropySettings) -> None:
        print(f"The bundle is {train_entropy(settings)}")

    run_settings(EntropySettings, start, context.args, "sightline train entropy", entropy.__doc__ or "")


def task(context: typer.Context) -> None:
    """Train a task network on COCO-format data and write its bundle."""
    import_quietly()
    from trainer.train_task import TrainTaskSettings, train_task

    def start(settings: TrainTaskSettings) -> None:
        print(f"The bundle is {train_task(settings)}")

    run_settings(TrainTaskSettings, start, context.args, "sightline train task", task.__doc__ or "")


def evaluate(context: typer.Context) -> None:
    """Measure rate and task accuracy of codecs beside JPEG, HEVC, AV1 and VVC."""
    import_quietly()
    from trainer.evaluation import report
    from trainer.evaluation.evaluate import EvaluateSettings
    from trainer.evaluation.evaluate import evaluate as measure

    def start(settings: EvaluateSettings) -> None:
        report.write(measure(settings))
        print(f"The report is {settings.out_dir / 'report.md'}")

    run_settings(EvaluateSettings, start, context.args, "sightline evaluate", evaluate.__doc__ or "")


def run_settings(
    model: type[Settings], start: Callable[[Settings], None], arguments: Sequence[str], program: str, about: str
) -> None:
    """Builds a `model` of what `arguments` and their --config say, and starts. Raises InvalidSettings and what `start`
    raises."""

    def action(given: dict[str, Any]) -> None:
        file = given.pop(CONFIG.name, None)
        values = read_toml(Path(file)) if file else {}
        for name, value in given.items():
            *tables, key = name.split(".")
            table = values
            for one in tables:
                table = table.setdefault(one, {})
            table[key] = value
        start(build(model, values))

    about = f"{about}\n\n{opening(model.__doc__ or '')}"
    run([CONFIG, *dataclass_flags(model)], action, arguments, program, about)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises InvalidSettings."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"--config: expected settings in TOML, got {error}") from error


def build(model: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings object from texts and TOML values. Raises InvalidSettings, which names every field at fault."""
    from pydantic import TypeAdapter, ValidationError

    known = {flag.name for flag in dataclass_flags(model)}
    unknown = [name for name in names_in(values) if name not in known]
    if unknown:
        raise InvalidSettings(f"no setting is called {', '.join(unknown)}")
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        faults = (
            f"--{'.'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg']}"
            + ("" if fault["type"] == "missing" else f", got {fault['input']!r}")
            for fault in error.errors()
        )
        raise InvalidSettings("; ".join(faults)) from None


def names_in(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from names_in(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def dataclass_flags(model: Any, prefix: str = "") -> list[Flag]:
    """A flag for each field of a dataclass and of the dataclasses in it."""
    hints, described = get_type_hints(model), descriptions(model.__doc__ or "")
    flags = []
    for field in fields(model):
        kind = without_none(hints[field.name])
        if is_dataclass(kind):
            flags += dataclass_flags(kind, f"{prefix}{field.name}.")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        notes = "must be given" if default is MISSING else f"default: {shown(default)}"
        flags.append(Flag(prefix + field.name, hints[field.name], described.get(field.name, ""), notes))
    return flags


_HEAD = re.compile(r"(?:`\w+`(?:, | and )?)+(?:, [^`:.]*)?: ")


def descriptions(docstring: str) -> dict[str, str]:
    """What a docstring says of each name: "`a`, `b`: this. `c`: that." gives this to a and b, and that to c."""
    found = {}
    for text in paragraphs(docstring):
        heads = list(_HEAD.finditer(text))
        for i, head in enumerate(heads):
            end = heads[i + 1].start() if i + 1 < len(heads) else len(text)
            said = text[head.end() : end].strip(" ;,.").removesuffix("; or")
            found |= dict.fromkeys(re.findall(r"`(\w+)`", head[0]), said)
    return found


def opening(docstring: str) -> str:
    """What a docstring says before it describes the first name."""
    return _HEAD.split(paragraphs(docstring)[0])[0].strip()


def paragraphs(docstring: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)]


def import_quietly() -> None:
    """One of the trainer's libraries uses what torch calls outdated; no user can do anything about it."""
    import warnings

    warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
