"""Coded anchor pictures on disk: each is encoded once, ever, and decoded for whichever detector comes later.

Layout: `<root>/<anchor>-<12 hex of SHA-256(identity)>/<32 hex of SHA-256(pixels)>/<quantiser>@<scale>.bin`, beside
`identity.txt`, which names the settings and the ffmpeg build. A file is one line of JSON (bits, seconds, SHA-256 of the
data), then the encoder's bytes as they came. Files appear by rename, so a killed run leaves no half-written entry; an
entry that fails its hash is encoded again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trainer.evaluation.anchors import CodedPicture, Rgb
from trainer.evaluation.pictures import read_rgb

P = TypeVar("P", contravariant=True)  # of points, whose str() names a file


def pixels_sha256(rgb: Rgb) -> str:
    """Hex SHA-256 over shape and pixels, the name of a picture."""
    digest = hashlib.sha256(f"{rgb.shape[0]}x{rgb.shape[1]}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write by rename within the folder, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Coder(Protocol[P]):
    """What codes pictures to be stored: an anchor, or Sightline with effort. `identity`: whatever decides its bytes."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def encode(self, rgb: Rgb, point: P) -> CodedPicture: ...


@dataclass(frozen=True, slots=True)
class CodedStore:
    root: Path

    def path(self, anchor: Coder[P], sha256: str, point: P) -> Path:
        tag = hashlib.sha256(anchor.identity.encode()).hexdigest()[:12]
        return self.root / f"{anchor.name}-{tag}" / sha256[:32] / f"{point}.bin"

    def get(self, anchor: Coder[P], sha256: str, point: P) -> CodedPicture | None:
        """The stored coding of the picture named `sha256`, or None if there is none that is whole."""
        try:
            header, _, data = self.path(anchor, sha256, point).read_bytes().partition(b"\n")
            fields = json.loads(header)
            if hashlib.sha256(data).hexdigest() == fields["sha256"]:
                return CodedPicture(data, int(fields["picture_bits"]), float(fields["encode_s"]))
        except (FileNotFoundError, ValueError, KeyError):
            pass
        return None

    def encode(self, anchor: Coder[P], rgb: Rgb, sha256: str, point: P) -> CodedPicture:
        """The stored coding, made and stored first if need be."""
        coded = self.get(anchor, sha256, point)
        if coded is None:
            coded = anchor.encode(rgb, point)
            path = self.path(anchor, sha256, point)
            if not (path.parent.parent / "identity.txt").exists():
                write_atomically(path.parent.parent / "identity.txt", f"{anchor.identity}\n".encode())
            header = {
                "picture_bits": coded.picture_bits,
                "encode_s": round(coded.encode_s, 4),
                "sha256": hashlib.sha256(coded.data).hexdigest(),
            }
            write_atomically(path, json.dumps(header).encode() + b"\n" + coded.data)
        return coded


@dataclass(frozen=True, slots=True)
class Job:
    """One coding to be made: which picture (its pixels are read when its turn comes), by what, how."""

    anchor: Coder[Any]
    picture: Path
    point: Any


def encode_jobs(store: CodedStore, jobs: Iterable[Job], *, workers: int) -> Iterator[tuple[Job, CodedPicture]]:
    """Make every job's coding, `workers` at a time; yields each as it is done. Jobs already stored are quick."""

    def work(job: Job) -> tuple[Job, CodedPicture]:
        rgb = read_rgb(job.picture)
        return job, store.encode(job.anchor, rgb, pixels_sha256(rgb), job.point)

    queue = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[tuple[Job, CodedPicture]]] = {pool.submit(work, job) for job in islice(queue, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, job) for job in islice(queue, len(done))}
            for future in done:
                yield future.result()
