"""`sightline detect`: what a frozen task model finds in pictures, before the codec (images) or after it (.slc)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.codecs import Decoders
from cli.files import BITSTREAM_SUFFIX, PICTURE_SUFFIXES, Job, expand, make_folder, plan, write_atomically
from cli.pictures import encode_png, read_frame
from cli.progress import for_each
from shared.errors import UnknownModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloud.tasks.types import Detections, TaskModel

DEFAULT_TASK = "faster-rcnn-mobilenetv2"
DEFAULT_SCORE = 0.5


def detect(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT", help="Pictures, coded files (.slc), or folders of them."),
    ],
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Task model: a bundled name, one of torchvision's builders, an .onnx file or a bundle's folder.",
        ),
    ] = DEFAULT_TASK,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Leave out what scores less.")] = DEFAULT_SCORE,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Draw what was found: a.jpg becomes DIR/a.detections.png."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR", help="A codec bundle's folder, beside the bundled ones.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON array in COCO's result format, with file names.")
    ] = False,
) -> None:
    """Find objects in pictures and coded files."""
    sources = expand(inputs, PICTURE_SUFFIXES | {BITSTREAM_SUFFIX})
    jobs = plan(sources, output or Path(), ".detections.png") if output else [Job(source, source) for source in sources]
    image_ids = dict(zip(sources, number(sources), strict=True))

    import torch

    task_model = load(task)
    decoders = Decoders(model)
    if output:
        make_folder(output)
    results = JsonArray() if as_json else None

    def work(job: Job) -> None:
        data = job.source.read_bytes()
        if job.source.suffix.lower() == BITSTREAM_SUFFIX:
            codec, bitstream = decoders.read(data)
            rgb = codec.decode(bitstream).rgb
        else:
            rgb = read_frame(data).rgb
        found = task_model.predict([torch.from_numpy(rgb).permute(2, 0, 1)], score)[0]
        if output:
            write_atomically(job.target, encode_png(drawn(rgb, found)))
        if results is not None:
            for row in coco_results(found, image_ids[job.source], str(job.source)):
                results.add(row)
        else:
            print(f"{job.source}  {', '.join(named(found)) or 'nothing'}", flush=True)

    try:
        for_each(jobs, work, "detect")
    finally:
        if results is not None:
            results.end()


def load(name: str) -> "TaskModel":
    """The task model. Raises typer.BadParameter for an unknown name, InvalidBundle, Unavailable."""
    from cloud.tasks.loading import load_task

    try:
        return load_task(name)
    except UnknownModel as error:
        raise typer.BadParameter(str(error), param_hint="'--task'") from None


def number(sources: Sequence[Path]) -> list[int]:
    """COCO's image ids: the number that a file is named with, as in COCO, if all are and no two alike; otherwise the
    place among the inputs, from 1."""
    stems = [source.stem for source in sources]
    if all(stem.isascii() and stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(sources) + 1))


def coco_results(found: "Detections", image_id: int, file_name: str) -> Iterator[dict[str, Any]]:
    """COCO's result format (https://cocodataset.org/#format-results), with the names of file and category beside it."""
    for i, box in enumerate(found.boxes.tolist()):
        row: dict[str, Any] = {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": int(found.category_ids[i]),
            "category": found.labels[i],
            "bbox": [round(value, 2) for value in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "score": round(float(found.scores[i]), 5),
        }
        if found.masks is not None:
            row["segmentation"] = segmentation(found.masks[i].numpy())
        if found.keypoints is not None:
            row["keypoints"] = [round(value, 2) for point in found.keypoints[i].tolist() for value in point]
        yield row


def segmentation(mask: "NDArray[np.bool_]") -> dict[str, Any]:
    """A mask as COCO's compressed run-length encoding."""
    from cloud.masks import encode_mask

    return {"size": [int(side) for side in mask.shape], "counts": encode_mask(mask).decode("ascii")}


def named(found: "Detections") -> list[str]:
    return [f"{label} {100 * score:.0f} %" for label, score in zip(found.labels, found.scores.tolist(), strict=True)]


def drawn(rgb: "NDArray[np.uint8]", found: "Detections") -> "NDArray[np.uint8]":
    from cli.drawing import draw

    masks = None if found.masks is None else found.masks.numpy()
    return draw(rgb, found.boxes.tolist(), found.category_ids.tolist(), named(found), masks)


class JsonArray:
    """A JSON array on stdout, one element a line, written as it grows, whole at the end whatever failed."""

    def __init__(self) -> None:
        self._any = False

    def add(self, row: dict[str, Any]) -> None:
        print("," if self._any else "[", json.dumps(row), sep="\n", flush=True)
        self._any = True

    def end(self) -> None:
        print("]" if self._any else "[]", flush=True)
