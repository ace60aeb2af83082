"""What a benchmark found, in one form for all: figures with spread, peer, ratio and target, and lines to plot.

A benchmark of the suite is a module with `measure(short, say) -> Report`; `run` is its command line: a Rich table, or
with --json the same as one object, with machine, versions and settings.
"""

import argparse
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.timing import Sample
from shared.memory import keep_freed_memory

PACKAGES = ("sightline", "torch", "torchvision", "numpy", "numba", "grpcio", "pillow", "compressai", "constriction")
Say = Callable[[str], None]  # told what is under way
Measure = Callable[[bool, Say], "Report"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row. `low` and `high`: quartiles, None for a single value. `ratio`: how many times better than the peer's
    value, above 1 where it is better. `target`: in words, "" for none; `met`: None without one.
    """

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines of (x, y) by name."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    log: bool = False


@dataclass(slots=True)
class Report:
    """`notes`: sentences that a reader needs beside the figures. `peak_bytes`: most memory that the process held."""

    name: str
    about: str
    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peak_bytes: int = 0

    def add(
        self,
        what: str,
        found: Sample | float,
        unit: str,
        *,
        peer: tuple[str, Sample | float] | None = None,
        more_is_better: bool = False,
        at_most: float | None = None,
        at_least: float | None = None,
        ratio_at_least: float | None = None,
    ) -> None:
        """One row, with the bounds that are its target: on the value, or on the ratio to the peer's."""
        value, other = middle(found), None if peer is None else middle(peer[1])
        ratio = None
        if other is not None and value and other:
            ratio = value / other if more_is_better else other / value
        bounds: list[tuple[str, bool]] = []
        if at_most is not None:
            bounds.append((f"<= {at_most:g} {unit}", value <= at_most))
        if at_least is not None:
            bounds.append((f">= {at_least:g} {unit}", value >= at_least))
        if ratio_at_least is not None:
            bounds.append((f">= {ratio_at_least:g} x", ratio is not None and ratio >= ratio_at_least))
        target, met = ", ".join(words for words, _ in bounds), all(holds for _, holds in bounds) if bounds else None
        spread = (found.low, found.high) if isinstance(found, Sample) else (None, None)
        name = "" if peer is None else peer[0]
        self.figures.append(Figure(what, value, unit, *spread, name, other, ratio, target, met))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        given = json.loads(text)
        given["figures"] = [Figure(**each) for each in given["figures"]]
        given["plots"] = [
            Plot(**{**each, "lines": {name: [(x, y) for x, y in line] for name, line in each["lines"].items()}})
            for each in given["plots"]
        ]
        return cls(**given)

    def show(self, console: Console) -> None:
        """The table, then notes, settings and machine."""
        table = Table(title=f"{self.name}: {self.about}")
        for column in HEADS:
            table.add_column(column, justify="left" if column in ("what", "peer", "target") else "right")
        for figure in self.figures:
            table.add_row(*cells(figure))
        console.print(table)
        for note in self.notes:
            console.print(f"* {note}", highlight=False)
        facts = {"settings": self.settings, "machine": self.machine, "versions": self.versions}
        console.print(json.dumps(facts | {"peak_MiB": round(self.peak_bytes / 2**20)}), highlight=False, soft_wrap=True)


HEADS = ("what", "median", "quartiles", "peer", "its median", "times better", "target", "met")


def cells(figure: Figure) -> tuple[str, ...]:
    """A figure as the words of a row under HEADS."""
    return (
        figure.what,
        f"{number(figure.value)} {figure.unit}",
        "" if figure.low is None or figure.high is None else f"{number(figure.low)} - {number(figure.high)}",
        figure.peer,
        "" if figure.peer_value is None else f"{number(figure.peer_value)} {figure.unit}",
        "" if figure.ratio is None else f"{number(figure.ratio)}",
        figure.target,
        "" if figure.met is None else ("yes" if figure.met else "no"),
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def middle(found: Sample | float) -> float:
    return found.median if isinstance(found, Sample) else float(found)


def run(document: str | None, name: str, measure: Measure) -> int:
    """Command line of one benchmark: its module's head as help, --short, --json."""
    document = document or ""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few rounds and small pictures: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    report = measured(measure, short=given.short)
    if given.json:
        print(report.to_json())
    else:
        report.show(Console() if sys.stdout.isatty() else Console(width=150))
    return 0


def measured(measure: Measure, *, short: bool) -> Report:
    """Measures, and adds where and with what. What is under way is said on stderr, a line each. Memory is kept from
    frame to frame as the services keep it, for peers too."""
    keep_freed_memory()
    load_before = os.getloadavg()[0]
    report = measure(short, lambda what: print(what, file=sys.stderr, flush=True))
    report.settings = {"short": short} | report.settings
    report.machine = machine() | {"load_before": round(load_before, 2), "load_after": round(os.getloadavg()[0], 2)}
    report.versions = versions()
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report.peak_bytes = usage * 1024
    return report


def machine() -> dict[str, Any]:
    import torch

    facts: Mapping[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    return dict(facts)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes(pid: int, what: str = "VmRSS") -> int:
    """Memory that a process holds now, or with "VmHWM" the most that it held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(what + ":")).split()[1])
