"""`sightline bench NAME`: the benchmarks of the bench room, each a module with a `main` and flags of its own.

The list is read from the files, so that a benchmark is there as soon as it is written, and none is imported but the one
asked for.
"""

import ast
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import typer

USAGE = """Usage: sightline bench NAME [OPTIONS]
       sightline bench --all [--short] [--only NAME ...] [--out DIR]

--all writes docs/benchmarks.md; --short is a quick pass. One of (sightline bench NAME --help tells more):"""


def bench(context: typer.Context) -> None:
    """Run a benchmark; without a name, list them."""
    name, *arguments = context.args or ["--help"]
    known = benchmarks()
    if name in ("-h", "--help"):
        print(USAGE)
        for one, about in known.items():
            print(f"  {one.replace('_', '-'):16} {about}")
        return
    if {"--all", "--only"} & set(context.args):
        name, arguments = "suite", [each for each in context.args if each != "--all"]
    module = name.replace("-", "_")
    if module not in known:
        raise typer.BadParameter(f"no benchmark is called '{name}'; there are {', '.join(known) or 'none'}")
    sys.argv = [f"sightline bench {name}", *arguments]  # where its own parser looks
    raise typer.Exit(import_module(f"bench.{module}").main() or 0)


def benchmarks() -> dict[str, str]:
    """Modules of the bench room that define `main`, and the first line of what they say of themselves."""
    spec = find_spec("bench")
    found = {}
    for folder in spec.submodule_search_locations or [] if spec else []:
        for file in sorted(Path(folder).glob("*.py")):
            tree = ast.parse(file.read_text())
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                found[file.stem] = re.split(r": `|\.?\n", ast.get_docstring(tree) or "")[0]
    return found
