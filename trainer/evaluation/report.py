"""An evaluation on disk: `results.json`, `results.csv`, plots and `report.md`.

`results.json` has everything; the others are views of it. Networks that were trained through and those that took no
part are always printed together, and what is missing for that is said. A figure without support is "no result".
"""

import csv
import io
import json
import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.evaluation.accuracy import Measurement, Metric
from trainer.evaluation.anchors import ffmpeg_program
from trainer.evaluation.bdrate import CONFIDENCE, MIN_OVERLAP, MIN_POINTS, Interval
from trainer.evaluation.coded_store import write_atomically
from trainer.evaluation.comparison import WORKING_SHARE, Comparison, Point
from trainer.evaluation.evaluate import Evaluation, TaskResult
from trainer.evaluation.plots import plot_all

NO_RESULT = "no result"


def write(evaluation: Evaluation) -> None:
    """Write every view into `settings.out_dir`."""
    folder = evaluation.settings.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(as_json(evaluation), indent=1, allow_nan=False).encode())
    write_atomically(folder / "results.csv", as_csv(evaluation).encode())
    pictures = [*plot_all(evaluation, folder), *sorted(folder.glob("examples-*.jpg"))]
    write_atomically(folder / "report.md", as_markdown(evaluation, [picture.name for picture in pictures]).encode())


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything measured and compared; numbers that do not exist are null."""
    settings = evaluation.settings
    return {
        "set": {
            "name": evaluation.pictures.name,
            "pictures": len(evaluation.pictures.pictures),
            "pixels": evaluation.pictures.pixels,
        },
        "settings": {
            "draws": settings.draws,
            "confidence": CONFIDENCE,
            "min_points": MIN_POINTS,
            "min_overlap": MIN_OVERLAP,
            "working_share": WORKING_SHARE,
            "qualities": list(settings.qualities),
            "reduced": list(settings.reduced),
        },
        "environment": environment(evaluation),
        "codecs": evaluation.model_ids,
        "networks": evaluation.task_ids,
        "results": [
            {
                "network": result.task,
                "role": result.role,
                "points": [row for point in _all_points(result) for row in _rows(point)],
                "bd_rates": [_comparison(comparison) for comparison in result.comparisons],
                "highest_quality": [
                    {
                        "metric": str(check.metric),
                        "series": check.series,
                        "setting": check.setting,
                        "relative_accuracy": _number(check.relative),
                        "interval": _ends(check.interval),
                        "times_fewer_bits_than_original_files": _number(check.fewer_bits),
                    }
                    for check in result.checks
                ],
            }
            for result in evaluation.results
        ],
    }


def environment(evaluation: Evaluation) -> dict[str, str]:
    """What the figures were made with."""
    import torch
    import torchvision

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": platform.machine(),
        "device": evaluation.settings.device,
    }
    if any(name != "jpeg" for name in evaluation.anchors):
        found["ffmpeg"] = ffmpeg_program()[1]
    return found


def as_csv(evaluation: Evaluation) -> str:
    """One row a network, series, setting and metric."""
    out = io.StringIO()
    rows = [
        {"network": result.task, "role": result.role, **row}
        for result in evaluation.results
        for point in _all_points(result)
        for row in _rows(point)
    ]
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _all_points(result: TaskResult) -> Iterator[Point]:
    yield result.original
    yield from result.controls
    yield from result.points


def _rows(point: Point) -> Iterator[dict[str, Any]]:
    for metric, measured in point.measured.items():
        scores = measured.scores
        yield {
            "series": point.series,
            "setting": point.setting,
            "metric": str(metric),
            "bpp": _number(measured.bpp),
            "file_bpp": _number(point.file_bpp),
            "AP": _number(scores.ap[0]),
            "AP50": _number(scores.ap50[0]),
            "person_AP": _number(scores.person_ap[0]),
            "encode_s": _number(point.encode_s),
            "decode_s": _number(point.decode_s),
        }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "metric": str(comparison.metric),
        "series": comparison.series,
        "anchor": comparison.anchor,
        "bd_rate_percent": _number(comparison.result.percent),
        "interval": _ends(comparison.interval),
        "draws_without_result": comparison.interval.draws_without_result,
        "overlap": _number(comparison.result.overlap),
        "overlap_of_whole_ranges": _number(comparison.result.overlap_all),
        "why": comparison.result.why,
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


def _ends(interval: Interval) -> list[float | None]:
    return [_number(interval.low), _number(interval.high)]


def as_markdown(evaluation: Evaluation, pictures: list[str]) -> str:
    """The report for readers."""
    count = len(evaluation.pictures.pictures)
    lines = [
        f"# Rate and task accuracy on {evaluation.pictures.name}",
        "",
        f"{count} pictures, {evaluation.settings.draws} bootstrap draws over pictures, the same for every codec; "
        f"intervals are {CONFIDENCE:.0%}. Rates: anchors without parameter sets, delimiters and SEI; Sightline's "
        "whole .slc files; file sizes in results.csv.",
        "",
    ]
    roles = {result.role for result in evaluation.results}
    if roles != {"trained through", "witness"}:
        missing = ({"trained through", "witness"} - roles).pop()
        lines += [f"**Half of the two-network rule is missing here: no network in the role of {missing!r}.**", ""]
    lines += _bd_table(evaluation)
    for result in evaluation.results:
        lines += _network(result)
    lines += ["## Pictures", "", *[f"![{name}]({name})" for name in pictures], ""]
    return "\n".join(lines)


def _bd_table(evaluation: Evaluation) -> list[str]:
    """BD-rates of all networks in one table, so that none is read without the other."""
    lines = [
        "## BD-rate at equal accuracy",
        "",
        f"Negative: fewer bits. PCHIP on Pareto fronts; fewer than {MIN_POINTS} points or less than {MIN_OVERLAP:.0%} "
        f"overlap is no result. Overlap is judged from {WORKING_SHARE:.0%} of the original's accuracy up; in "
        "parentheses over the whole ranges.",
        "",
        "| network | metric | codec | against | BD-rate | 95 % interval | overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in evaluation.results:
        for c in result.comparisons:
            figure = NO_RESULT if c.result.percent is None else f"{c.result.percent:+.2f} %"
            spread = _spread(c.interval, "{:+.1f}")
            overlap = f"{c.result.overlap:.0%} ({c.result.overlap_all:.0%})"
            network = f"{result.task} ({result.role})"
            lines.append(f"| {network} | {c.metric} | {c.series} | {c.anchor} | {figure} | {spread} | {overlap} |")
    return [*lines, ""]


def _spread(interval: Interval, pattern: str) -> str:
    ends = ["open" if end is None else pattern.format(end) for end in (interval.low, interval.high)]
    return " to ".join(ends)


def _network(result: TaskResult) -> list[str]:
    lines = [f"## {result.task} ({result.role})", ""]
    for metric, original in result.original.measured.items():
        lines += [f"### {metric}", "", "| codec | setting | bpp | file bpp | AP | AP50 | person AP |"]
        lines += ["|---|---|---|---|---|---|---|", _row("original pictures", "files", result.original, original)]
        for control in result.controls:
            lines.append(_row(control.series, "no quantisation, no bits", control, control.measured[metric]))
        for point in result.points:
            lines.append(_row(point.series, point.setting, point, point.measured[metric]))
        lines += ["", *_control_note(metric, original, result.controls)]
    if result.checks:
        lines += [
            "### Highest quality against the original files",
            "",
            "| codec | metric | accuracy, relative | 95 % interval | fewer bits than the original files |",
            "|---|---|---|---|---|",
        ]
        for check in result.checks:
            ends = Interval(
                *(None if end is None else 100 * end for end in (check.interval.low, check.interval.high)),
                check.interval.draws_without_result,
            )
            lines.append(
                f"| {check.series} {check.setting} | {check.metric} | {100 * check.relative:+.2f} % | "
                f"{_spread(ends, '{:+.2f} %')} | {check.fewer_bits:.1f} times |"
            )
        lines.append("")
    return lines


def _control_note(metric: Metric, original: Measurement, controls: Sequence[Point]) -> list[str]:
    """Says so where the transforms alone better the original: then part of a gain is not coding."""
    better = [c.series for c in controls if c.measured[metric].scores.ap[0] > original.scores.ap[0]]
    if not better:
        return []
    return [
        f"Without quantisation {', '.join(better)} betters the original pictures: the transforms also improve this "
        "network's input, and a fair anchor would have an enhancer trained the same way.",
        "",
    ]


def _row(name: str, setting: str, point: Point, measured: Measurement) -> str:
    scores = measured.scores
    figures = f"{scores.ap[0]:.4f} | {scores.ap50[0]:.4f} | {scores.person_ap[0]:.4f}"
    return f"| {name} | {setting} | {measured.bpp:.4f} | {point.file_bpp:.4f} | {figures} |"
