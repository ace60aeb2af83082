"""`sightline quarantine`: what edge or cloud rejected, to be looked at, and to be delivered again after a fix.

Asked over the service's admin port; whoever may administer may do this.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.admin import Endpoint, endpoint
from shared.errors import InvalidInput

if TYPE_CHECKING:
    from sightline.v1 import common_pb2, quarantine_pb2

quarantine = typer.Typer(no_args_is_help=True)
CALL_S = 120.0
PAGE_FRAMES = 1000
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="camera/epoch/seq, as listed.")]

quarantine.callback()(endpoint)


@quarantine.command("list")
def show(context: typer.Context) -> None:
    """List rejected frames, oldest first, with the reason."""
    from rich.console import Console
    from rich.table import Table

    grid = Table("frame", "captured", "rejected", "edge", "size", "bytes", "reason")
    for frame in every_frame(context.obj):
        grid.add_row(
            name_text(frame.frame),
            frame.capture_time.ToDatetime().isoformat(" ", "seconds") if frame.capture_time.seconds else "",
            frame.quarantined_time.ToDatetime().isoformat(" ", "seconds"),
            frame.edge_id,
            f"{frame.width}x{frame.height}",
            str(frame.payload_bytes),
            frame.reason,
        )
    Console(width=None if sys.stdout.isatty() else 240).print(grid)


@quarantine.command()
def fetch(
    context: typer.Context,
    names: Names = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder, made if missing.")] = Path(),
) -> None:
    """Save rejected frames as .slc files; without a name, all of them."""
    from sightline.v1 import quarantine_pb2

    out.mkdir(parents=True, exist_ok=True)
    for name in chosen(context.obj, names or [], everything=not names):
        fetched = ask(context.obj, "FetchQuarantined", quarantine_pb2.FetchQuarantinedRequest(frame=name))
        path = out / (name_text(name).replace("/", "_").replace(":", "_") + ".slc")
        path.write_bytes(fetched.bitstream)
        print(path)


@quarantine.command()
def replay(
    context: typer.Context,
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Every frame that is listed.")] = False,
) -> None:
    """Deliver rejected frames again, each under a new name; its rejection stays in the log."""
    from sightline.v1 import common_pb2, quarantine_pb2

    if not names and not everything:
        raise InvalidInput("expected the names of frames, or --all, got neither")
    for name in chosen(context.obj, names or [], everything=everything):
        answer = ask(context.obj, "ReplayQuarantined", quarantine_pb2.ReplayQuarantinedRequest(frame=name))
        end = common_pb2.Outcome.Name(answer.outcome).removeprefix("OUTCOME_").lower() if answer.outcome else "sent"
        print(f"{name_text(name)} -> {name_text(answer.replayed_as)}: {end} {answer.reason}".rstrip())


def ask(at: Endpoint, method: str, request: Any) -> Any:
    """One call of the QuarantineService. Raises SightlineError as the service did."""
    from sightline.v1 import quarantine_pb2_grpc

    return at.call(
        lambda channel: getattr(quarantine_pb2_grpc.QuarantineServiceStub(channel), method)(request, timeout=CALL_S)
    )


def chosen(at: Endpoint, names: list[str], *, everything: bool) -> list["common_pb2.FrameName"]:
    """The frames meant, listed before anything is done to them. Raises InvalidInput."""
    return [frame.frame for frame in every_frame(at)] if everything else [parse_name(name) for name in names]


def every_frame(at: Endpoint) -> Iterator["quarantine_pb2.QuarantinedFrame"]:
    """Page after page."""
    from sightline.v1 import quarantine_pb2

    after = 0
    while True:
        answer = ask(at, "ListQuarantine", quarantine_pb2.ListQuarantineRequest(after=after, limit=PAGE_FRAMES))
        yield from answer.frames
        after = answer.next
        if not after:
            return


def parse_name(text: str) -> "common_pb2.FrameName":
    """camera/epoch in 16 hex digits/seq. Raises InvalidInput."""
    from sightline.v1 import common_pb2

    try:
        camera_id, epoch, seq = text.split("/")
        return common_pb2.FrameName(camera_id=camera_id, epoch=int(epoch, 16), seq=int(seq))
    except ValueError:
        raise InvalidInput(f"expected a frame's name as camera/epoch/seq, got {text!r}") from None


def name_text(name: "common_pb2.FrameName") -> str:
    return f"{name.camera_id}/{name.epoch:016x}/{name.seq}"
