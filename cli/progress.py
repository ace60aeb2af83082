"""Work on many files, one after the other: a bar on a terminal, one sentence for each that failed."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from cli.files import Job
from shared.errors import SightlineError

if TYPE_CHECKING:
    from rich.progress import Progress

Work = TypeVar("Work", Path, Job)


def for_each(items: Sequence[Work], work: Callable[[Work], None], title: str) -> None:
    """Calls `work` on each item. A SightlineError or OSError becomes a sentence on stderr that names the file, and the
    next item is taken. Raises typer.Exit(1) at the end if any failed."""
    failed = 0
    with bar() as progress:
        task = progress.add_task(title, total=len(items))
        for item in items:
            source = item.source if isinstance(item, Job) else item
            try:
                work(item)
            except (SightlineError, OSError) as error:
                failed += 1
                said = error.strerror if isinstance(error, OSError) and error.strerror else error
                print(f"sightline: {source}: {said}", file=sys.stderr)
            progress.advance(task)
    if failed:
        if len(items) > 1:
            print(f"sightline: {failed} of {len(items)} files failed", file=sys.stderr)
        raise typer.Exit(1)


def bar() -> "AbstractContextManager[Progress]":
    """A progress bar on stderr, silent where stderr is no terminal. Lines printed meanwhile go above it; stdout is left
    alone when it is piped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
