"""The demo's table: for people on the terminal, for programs as rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cli.demo.results import STAGES, Demo, Found, match


def as_rows(demo: Demo) -> list[dict[str, Any]]:
    """One row a picture and quality. Sizes in bytes, times in milliseconds."""
    return [
        {
            "input": str(picture.source),
            "width": picture.width,
            "height": picture.height,
            "quality": coded.quality,
            "jpeg_bytes": picture.jpeg_bytes,
            "jpeg_is_own": picture.jpeg_is_own,
            "sent_bytes": coded.sent_bytes,
            "ratio": round(picture.ratio(coded), 2),
            "bpp": round(picture.bpp(coded), 5),
            "found_on_original": [found.label for found in picture.found],
            "found_after_codec": [found.label for found in coded.found],
            "still_found": sum(at is not None for at in match(picture.found, coded.found)),
            "stages_ms": {stage: round(value, 2) for stage, value in coded.stages_ms.items()},
            "round_trip_ms": round(coded.round_trip_ms, 1),
        }
        for picture in demo.pictures
        for coded in picture.coded
    ]


def print_table(demo: Demo) -> None:
    """What the demo found at the quality shown, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = demo.coded(demo.shown_quality)
    results = Table(box=box.SIMPLE_HEAD, title=f"Quality {demo.shown_quality:g}", title_justify="left")
    results.add_column("picture", style="bold")
    for name in ("as JPEG", "sent", "ratio"):
        results.add_column(name, justify="right", no_wrap=True)
    results.add_column("found on the original")
    results.add_column("found after the codec")
    for picture, coded in zip(demo.pictures, shown, strict=True):
        results.add_row(
            picture.title,
            f"{picture.jpeg_bytes:,}",
            f"{coded.sent_bytes:,}",
            f"{picture.ratio(coded):.1f}x",
            counted(picture.found),
            counted(coded.found),
        )
    times = Table(box=box.SIMPLE_HEAD, title="Milliseconds", title_justify="left")
    times.add_column("stage", style="bold", no_wrap=True)
    for picture in demo.pictures:
        times.add_column(picture.title, justify="right")
    for stage in STAGES:
        times.add_row(stage, *(f"{coded.stages_ms[stage]:.1f}" for coded in shown))
    times.add_section()
    times.add_row("picture to answer", *(f"{coded.round_trip_ms:.0f}" for coded in shown))
    console = Console()
    console.print(results)
    console.print(times)


def counted(found: Sequence[Found]) -> str:
    """Labels with how often each was found, in order of first appearance: "2 person, cup"."""
    return (
        ", ".join(
            label if count == 1 else f"{count} {label}" for label, count in Counter(one.label for one in found).items()
        )
        or "nothing"
    )
