"""Events into a file for other tools: COCO JSON, CSV or Parquet, by the file's ending.

A file is there whole or not at all: it grows beside its name and is renamed when `close` is called. Memory stays
bounded however many events come: rows are written as they come, COCO's three lists through temporary files that are
joined at the end.
"""

import csv
import json
import secrets
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import typer

from cli.watch.rows import COLUMNS, as_rows

if TYPE_CHECKING:
    from shared.clients import Detection, DetectionEvent

ROW_GROUP = 16_384


class Writer(Protocol):
    """One format: takes events, ends its file."""

    def add(self, event: "DetectionEvent") -> None: ...

    def end(self) -> None: ...

    def abandon(self) -> None:
        """Ends without a whole file."""


class Export:
    """A context: on a clean end the file takes its name, otherwise nothing is left. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._writer: Writer = WRITERS[path.suffix.lower()](self._part)

    def add(self, event: "DetectionEvent") -> None:
        self._writer.add(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._writer.end()
                self._part.replace(self._path)
            else:
                self._writer.abandon()
        finally:
            self._part.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """Raises typer.BadParameter for an ending that is no format and for a file that is there already."""
    if path.suffix.lower() not in WRITERS:
        raise typer.BadParameter(f"expected a file ending in {', '.join(sorted(WRITERS))}, got '{path}'")
    if path.exists():
        raise typer.BadParameter(f"'{path}' exists; give a new name, it would be overwritten")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"folder '{path.parent}' does not exist")


class CsvWriter:
    """One row a detection, RFC 4180, UTF-8, a header first."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, list(COLUMNS))
        self._rows.writeheader()

    def add(self, event: "DetectionEvent") -> None:
        for row in as_rows(event):
            self._rows.writerow({name: _csv_cell(value) for name, value in row.items()})

    def end(self) -> None:
        self._file.close()

    abandon = end


def _csv_cell(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


class ParquetWriter:
    """One row a detection; times as timestamps in UTC, microseconds."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
        moment = pyarrow.timestamp("us", tz="UTC")
        self._arrow = pyarrow
        self._schema = pyarrow.schema([(name, kinds.get(kind, moment)) for name, kind in COLUMNS.items()])
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, event: "DetectionEvent") -> None:
        self._rows += as_rows(event)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def end(self) -> None:
        self._flush()
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


class CocoWriter:
    """COCO's annotation file: an image is an event that has detections or could have had them (its id is the log's
    sequence, its file name the frame's), an annotation a detection with its score. Boxes are [x, y, width, height],
    segmentations compressed RLE. Other outcomes than DETECTIONS have no picture and are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts = {name: path.with_name(f"{path.name}.{name}") for name in ("images", "annotations")}
        self._files = {name: part.open("w", encoding="utf-8") for name, part in self._parts.items()}
        self._counts = dict.fromkeys(self._parts, 0)
        self._categories: dict[int, str] = {}

    def add(self, event: "DetectionEvent") -> None:
        from shared.clients import Outcome

        if event.outcome is not Outcome.DETECTIONS:
            return
        captured = event.capture_time.isoformat() if event.capture_time else ""
        self._put(
            "images",
            {
                "id": event.cursor.sequence,
                "file_name": str(event.frame),
                "width": event.width,
                "height": event.height,
                "date_captured": captured,
            },
        )
        for result in event.results:
            for found in result.detections:
                self._categories[found.category_id] = found.label
                self._put("annotations", self._annotation(event.cursor.sequence, result.task, found))

    def _annotation(self, image_id: int, task: str, found: "Detection") -> dict[str, Any]:
        box, mask = found.box, found.mask
        width, height = box.x_max - box.x_min, box.y_max - box.y_min
        told: dict[str, Any] = {
            "id": self._counts["annotations"] + 1,
            "image_id": image_id,
            "category_id": found.category_id,
            "bbox": [round(side, 3) for side in (box.x_min, box.y_min, width, height)],
            "area": round(width * height, 3) if mask is None else int(mask.to_array().sum()),
            "iscrowd": 0,
            "score": round(found.score, 5),
            "task": task,
        }
        if mask is not None:
            told["segmentation"] = {"size": [mask.height, mask.width], "counts": mask.counts.decode("ascii")}
        return told

    def _put(self, name: str, item: dict[str, Any]) -> None:
        file = self._files[name]
        file.write(",\n" if self._counts[name] else "\n")
        file.write(json.dumps(item))
        self._counts[name] += 1

    def end(self) -> None:
        categories = [{"id": number, "name": name} for number, name in sorted(self._categories.items())]
        for file in self._files.values():
            file.close()
        with self._path.open("w", encoding="utf-8") as whole:
            whole.write("{\n")
            for name, part in self._parts.items():
                whole.write(f'"{name}": [')
                with part.open(encoding="utf-8") as lines:
                    for line in lines:
                        whole.write(line)
                whole.write("\n],\n")
            whole.write(f'"categories": {json.dumps(categories)}\n}}\n')
        self.abandon()

    def abandon(self) -> None:
        for file in self._files.values():
            file.close()
        for part in self._parts.values():
            part.unlink(missing_ok=True)


WRITERS: dict[str, Any] = {".json": CocoWriter, ".csv": CsvWriter, ".parquet": ParquetWriter}
