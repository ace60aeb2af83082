"""What each network found in each decoded picture, kept on disk, so that every later figure is post-processing.

One SQLite file, a row for (network, decoded picture): the network by its model id, the picture by a key that its
coding gives. Rows are committed a chunk at a time, so a killed run goes on where it was. A network whose code changed
while its weights did not must be given a new file.
"""

import io
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cloud.tasks.types import Detections, TaskKind, TaskModel
from trainer.evaluation.matching import Found
from trainer.evaluation.series import Coding, Cost

CHUNK = 8  # pictures decoded and detected at a time


class DetectionStore:
    """Detections by (model id, picture key) in one SQLite file. One thread at a time, any number of processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS found (model TEXT, picture TEXT, content BLOB, PRIMARY KEY (model, picture)) "
            "WITHOUT ROWID"
        )

    def close(self) -> None:
        self._db.close()

    def get(self, model_id: str, key: str) -> Found | None:
        with closing(
            self._db.execute("SELECT content FROM found WHERE model=? AND picture=?", (model_id, key))
        ) as rows:
            row = rows.fetchone()
        return None if row is None else from_bytes(row[0])

    def put(self, model_id: str, found: Mapping[str, Found]) -> None:
        """Keep all of `found` (by picture key), in one transaction."""
        rows = [(model_id, key, to_bytes(value)) for key, value in found.items()]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT OR REPLACE INTO found VALUES (?, ?, ?)", rows)
        self._db.execute("COMMIT")


def to_bytes(found: Found) -> bytes:
    """`found` as an .npz archive."""
    arrays: dict[str, NDArray[np.generic]] = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    if found.masks is not None:
        counts = [mask["counts"] for mask in found.masks]
        arrays["lengths"] = np.array([len(c) for c in counts], np.int64)
        arrays["counts"] = np.frombuffer(b"".join(counts), np.uint8)
        arrays["sizes"] = np.array([mask["size"] for mask in found.masks], np.int64).reshape(-1, 2)
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def from_bytes(content: bytes) -> Found:
    """The inverse of `to_bytes`."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        masks = None
        if "lengths" in arrays:
            ends = np.cumsum(arrays["lengths"]).tolist()
            counts, sizes = arrays["counts"].tobytes(), arrays["sizes"].tolist()
            starts = [0, *ends[:-1]] if ends else []
            masks = tuple({"size": size, "counts": counts[a:b]} for size, a, b in zip(sizes, starts, ends, strict=True))
        return Found(arrays["boxes"], arrays["scores"], arrays["labels"], masks)


def as_found(detections: Detections, *, with_masks: bool) -> Found:
    """A task model's detections as the metric takes them, masks run-length coded."""
    masks = None
    if with_masks:
        masks = ()
        if detections.masks is not None and len(detections.masks):
            stack = np.asfortranarray(detections.masks.numpy().astype(np.uint8).transpose(1, 2, 0))
            masks = tuple(coco_mask.encode(stack))
    return Found(
        detections.boxes.numpy().astype(np.float32),
        detections.scores.numpy().astype(np.float32),
        detections.category_ids.numpy().astype(np.int64),
        masks,
    )


def detect(
    tasks: Sequence[TaskModel],
    store: DetectionStore,
    codings: Iterable[Coding],
    pool: Executor,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Cost], list[list[Found]]]:
    """Costs of the codings, and what each task finds in each decoded picture: [task][coding].

    Codings are taken a chunk at a time and let go, so a large set of large pictures fits; a picture is decoded only if
    a task lacks it. `pool` decodes; `advance` is told how many pictures were done.
    """
    costs: list[Cost] = []
    found: list[list[Found]] = [[] for _ in tasks]
    source = iter(codings)
    while chunk := list(islice(source, CHUNK)):
        known = [[store.get(task.model_id, coding.key) for coding in chunk] for task in tasks]
        lacking = [i for i in range(len(chunk)) if any(row[i] is None for row in known)]
        decoded = dict(zip(lacking, pool.map(Coding.decoded, [chunk[i] for i in lacking]), strict=True))
        for task, row, out in zip(tasks, known, found, strict=True):
            fresh = [i for i, value in enumerate(row) if value is None]
            images = [torch.from_numpy(np.ascontiguousarray(decoded[i].transpose(2, 0, 1))) for i in fresh]
            masks = task.kind is TaskKind.INSTANCE_SEGMENTATION
            made = {i: as_found(d, with_masks=masks) for i, d in zip(fresh, task.predict(images), strict=True)}
            if made:
                store.put(task.model_id, {chunk[i].key: value for i, value in made.items()})
            out.extend(made.get(i, value) for i, value in enumerate(row))  # type: ignore[misc]
        costs += [coding.cost for coding in chunk]
        advance(len(chunk))
    return costs, found
