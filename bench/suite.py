"""All benchmarks of docs/benchmarks.md, each in a process of its own, and the page that shows what they found.

    sightline bench --all [--short] [--only NAME ...] [--out DIR]

What each found is kept as DIR/benchmarks/NAME.json, so that one benchmark can be measured again (--only) and the page
still shows all.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.page import write_page
from bench.report import Report, Say

NAMES = (
    "entropy", "transforms", "codec", "encoders", "rpc", "pipeline", "uplink", "footprint", "growth", "cost",
    "exactness",
)  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"
LINES = 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few rounds and small pictures: does it run?")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="where benchmarks.md goes (docs)")
    given = parser.parse_args()
    folder = given.out / "benchmarks"
    failed = measure_all(given.only, folder, short=given.short)
    found = [Report.from_json(file.read_text()) for name in NAMES if (file := folder / f"{name}.json").exists()]
    print(write_page(found, given.out))
    return 1 if failed else 0


def measure_all(names: list[str], folder: Path, *, short: bool) -> list[str]:
    """Runs them one after the other, prints each table, and gives the names of those that failed."""
    failed = []
    folder.mkdir(parents=True, exist_ok=True)
    errors = Console(stderr=True)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            out, tail = _run(name, short, lambda line, name=name: progress.update(task, description=f"{name}: {line}"))
            if out is None:
                failed.append(name)
                errors.print(f"{name} failed:", *tail, sep="\n", markup=False)
            else:
                report = Report.from_json(out)
                (folder / f"{name}.json").write_text(report.to_json() + "\n")
                report.show(console)
            progress.advance(task)
    return failed


def _run(name: str, short: bool, say: Say) -> tuple[str | None, list[str]]:
    """Its JSON, None if it failed, and the end of what it said."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *(["--short"] if short else [])]
    tail: list[str] = []
    with tempfile.TemporaryFile("w+") as out:  # a pipe that nobody reads before the end would hold a long report up
        with subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
            for line in process.stderr or ():
                tail = [*tail, line.rstrip()][-LINES:]
                say(line.rstrip()[:60])
        out.seek(0)
        return (out.read() if process.returncode == 0 else None), tail


if __name__ == "__main__":
    raise SystemExit(main())
