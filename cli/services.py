"""`sightline edge` and `sightline cloud`: one flag for each field of the service's settings.

The flags are made from the settings model, so that its description, default and limits are said once. They are passed
on as text and checked where environment and file are checked too; an error reads the same wherever the value came from.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from shared.settings import Settings

# Everything after the command's name goes to the inner app made by `run`, --help too.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def edge(context: typer.Context) -> None:
    """Run the edge service: pictures in, bitstreams to the cloud."""
    from edge.server import serve
    from edge.settings import EdgeSettings

    run(EdgeSettings, serve, context.args, "sightline edge", edge.__doc__ or "")


def cloud(context: typer.Context) -> None:
    """Run the cloud service: bitstreams in, detections out."""
    from cloud.server import serve
    from cloud.settings import CloudSettings

    run(CloudSettings, serve, context.args, "sightline cloud", cloud.__doc__ or "")


def run(
    model: type["Settings"],
    serve: Callable[[Any], Coroutine[Any, Any, None]],
    arguments: Sequence[str],
    program: str,
    summary: str,
) -> None:
    """Parses `arguments` into a `model` and serves until a signal says stop. Raises InvalidSettings, SystemExit."""

    def command(**flags: Any) -> None:
        settings = model.load(**{name: value for name, value in flags.items() if value not in (None, [])})
        asyncio.run(serve(settings))

    parameters = [parameter(name, field, model) for name, field in model.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    inner.command(
        help=f"{summary}\n\nA flag goes before the environment, that before the file named by --config, that before "
        "the default.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )(command)
    inner(list(arguments), prog_name=program)


def parameter(name: str, field: "FieldInfo", model: type["Settings"]) -> inspect.Parameter:
    """The flag of one field: given or None (an empty list for a field that takes several)."""
    flag = "--" + name.replace("_", "-")
    kind = value_type(field.annotation)
    several = get_origin(kind) in (list, tuple, set, frozenset)
    variable = f"{model.model_config['env_prefix']}{name}".upper()
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=f"{field.description}  [env: {variable}; default: {shown_default(field)}]",
        metavar=None if kind is bool else metavar(kind),
        show_default=False,
    )
    annotation: Any = bool | None if kind is bool else list[str] | None if several else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def value_type(annotation: Any) -> Any:
    """The type of a field without `| None`."""
    kinds = [one for one in get_args(annotation) if one is not type(None)]
    return kinds[0] if type(None) in get_args(annotation) and len(kinds) == 1 else annotation


def metavar(kind: Any) -> str:
    if get_origin(kind) is not None:
        return "VALUE"
    if kind is Path:
        return "PATH"
    return {"int": "NUMBER", "float": "NUMBER", "ByteSize": "BYTES", "str": "TEXT"}.get(
        getattr(kind, "__name__", ""), "VALUE"
    )


def shown_default(field: "FieldInfo") -> str:
    from pydantic import ByteSize

    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "must be given"
    if isinstance(value, ByteSize):
        return value.human_readable()
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == "" or value == () or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
