"""`sightline demo`: the whole way of a frame, between two real processes, on real pictures, with a page to look at."""

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.detect import DEFAULT_SCORE, DEFAULT_TASK
from cli.files import PICTURE_SUFFIXES, Job, expand, make_folder, plan, write_atomically

if TYPE_CHECKING:
    from cli.demo.results import Demo

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png", "camera.png")  # in scikit-image
QUALITIES = (2.0, 4.0, 6.0)
SHOWN = 4.0


def demo(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT", help="Pictures, or folders of pictures.", show_default="scikit-image's photographs"
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for page and pictures.")] = Path(
        "demo"
    ),
    quality: Annotated[
        list[float] | None,
        typer.Option(
            "--quality", "-q", min=1, max=8, help="Quality to show; give several to compare.", show_default="2, 4 and 6"
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", metavar="ID", help="Codec: a bundled name or folder.")] = "detection",
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="Task model in the cloud.")] = DEFAULT_TASK,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Leave out what scores less.")] = DEFAULT_SCORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Start edge and cloud, send pictures through, and show what arrives."""
    sources = expand(inputs, PICTURE_SUFFIXES) if inputs else photographs()
    jobs = plan(sources, output, ".png")
    make_folder(output)

    from rich.console import Console

    from cli.demo.run import Plan, read_inputs, run
    from cli.demo.table import as_rows, print_table

    qualities = tuple(sorted(set(quality or QUALITIES)))
    shown = SHOWN if SHOWN in qualities else qualities[len(qualities) // 2]
    with Console(stderr=True).status("reading pictures") as status:
        try:
            wanted = Plan(qualities, shown, model, task, score)
            result = asyncio.run(run(read_inputs(sources), wanted, status.update))
        except asyncio.CancelledError:
            raise typer.Exit(128 + signal.SIGTERM) from None
        status.update("drawing")
        write_pictures(result, jobs)
        write_page(result, output / "index.html")
    if as_json:
        print(json.dumps(as_rows(result), indent=2))
    else:
        print_table(result)
        print(f"The page is {output / 'index.html'}")


def photographs() -> list[Path]:
    """scikit-image's own photographs of things a detector knows. Raises typer.BadParameter where there is none."""
    from importlib.util import find_spec

    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise typer.BadParameter("name some pictures, or install scikit-image, which brings photographs")
    folder = Path(found.origin).parent / "data"
    return [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]


def write_page(result: "Demo", path: Path) -> None:
    from cli.demo.page import render

    write_atomically(path, render(result).encode())


def write_pictures(result: "Demo", jobs: list[Job]) -> None:
    """Each picture at the quality shown: as decoded, ``a.seen.png``, and with what was found, ``a.detections.png``."""
    from cli.drawing import draw
    from cli.pictures import encode_png

    for job, coded in zip(jobs, result.coded(result.shown_quality), strict=True):
        drawn = draw(
            coded.rgb,
            [found.box for found in coded.found],
            [found.category_id for found in coded.found],
            [f"{found.label} {100 * found.score:.0f} %" for found in coded.found],
        )
        for what, rgb in (("seen", coded.rgb), ("detections", drawn)):
            write_atomically(job.target.with_suffix(f".{what}.png"), encode_png(rgb))
