"""`sightline watch`: detections from the cloud, for eyes, for pipes, for programs, for files."""

import re
import signal
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.connect import CLOUD, Ca, Certificate, Insecure, Key, Token, connection
from cli.detect import DEFAULT_SCORE

if TYPE_CHECKING:
    from cli.watch.actions import Exec, Webhook
    from cli.watch.export import Export
    from cli.watch.show import View
    from shared.clients import Connection, Cursor, CursorFile, DetectionClient, DetectionEvent, EventFilter, StartAt

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Form(StrEnum):
    TABLE = "table"
    JSON = "json"
    NONE = "none"


class OutcomeName(StrEnum):
    """Values of --outcome; those of shared.clients.Outcome, which is not imported before it is needed."""

    DETECTIONS = "detections"
    REJECTED = "rejected"
    EXPIRED = "expired"
    DROPPED = "dropped"


def watch(
    cloud: Annotated[str, typer.Option("--cloud", metavar="HOST:PORT", help="The cloud service.")] = CLOUD,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="WHERE",
            help="beginning, end, a time (2026-01-31T14:00), an age (10m, 2h, 1d), or a cursor (LOG:SEQUENCE).",
        ),
    ] = "end",
    cursor: Annotated[
        Path | None,
        typer.Option("--cursor", metavar="PATH", help="Keep the place in this file, and go on from it next time."),
    ] = None,
    cameras: Annotated[list[str] | None, typer.Option("--camera", metavar="NAME", help="Only these cameras.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="Only these classes: a name or a COCO id.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            min=0,
            max=1,
            help="Hide what scores less.",
            show_default=f"{DEFAULT_SCORE}, in the table only",
        ),
    ] = None,
    outcomes: Annotated[
        list[OutcomeName] | None, typer.Option("--outcome", help="Only frames that ended so.", show_default="all")
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option("--format", help="How to show them.", show_default="table on a terminal, else json lines"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when all that is in the log has been shown.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="End after so many events.")] = None,
    program: Annotated[
        str | None, typer.Option("--exec", metavar="COMMAND", help="Run for each event; its JSON comes on stdin.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option("--webhook", metavar="URL", help="POST each event's JSON there.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="PATH", help="Write a file: .json (COCO), .csv or .parquet, by its ending."),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after an event whose --exec or --webhook failed.")
    ] = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show what is detected, and hand it on."""
    from cli.watch.actions import Exec, Webhook
    from cli.watch.export import Export, check_path
    from shared import logs
    from shared.clients import CursorFile, DetectionClient, EventFilter, Outcome, Retry

    begin = read_start(start)
    if export is not None:
        check_path(export)
    told_score = DEFAULT_SCORE if min_score is None else min_score
    actions: list[Exec | Webhook] = [Exec(program, told_score)] if program else []
    if webhook:
        actions.append(Webhook(webhook))
    file = CursorFile(cursor) if cursor else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    address = connection(cloud, ca, certificate, key, token, insecure)
    wanted = EventFilter(
        tuple(cameras or ()),
        tuple(read_classes(classes or [], address)),
        min_score or 0.0,
        tuple(Outcome(outcome.value) for outcome in outcomes or ()),
    )
    # Who follows wants to go on whenever the cloud comes back; who asks once wants an answer.
    with DetectionClient(address, retry=Retry() if once else Retry(give_up_s=None)) as client:
        run = Run(client, begin, wanted, file, actions, once=once, limit=limit, keep_going=keep_going)
        with ExitStack() as stack:
            shown = stack.enter_context(view(form, export is not None, told_score))
            written = stack.enter_context(Export(export)) if export else None
            logs.configure("warning", "console")  # says why a subscription broke
            run.follow(shown, written)
        if file is not None:
            file.flush()  # the export is whole now
    if run.failed:
        print(f"sightline: {run.failed} of {run.count} events failed", file=sys.stderr)
        raise typer.Exit(1)


class Run:
    """One pass over the log. The cursor moves past an event only once everything was done with it."""

    def __init__(
        self,
        client: "DetectionClient",
        begin: "StartAt",
        wanted: "EventFilter",
        file: "CursorFile | None",
        actions: "list[Exec | Webhook]",
        *,
        once: bool,
        limit: int | None,
        keep_going: bool,
    ) -> None:
        self._updates = client.updates((file.load() if file else None) or begin, wanted)
        self._file = file
        self._actions = actions
        self._once = once
        self._limit = limit
        self._keep_going = keep_going
        self.count = 0
        self.failed = 0

    def follow(self, shown: "View", written: "Export | None") -> None:
        """Until there is no more, or somebody stops it. Raises what the cloud or an action raised."""
        from shared.clients import DetectionEvent

        try:
            for update in self._updates:
                if isinstance(update, DetectionEvent):
                    self._deal_with(update, shown, written)
                self._passed(update.cursor, written)
                if self.count == self._limit or (
                    self._once and not isinstance(update, DetectionEvent) and update.caught_up
                ):
                    return
        except KeyboardInterrupt:
            pass  # how following ends
        finally:
            self._updates.close()
            if self._file is not None and written is None:
                self._file.flush()

    def _deal_with(self, event: "DetectionEvent", shown: "View", written: "Export | None") -> None:
        from shared.errors import SightlineError

        try:
            for act in self._actions:
                act(event)
        except SightlineError as error:
            if not self._keep_going:
                raise
            self.failed += 1
            print(f"sightline: {error}", file=sys.stderr)
        shown.add(event)
        if written is not None:
            written.add(event)
        self.count += 1

    def _passed(self, cursor: "Cursor", written: "Export | None") -> None:
        if self._file is None:
            return
        if written is None:
            self._file.save(cursor)
        else:
            self._file.note(cursor)  # rows of a file that is not whole yet are not dealt with


def view(form: Form | None, exported: bool, min_score: float) -> "View":
    from cli.watch.show import JsonLines, LiveTable, Silent

    if form is None:
        form = Form.NONE if exported else Form.TABLE if sys.stdout.isatty() else Form.JSON
    if form is Form.TABLE:
        return LiveTable(min_score)
    return JsonLines() if form is Form.JSON else Silent()


def read_start(text: str) -> "StartAt":
    """A place in the log. A time without a zone is this machine's. Raises typer.BadParameter."""
    from shared.clients import Cursor, Start
    from shared.errors import InvalidInput

    if text in list(Start):
        return Start(text)
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if age:
        return datetime.now(UTC) - timedelta(**{UNITS[age[2]]: float(age[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        pass
    try:
        return Cursor.parse(text)
    except InvalidInput:
        raise typer.BadParameter(
            f"--from: expected beginning, end, a time, an age such as 10m, or LOG:SEQUENCE, got '{text}'"
        ) from None


def read_classes(names: list[str], cloud: "Connection") -> list[int]:
    """COCO category ids. Names are those of the cloud's own tasks. Raises typer.BadParameter."""
    from shared.clients import DetectionClient

    if all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    with DetectionClient(cloud) as client:
        known = {label: number for number, label in client.categories().items()}
    for name in names:
        if not name.isdecimal() and name not in known:
            raise typer.BadParameter(f"--class: '{name}' is none of this cloud's classes: {', '.join(sorted(known))}")
    return [int(name) if name.isdecimal() else known[name] for name in names]
