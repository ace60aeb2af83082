"""Rate-accuracy plots: one of everything measured, and one in the style of the paper's (arXiv 2108.09993, figure 3).

Points are what was measured, lines join the Pareto fronts that BD-rates are computed from, and the dashed line is the
accuracy on the original pictures.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation.accuracy import Metric
from trainer.evaluation.bdrate import pareto_front
from trainer.evaluation.evaluate import Evaluation, TaskResult

COLOURS = {"jpeg": "#8c8c8c", "hevc": "#d98c21", "av1": "#4f9d4f", "vvc": "#c33c54"}
SIGHTLINE_COLOURS = ("#1f4e9c", "#3aa0c9", "#6b4fa0", "#111111")
FORMATS = ("png", "svg")


def plot_all(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Both plots for every network and metric as PNG and SVG; returns the PNG paths."""
    made = []
    for result in evaluation.results:
        for metric in result.original.measured:
            stem = f"{result.task}-{str(metric).replace(' ', '-').lower()}"
            made.append(_save(_everything(evaluation, result, metric), folder / f"curves-{stem}"))
            if not metric.agreement:
                made.append(_save(_papers(evaluation, result, metric), folder / f"paper-{stem}"))
    return made


def _save(figure: Figure, stem: Path) -> Path:
    for extension in FORMATS:
        figure.savefig(
            stem.with_name(f"{stem.name}.{extension}"), dpi=130, metadata={"Date": None} if extension == "svg" else None
        )
    plt.close(figure)
    return stem.with_name(f"{stem.name}.png")


def _colour(evaluation: Evaluation, name: str) -> str:
    if name in evaluation.series:
        return SIGHTLINE_COLOURS[evaluation.series.index(name) % len(SIGHTLINE_COLOURS)]
    return COLOURS.get(name.split("-")[0], "#000000")


def _draw(axes: Axes, evaluation: Evaluation, result: TaskResult, metric: Metric, names: Sequence[str]) -> None:
    for name in names:
        measured = [p.measured[metric] for p in result.points if p.series == name]
        if not measured:
            continue
        bpp, accuracy = [m.bpp for m in measured], [float(m.scores.ap[0]) for m in measured]
        front = pareto_front(bpp, accuracy)
        colour = _colour(evaluation, name)
        axes.plot(bpp, accuracy, ".", color=colour, markersize=3.5, alpha=0.45)
        marker = "o" if name in evaluation.series else "s"
        axes.plot(
            [bpp[i] for i in front], [accuracy[i] for i in front], f"-{marker}", color=colour, markersize=4, label=name
        )
    uncompressed = float(result.original.measured[metric].scores.ap[0])
    axes.axhline(uncompressed, color="black", linewidth=0.8, linestyle="--", label="original pictures")
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(str(metric))
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _title(evaluation: Evaluation, result: TaskResult, metric: Metric) -> str:
    count = len(evaluation.pictures.pictures)
    return f"{result.task} ({result.role}), {metric}, {evaluation.pictures.name}, {count} pictures"


def _everything(evaluation: Evaluation, result: TaskResult, metric: Metric) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    _draw(axes, evaluation, result, metric, [*evaluation.anchors, *evaluation.series])
    axes.set_xscale("log")
    axes.set_title(_title(evaluation, result, metric), fontsize=9)
    return figure


def _papers(evaluation: Evaluation, result: TaskResult, metric: Metric) -> Figure:
    """Linear rate, Sightline and VVC alone, the range in which Sightline works."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    vvc = [name for name in evaluation.anchors if name.startswith("vvc")]
    _draw(axes, evaluation, result, metric, [*vvc, *evaluation.series])
    ours = [p.measured[metric] for p in result.points if p.series in evaluation.series]
    if ours:
        axes.set_xlim(0, 1.3 * max(m.bpp for m in ours))
        axes.set_ylim(0.8 * min(float(m.scores.ap[0]) for m in ours), None)
    axes.set_title(_title(evaluation, result, metric), fontsize=8)
    return figure
