"""The demo's table: for people on the terminal, for programs as rows."""

from typing import Any

from cli.demo.results import Demo, match


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
    stages = list(dict.fromkeys(stage for coded in shown for stage in coded.stages_ms))
    results = Table(box=box.SIMPLE_HEAD, title=f"Quality {demo.shown_quality:g}", title_justify="left")
    results.add_column("picture", style="bold")
    for name in ("as JPEG", "sent", "ratio"):
        results.add_column(name, justify="right", no_wrap=True)
    results.add_column("found on the original")
    results.add_column("found after the codec")
    times = Table(box=box.SIMPLE_HEAD, title="Milliseconds", title_justify="left")
    times.add_column("picture", style="bold")
    for name in (*stages, "picture to answer"):
        times.add_column(name, justify="right")
    for picture, coded in zip(demo.pictures, shown, strict=True):
        results.add_row(
            picture.title,
            f"{picture.jpeg_bytes:,}",
            f"{coded.sent_bytes:,}",
            f"{picture.ratio(coded):.1f}x",
            ", ".join(found.label for found in picture.found) or "nothing",
            ", ".join(found.label for found in coded.found) or "nothing",
        )
        times.add_row(
            picture.title,
            *(f"{coded.stages_ms.get(stage, 0.0):.1f}" for stage in stages),
            f"{coded.round_trip_ms:.0f}",
        )
    console = Console()
    console.print(results)
    console.print(times)
