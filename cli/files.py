"""Which files a command reads and writes: inputs from files and folders, one output each, written whole or not at all.

Everything that can be refused is refused here, before any work: a missing input, a folder without a fitting file, two
inputs that would share an output.
"""

import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
BITSTREAM_SUFFIX = ".slc"


@dataclass(frozen=True, slots=True)
class Job:
    """One file to read and the file it becomes."""

    source: Path
    target: Path


def expand(inputs: Sequence[Path], suffixes: Collection[str]) -> list[Path]:
    """The files meant by `inputs`: a file means itself, whatever its suffix; a folder its own files (not those of its
    subfolders) with one of `suffixes` in either case, by name. Named twice counts once. Raises typer.BadParameter."""
    found: dict[Path, None] = {}  # a dict keeps the order
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
            if not inside:
                raise typer.BadParameter(f"folder '{path}' has no file ending in {', '.join(sorted(suffixes))}")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise typer.BadParameter(f"'{path}' does not exist")
    return list(found)


def plan(sources: Sequence[Path], folder: Path, ending: str) -> list[Job]:
    """One output a source, named like it: ``a.jpg`` -> ``folder/a`` + `ending`. Raises typer.BadParameter when
    two sources would become the same file or a source would be overwritten."""
    jobs = [Job(source, folder / (source.stem + ending)) for source in sources]
    first_with: dict[Path, Path] = {}
    for job in jobs:
        other = first_with.setdefault(job.target, job.source)
        if other is not job.source:
            raise typer.BadParameter(f"'{other}' and '{job.source}' would both become '{job.target}'")
    own = {source.resolve() for source in sources}
    for job in jobs:
        if job.target.resolve() in own:
            raise typer.BadParameter(f"'{job.target}' is one of the inputs and would be overwritten")
    return jobs


def make_folder(folder: Path) -> None:
    """Creates the output folder with its parents. Raises typer.BadParameter where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot create the folder '{folder}': {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a temporary file beside `path`, syncs it and renames it, so that `path` is never half a file, even after a
    kill or a power cut. Raises OSError; the temporary file is gone then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
