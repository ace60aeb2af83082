"""docs/benchmarks.md and its plots, from what the benchmarks found."""

from collections.abc import Sequence
from pathlib import Path

from bench.report import HEADS, Plot, Report, cells

HEAD = """# Benchmarks

Every row with its peer, measured in the same run, and its target where there is one. Written by

```sh
.venv/bin/sightline bench --all
```

One of them: `sightline bench NAME`; what each does and leaves out is told by `sightline bench NAME --help`. Medians and
quartiles; "times better" compares medians. On a machine that does other work, ratios say more than times: what is
compared takes turns.
"""


def write_page(reports: Sequence[Report], folder: Path) -> Path:
    """`folder`/benchmarks.md and `folder`/benchmarks/*.png. An introduction that stands in `folder`/benchmarks/about.md
    comes after the head."""
    plots = folder / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    about = plots / "about.md"
    parts = [HEAD, about.read_text() if about.exists() else "", _targets(reports)]
    for report in reports:
        parts.append(_section(report, plots))
    page = folder / "benchmarks.md"
    page.write_text("\n".join(part.rstrip() + "\n" for part in parts if part))
    return page


def _targets(reports: Sequence[Report]) -> str:
    """All rows that have one."""
    rows = [(report.name, *cells(f)) for report in reports for f in report.figures if f.target]
    chosen = [(name, row[0], row[1], row[3], row[5], row[6], row[7]) for name, *row in rows]
    return "## Targets\n\n" + _table(("benchmark", "what", "median", "peer", "times better", "target", "met"), chosen)


def _section(report: Report, plots: Path) -> str:
    lines = [f"## {report.name}: {report.about}\n", _table(HEADS, [cells(figure) for figure in report.figures])]
    lines += [f"* {note}" for note in report.notes]
    if report.notes:
        lines.append("")
    for i, plot in enumerate(report.plots):
        name = f"{report.name}-{i}.png"
        draw(plot, plots / name)
        lines.append(f"![{plot.title}](benchmarks/{name})")
    if report.plots:
        lines.append("")
    facts = {**report.settings, **report.machine, **report.versions}
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    lines.append(f"{told}. Most memory {report.peak_bytes / 2**20:.0f} MiB. [JSON](benchmarks/{report.name}.json)\n")
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(plot: Plot, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, line in plot.lines.items():
        x, y = zip(*line, strict=True)
        axes.plot(x, y, "-" if len(x) > 20 else "-o", markersize=4, linewidth=1.2, label=name)
    if plot.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_title(plot.title, fontsize=9)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
