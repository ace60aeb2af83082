"""Writes docs/api.md from the comments of the wire contract: `python proto/document.py [OUT]`.

The comments are the reference; the page only puts them in an order for reading: services and their calls, then
messages and enumerations, file by file. `tests/shared/test_api_page.py` writes it again and compares.
"""

import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "api.md"
# Field numbers in descriptor.proto, of which a comment's path is made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_SYNTAX = 12
_FIELD, _NESTED, _NESTED_ENUM, _ONEOF = 2, 3, 4, 8
_VALUE = _METHOD = 2

HEAD = """# Wire API

gRPC, package `sightline.v1`. Made from the comments in [`proto/sightline/v1`](../proto/sightline/v1) by
`python proto/document.py`; do not edit. Errors are gRPC statuses; the trailing metadata key `sightline-error` names
the kind in [`shared/errors.py`](../shared/errors.py).
"""

Path_ = tuple[int, ...]


class _Comments:
    """The comments of one file, by the path of what they stand before."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._by_path = {tuple(each.path): each for each in file.source_code_info.location}

    def before(self, path: Path_) -> str:
        """As lines without the leading blank."""
        location = self._by_path.get(path)
        if location is None:
            return ""
        lines = location.leading_comments.rstrip().split("\n")
        return "\n".join(line.removeprefix(" ") for line in lines)


def descriptors() -> list[FileDescriptorProto]:
    """The contract's files with their comments. Raises RuntimeError if the compiler refuses them."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("sightline/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        arguments = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--descriptor_set_out={out}",
            "--include_source_info",
            *sources,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("the protobuf compiler refused the contract")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    contract = descriptors()
    parts.append("\n".join(f"* [{_title(file)}](#{_title(file)})" for file in contract) + "\n")
    for file in contract:
        parts.extend(_file(file))
    return "\n".join(parts)


def _title(file: FileDescriptorProto) -> str:
    return Path(file.name).stem


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = _Comments(file)
    yield f"## {_title(file)}\n"
    yield f"{_prose(comments.before((_SYNTAX,)))}\n"
    for i, service in enumerate(file.service):
        yield from _service(service, comments, (_SERVICE, i))
    for i, message in enumerate(file.message_type):
        yield from _message(message, comments, (_MESSAGE, i), message.name)
    for i, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (_ENUM, i), enum.name)


def _service(service: ServiceDescriptorProto, comments: _Comments, path: Path_) -> Iterator[str]:
    yield f"### {service.name}\n"
    yield f"{_prose(comments.before(path))}\n"
    for i, method in enumerate(service.method):
        request = ("stream " if method.client_streaming else "") + _linked(method.input_type)
        response = ("stream " if method.server_streaming else "") + _linked(method.output_type)
        yield f"#### {service.name}.{method.name}\n"
        yield f"{request} → {response}\n"
        yield f"{_prose(comments.before((*path, _METHOD, i)))}\n"


def _message(message: DescriptorProto, comments: _Comments, path: Path_, name: str) -> Iterator[str]:
    if message.options.map_entry:
        return
    yield f"### {name}\n"
    yield f"{_prose(comments.before(path))}\n"
    if message.field:
        yield "| field | type | what it says |\n|---|---|---|"
        for i, field in enumerate(message.field):
            said = comments.before((*path, _FIELD, i))
            if field.HasField("oneof_index") and not field.proto3_optional:
                group = message.oneof_decl[field.oneof_index].name
                said = f"*one of `{group}`:* {said}"
            yield f"| `{field.name}` | {_type(field, message)} | {_cell(said)} |"
        yield ""
    for i, nested in enumerate(message.nested_type):
        yield from _message(nested, comments, (*path, _NESTED, i), f"{name}.{nested.name}")
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, comments, (*path, _NESTED_ENUM, i), f"{name}.{enum.name}")


def _enum(enum: EnumDescriptorProto, comments: _Comments, path: Path_, name: str) -> Iterator[str]:
    yield f"### {name}\n"
    yield f"{_prose(comments.before(path))}\n"
    yield "| value | number | what it says |\n|---|---|---|"
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments.before((*path, _VALUE, i)))} |"
    yield ""


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    if field.type_name:
        entry = next((each for each in message.nested_type if field.type_name.endswith(f".{each.name}")), None)
        if entry is not None and entry.options.map_entry:
            key, value = entry.field
            return f"map of {_type(key, entry)} to {_type(value, entry)}"
        return ("repeated " if repeated else "") + _linked(field.type_name)
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return ("repeated " if repeated else "") + kind


def _linked(full_name: str) -> str:
    name = full_name.lstrip(".")
    if not name.startswith("sightline.v1."):
        return f"`{name}`"
    short = name.removeprefix("sightline.v1.")
    return f"[{short}](#{short.lower().replace('.', '')})"


def _prose(comment: str) -> str:
    """Paragraphs as they are; what is indented (tables of errors, sequences) as it stands."""
    lines: list[str] = []
    code = False
    for line in comment.split("\n"):
        indented = line.startswith("  ")
        if indented != code and (indented or line):
            lines += ["", "```"] if indented else ["```", ""]
            code = indented
        lines.append(line)
    if code:
        lines.append("```")
    return "\n".join(lines).strip("\n")


def _cell(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|")


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page())
