"""docs/api.md is what the contract's comments say now, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def document() -> ModuleType:
    spec = importlib.util.spec_from_file_location("document", ROOT / "proto" / "document.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_contract_says(document: ModuleType) -> None:
    assert (ROOT / "docs" / "api.md").read_text() == document.page(), "run: python proto/document.py"


def test_every_call_field_and_value_is_on_it_and_every_link_leads_to_a_heading(document: ModuleType) -> None:
    text = document.page()
    for file in document.descriptors():
        for service in file.service:
            for method in service.method:
                assert f"#### {service.name}.{method.name}\n" in text
        names = [field.name for message in file.message_type for field in message.field]
        names += [value.name for enum in file.enum_type for value in enum.value]
        assert [name for name in names if f"| `{name}` |" not in text] == []
    headings = {heading.lower().replace(".", "") for heading in re.findall(r"^#+ (\S+)$", text, re.M)}
    assert {link for link in re.findall(r"\]\(#([^)]+)\)", text)} <= headings
    assert not re.search(r"\| *\|$", text, re.M), "a field without a comment"
