"""The wire contract: what is committed is what the .proto files say, in the style they promise."""

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
CONTRACT = sorted(PROTO.glob("sightline/v1/*.proto"))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PROTO / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_python_is_what_the_contract_generates(generator: ModuleType, tmp_path: Path) -> None:
    generator.generate(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.rglob("*_pb2*")}
    kept = {path.name: path.read_text() for path in PROTO.rglob("*_pb2*") if "__pycache__" not in path.parts}
    assert len(made) == 4 * len(CONTRACT)
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_a_broken_contract_is_refused(generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sightline" / "v1").mkdir(parents=True)
    (tmp_path / "sightline" / "v1" / "x.proto").write_text('syntax = "proto3"; message X { Missing m = 1; }')
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="refused"):
        generator.generate(tmp_path)


@pytest.mark.parametrize("path", CONTRACT, ids=lambda path: path.name)
def test_every_message_field_value_and_method_is_documented(path: Path) -> None:
    lines = path.read_text().splitlines()
    declaration = re.compile(r"^\s*(message|enum|service|rpc|oneof) \w+|^\s*[\w.<>, ]+ = \d+;$")
    undocumented = [
        line.strip()
        for before, line in itertools.pairwise(lines)
        if declaration.match(line) and not before.strip().startswith("//") and "}" not in line
    ]
    assert undocumented == []


def test_names_follow_buf_standard() -> None:
    for path in CONTRACT:
        text = path.read_text()
        assert "package sightline.v1;" in text
        for service in re.findall(r"^service (\w+)", text, re.M):
            assert service.endswith("Service")
        for name, request, response in re.findall(
            r"rpc (\w+)\((?:stream )?(\w+)\) returns \((?:stream )?(\w+)\)", text
        ):
            assert (request, response) == (f"{name}Request", f"{name}Response")
        for enum, body in re.findall(r"^enum (\w+) \{(.*?)^\}", text, re.M | re.S):
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum).upper() + "_"
            values = re.findall(r"^\s+(\w+) = (\d+);", body, re.M)
            assert values[0] == (f"{prefix}UNSPECIFIED", "0")
            assert all(value.startswith(prefix) for value, _ in values)
        for field in re.findall(r"^\s+(?:repeated |map<\w+, \w+> )?[\w.]+ (\w+) = \d+;", text, re.M):
            assert field == field.lower()
