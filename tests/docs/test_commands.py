"""Every `sightline` command that a document shows exists, with each of its flags."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Sightline, sightline

__all__ = ["sightline"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"train", "evaluate"}  # import Lightning for their help; tests/cli/test_training.py holds their flags


def commands(document: Path) -> list[list[str]]:
    """The words of each `sightline` command in the document's shell blocks, without what comments say."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[1:] for each in words if each and each[0].endswith("bin/sightline")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_shows_only_commands_that_exist(document: Path, sightline: Sightline) -> None:
    for words in commands(document):
        if words[0] in ELSEWHERE:
            continue
        told = sightline(words[0], "--help")
        assert told.code == 0, words
        for flag in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
            assert re.search(rf"{flag}\b", told.out), f"{document.name}: {words[0]} has no {flag}"


def test_the_quickstart_is_among_them() -> None:
    assert len(commands(ROOT / "docs" / "quickstart.md")) >= 10
