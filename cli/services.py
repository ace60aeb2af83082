"""`sightline edge` and `sightline cloud`: one flag for each field of the service's settings.

Flags are passed on as text and checked where environment and file are checked too, so that an error reads the same
wherever the value came from.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import typer

from cli.flags import Flag, run, shown

if TYPE_CHECKING:
    from shared.settings import Settings

ORDER = "A flag goes before the environment, that before the file named by --config, that before the default."


def edge(context: typer.Context) -> None:
    """Run the edge service: pictures in, bitstreams to the cloud."""
    from edge.server import serve
    from edge.settings import EdgeSettings

    run_service(EdgeSettings, serve, context.args, edge.__doc__ or "")


def cloud(context: typer.Context) -> None:
    """Run the cloud service: bitstreams in, detections out."""
    from cloud.server import serve
    from cloud.settings import CloudSettings

    run_service(CloudSettings, serve, context.args, cloud.__doc__ or "")


def run_service(
    model: type["Settings"],
    serve: Callable[[Any], Coroutine[Any, Any, None]],
    arguments: Sequence[str],
    about: str,
) -> None:
    """Reads the settings and serves until a signal says stop. Raises InvalidSettings and what `serve` raises."""

    def start(given: dict[str, Any]) -> None:
        asyncio.run(serve(model.load(**given)))

    run(settings_flags(model), start, arguments, f"sightline {model.table}", f"{about}\n\n{ORDER}")


def settings_flags(model: type["Settings"]) -> list[Flag]:
    flags = []
    for name, field in model.model_fields.items():
        variable = f"{model.model_config['env_prefix']}{name}".upper()
        default = shown(field.get_default(call_default_factory=True))
        flags.append(Flag(name, field.annotation, field.description or "", f"env: {variable}; default: {default}"))
    return flags
