"""Flags made from a settings class, so that a setting's description, default and limits are said once, where it lives.

A command whose flags are made so is declared with PASS_ON and hands all that follows its name to `run`, which builds
an app for just this call: nothing of a room is imported before somebody asks for its command.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

# Everything after the command's name goes to the inner app, --help too.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_METAVARS = {"int": "NUMBER", "float": "NUMBER", "ByteSize": "BYTES", "str": "TEXT", "Path": "PATH"}


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting. `name`: as in the settings class, with dots into its parts. `kind`: its type. `notes`: shown in
    brackets after the description."""

    name: str
    kind: Any
    description: str
    notes: str


def run(
    flags: Sequence[Flag], action: Callable[[dict[str, Any]], None], arguments: Sequence[str], program: str, about: str
) -> None:
    """Parses `arguments` and calls `action` with what was given, by the flags' names: texts, bools, lists of texts; the
    settings class checks and converts them. Always ends in SystemExit or an exception of `action`."""

    def command(**given: Any) -> None:
        action({flag.name: given[_identifier(flag)] for flag in flags if given[_identifier(flag)] not in (None, [])})

    parameters = [_parameter(flag) for flag in flags]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    # Without Rich's table, which cuts long names off: this help is a reference.
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    inner.command(help=about, context_settings={"help_option_names": ["-h", "--help"]})(command)
    inner(list(arguments), prog_name=program)


def shown(value: Any) -> str:
    """A default for people."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == "" or value == () or value == []:
        return "none"
    if type(value).__name__ == "ByteSize":
        return str(value.human_readable())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def without_none(kind: Any) -> Any:
    """`X` for `X | None`, anything else as it is."""
    kinds = [one for one in get_args(kind) if one is not type(None)]
    return kinds[0] if type(None) in get_args(kind) and len(kinds) == 1 else kind


def _identifier(flag: Flag) -> str:
    return flag.name.replace(".", "__")


def _parameter(flag: Flag) -> inspect.Parameter:
    kind = without_none(flag.kind)
    several = get_origin(kind) in (list, tuple, set, frozenset)
    option_name = "--" + flag.name.replace("_", "-")
    option = typer.Option(
        f"{option_name}/--no-{option_name[2:]}" if kind is bool else option_name,
        help=f"{flag.description}  [{flag.notes}]".strip(),
        metavar=None if kind is bool else _metavar(get_args(kind)[0] if several else kind),
        show_default=False,
    )
    annotation: Any = bool | None if kind is bool else list[str] | None if several else str | None
    return inspect.Parameter(
        _identifier(flag), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _metavar(kind: Any) -> str:
    if kind is Path:
        return "PATH"
    return _METAVARS.get(getattr(kind, "__name__", ""), "VALUE")
