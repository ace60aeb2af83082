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
QUALITIES = (3.0, 4.5, 6.0)
SHOWN = 4.5
LIVE_TASK = "mask-rcnn-mobilenetv2"  # boxes and masks


def demo(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Pictures, or folders of pictures; with --live also any SOURCE of `sightline camera`.",
            show_default="scikit-image's photographs",
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
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Task model in the cloud.",
            show_default=f"{DEFAULT_TASK}; with --live {LIVE_TASK}",
        ),
    ] = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Leave out what scores less.")] = DEFAULT_SCORE,
    live: Annotated[
        bool, typer.Option("--live", help="Cameras that go on until Ctrl-C, to be watched in the web console.")
    ] = False,
    fps: Annotated[
        float, typer.Option("--fps", min=0.01, max=60, help="With --live: frames a second of each camera, at most.")
    ] = 4.0,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="With --live: end by itself after so long.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Start edge and cloud, send pictures through, and show what arrives."""
    if live:
        show_live(inputs or [], model, task or LIVE_TASK, fps, seconds)
        return
    sources = expand([Path(each) for each in inputs], PICTURE_SUFFIXES) if inputs else photographs()
    jobs = plan(sources, output, ".png")
    make_folder(output)

    from rich.console import Console

    from cli.demo.run import Plan, read_inputs, run
    from cli.demo.table import as_rows, print_table

    qualities = tuple(sorted(set(quality or QUALITIES)))
    shown = SHOWN if SHOWN in qualities else qualities[len(qualities) // 2]
    with Console(stderr=True).status("reading pictures") as status:
        try:
            wanted = Plan(qualities, shown, model, task or DEFAULT_TASK, score)
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


def show_live(inputs: list[str], model: str, task: str, fps: float, seconds: float | None) -> None:
    """Runs until a signal. Pictures and folders of pictures become scenes; what is neither is a source."""
    pictures, sources = [], []
    for each in inputs:
        path = Path(each)
        if path.is_dir() or path.suffix.lower() in PICTURE_SUFFIXES:
            pictures += expand([path], PICTURE_SUFFIXES)
        else:
            sources.append(each)
    if not inputs:
        pictures = photographs()

    from rich.console import Console

    from cli.demo.live import Show, show

    with Console(stderr=True).status("starting") as status:
        wanted = Show(pictures, sources, model, task, fps, seconds)
        asyncio.run(show(wanted, status.update, lambda address: print(f"The console is at {address}", flush=True)))


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
