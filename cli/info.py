"""`sightline info`: what is inside a coded file or a weights bundle."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.codecs import bundled, read_manifest


def info(
    subject: Annotated[
        str, typer.Argument(metavar="FILE.slc|BUNDLE", help="A coded file, or a bundle's name or folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is inside a coded file or a weights bundle."""
    path = Path(subject)
    told = describe_file(path) if path.is_file() else describe_bundle(subject)
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        show(told)


def describe_file(path: Path) -> dict[str, Any]:
    """A coded file's header and where its bytes go. Raises InvalidBitstream."""
    from shared.codec.bitstream import read_header
    from shared.codec.types import QUALITY_STEP

    data = path.read_bytes()
    header = read_header(data)
    pixels = max(1, header.width * header.height)
    whole = [(model_id, folder) for model_id, folder in bundled() if model_id.startswith(header.model_prefix)]
    return {
        "file": str(path),
        "format": f"slc {header.version}",
        "model": whole[0][1].name if whole else None,
        "model_id": whole[0][0] if whole else header.model_prefix,
        "width": header.width,
        "height": header.height,
        "quality": header.quality / QUALITY_STEP,
        "bytes": len(data),
        "bpp": round(8 * len(data) / pixels, 5),
        "bytes_of": {
            "latents": header.latents_bytes,
            "hyperprior": header.hyper_bytes,
            "header and checks": len(data) - header.latents_bytes - header.hyper_bytes,
        },
        "ratio_to_raw": round(3 * pixels / len(data), 2),
    }


def describe_bundle(reference: str) -> dict[str, Any]:
    """A codec's or task network's identity, sizes and manifest. Raises typer.BadParameter, InvalidBundle."""
    from shared.codec.bundle import MANIFEST, TENSORS, WEIGHTS, load_bundle

    for folder in (Path(reference), WEIGHTS / reference):
        if (folder / MANIFEST).is_file():
            break
    else:
        raise typer.BadParameter(f"'{reference}' is neither a file nor a bundle; bundled are: {', '.join(names())}")
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    if not (folder / TENSORS).is_file():  # a task network's
        return {"folder": str(folder), **read_manifest(folder), "bytes": sum(sizes.values()), "bytes_of": sizes}
    bundle = load_bundle(folder)
    parts: dict[str, int] = {}
    for name, array in bundle.arrays.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + array.nbytes
    return {
        "bundle": bundle.name,
        "folder": str(folder),
        "model_id": bundle.model_id,
        "architecture": bundle.architecture.as_dict(),
        "skip_below": bundle.skip_below,
        "bytes": sum(sizes.values()),
        "bytes_of": dict(sorted(parts.items())),
        **dict(bundle.info),
    }


def names() -> list[str]:
    """Every bundle that ships with the product, of codecs and task networks."""
    from shared.codec.bundle import MANIFEST, WEIGHTS

    return sorted(manifest.parent.name for manifest in WEIGHTS.glob(f"*/{MANIFEST}"))


def show(told: dict[str, Any]) -> None:
    """Names and values for people: nested ones indented, a list of equal rows as a table."""
    from rich.console import Console

    console = Console(highlight=False)
    for name, value in told.items():
        if is_table(value):
            console.print(f"[dim]{name.replace('_', ' ')}[/dim]")
            console.print(as_table(value))
        elif isinstance(value, dict):
            console.print(f"[dim]{name.replace('_', ' ')}[/dim]")
            for inner, one in value.items():
                console.print(f"  [dim]{inner:20}[/dim] {plain(one)}", soft_wrap=True)
        else:
            console.print(f"[dim]{name.replace('_', ' '):22}[/dim] {plain(value)}", soft_wrap=True)


def plain(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "not known here"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(
        value if isinstance(value, str) else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    )


def is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def as_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(name.replace("_", " ") for name in names), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(plain(row[name]) if name in row else "" for name in names))
    return table
