"""The rooms keep to themselves: who may import whom, and what importing the edge may pull in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sightline", "shared", "edge", "cloud", "trainer", "bench", "cli")
MAY_IMPORT = {
    "shared": {"shared", "sightline"},
    "edge": {"edge", "shared", "sightline"},
    "cloud": {"cloud", "shared", "sightline"},
    "trainer": {"trainer", "shared", "cloud.tasks"},
    "bench": set(ROOMS),
    "cli": set(ROOMS),
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, dotted, of our rooms only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no Python files in {room}/: the rule would hold for nothing"
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if not any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_IMPORT[room])
    ]
    assert not broken, "\n".join(broken)


def test_nothing_in_the_rooms_imports_relatively() -> None:
    relative = [
        str(path.relative_to(ROOT))
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_the_front_door_opens_rooms_only_when_asked() -> None:
    heavy = modules_after("import cli.main")
    assert not heavy & {"torch", "numba", "grpc", "edge", "cloud", "trainer"}


def test_the_edge_pulls_in_neither_training_nor_detection_models() -> None:
    loaded = modules_after("import edge.server, edge.service, edge.engine")
    unwanted = {
        "compressai",
        "lightning",
        "matplotlib",
        "pycocotools",
        "cloud",
        "trainer",
        "torchvision.models.detection",
    }
    assert not loaded & unwanted


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    names = set(done.stdout.split())
    assert statement.split()[1].split(",")[0] in names
    return names
