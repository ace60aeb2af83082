"""`sightline evaluate`: rate and task accuracy of Sightline and the anchors on one set, in one run.

    set, networks, codecs --> every series codes every picture at every setting --> decoded pictures --> detections
        --> accuracy and its draws --> BD-rates, checks --> tables, plots, report

Anchors are encoded once ever (`coded_store`), detections once a network and decoded picture (`detections`); both live
under `cache_dir`, so a killed run goes on and a second one is post-processing.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cloud.tasks.loading import load_task
from cloud.tasks.types import TaskKind, TaskModel
from shared.codec.codec import Codec
from shared.errors import InvalidSettings
from trainer.effort import labourer
from trainer.evaluation.accuracy import Judge, Measurement, Metric
from trainer.evaluation.anchors import anchor_by_name
from trainer.evaluation.cityscapes import LabelSpace, load_cityscapes
from trainer.evaluation.coded_store import CodedStore, Job, encode_jobs
from trainer.evaluation.comparison import Comparison, Point, TopCheck, check_top, compare
from trainer.evaluation.detections import DetectionStore, detect
from trainer.evaluation.evaluation_set import EvaluationSet, load_set
from trainer.evaluation.examples import JPEG_QUALITIES, VVC_QPS, examples_of, save_panel
from trainer.evaluation.series import (
    AnchorSeries,
    Cost,
    EffortSeries,
    OriginalSeries,
    Quality,
    Series,
    SightlineSeries,
    UnquantisedSeries,
)

QUALITIES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
ANCHORS = ("jpeg", "hevc", "av1", "vvc")


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """What to evaluate and on what.

    `out_dir`: the folder for tables, plots and report. `cache_dir`: the folder that keeps encoded anchors and
    detections from run to run. `codecs`: names of bundled codecs or folders of bundles. `tasks`: networks that the
    codecs were trained through, by name, bundle folder or ONNX path. `witnesses`: networks that took no part in
    training or choice, likewise. `images_dir`: the folder of a COCO-format set's pictures. `annotations`: its
    annotations. `cityscapes`: the root of Cityscapes instead, in its own layout. `cityscapes_split`: train, val or
    test. `cityscapes_labels`: coco for networks with COCO's label space, cityscapes for the eight thing classes
    numbered from 1. `image_ids`: only these pictures of a COCO-format set. `image_list`: only the pictures in this JSON
    file, a list of ids or an object with "image_ids". `anchors`: jpeg, hevc[:PRESET], av1[:CPU_USED], vvc[:PRESET].
    `qualities`: the codecs' points, 1 to 8. `reduced`: more of their points, as QUALITY@PERCENT of the pictures' sides,
    for the anchors' grids have such points too. `effort`: of these numbers of gradient steps a picture, each codec once
    more, its files kept in the cache. `workers`: encoders and decoders at a time. `draws`: resampled sets of pictures
    for the intervals. `encode_missing`: whether anchors' points that the cache lacks are encoded; otherwise only points
    that it has for every picture are used. `device`: where networks and codecs run, cpu or cuda. `examples`:
    photographs that may be passed on, to be shown as each codec leaves them at equal bits. `example_quality`: of the
    codec in them.
    """

    out_dir: Path
    cache_dir: Path
    codecs: tuple[str, ...]
    tasks: tuple[str, ...]
    witnesses: tuple[str, ...] = ()
    images_dir: Path | None = None
    annotations: Path | None = None
    cityscapes: Path | None = None
    cityscapes_split: str = "val"
    cityscapes_labels: LabelSpace = "coco"
    image_ids: tuple[int, ...] | None = None
    image_list: Path | None = None
    anchors: tuple[str, ...] = ANCHORS
    qualities: tuple[float, ...] = QUALITIES
    reduced: tuple[str, ...] = ()
    effort: tuple[int, ...] = ()
    workers: int = 2
    draws: int = 500
    encode_missing: bool = True
    device: str = "cpu"
    examples: tuple[Path, ...] = ()
    example_quality: float = 2.0

    def __post_init__(self) -> None:
        if (self.cityscapes is None) == (self.images_dir is None or self.annotations is None):
            raise InvalidSettings("evaluate: give either images_dir and annotations, or cityscapes")
        if not self.tasks and not self.witnesses:
            raise InvalidSettings("evaluate: tasks: at least one network is needed")
        if self.image_ids is not None and self.image_list is not None:
            raise InvalidSettings("evaluate: give image_ids or image_list, not both")
        if not self.qualities:
            raise InvalidSettings("evaluate: qualities: at least one is needed")
        for name in self.reduced:
            _reduced_point(name)
        if any(steps < 1 for steps in self.effort):
            raise InvalidSettings(f"evaluate: effort: at least 1 step, got {self.effort}")
        if self.workers < 1 or self.draws < 1:
            raise InvalidSettings(f"evaluate: workers and draws must be positive, got {self.workers}, {self.draws}")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Everything measured with one network. `role`: trained through, or witness (took no part)."""

    task: str
    role: Literal["trained through", "witness"]
    original: Point
    points: tuple[Point, ...]
    controls: tuple[Point, ...]
    comparisons: tuple[Comparison, ...]
    checks: tuple[TopCheck, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run found. `series`, `anchors`: names in the order they were asked for."""

    settings: EvaluateSettings
    pictures: EvaluationSet
    series: tuple[str, ...]
    anchors: tuple[str, ...]
    model_ids: dict[str, str]
    results: tuple[TaskResult, ...]
    task_ids: dict[str, str] = field(default_factory=dict)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Run the evaluation and return its figures; `report.write` puts them on disk.

    Raises InvalidInput for a set that cannot be read, UnknownModel and InvalidBundle for networks and codecs,
    Unavailable for an encoder that ffmpeg lacks, all before the first picture is coded.
    """
    pictures = _load_set(settings)
    names = (*settings.tasks, *settings.witnesses)
    tasks = [load_task(name, device=settings.device, threads=settings.workers) for name in names]
    for task in tasks:
        if task.kind not in (TaskKind.DETECTION, TaskKind.INSTANCE_SEGMENTATION):
            raise InvalidSettings(f"evaluate: tasks: {task.name} does {task.kind}, needed detection or instances")
    codecs = {short_name(name): _load_codec(name, settings.device) for name in settings.codecs}
    store = CodedStore(settings.cache_dir / "anchors")
    anchors = [AnchorSeries(a, store, tuple(a.points)) for a in map(anchor_by_name, settings.anchors)]
    grid = (*map(_reduced_point, settings.reduced), *map(Quality, settings.qualities))
    laboured = [
        EffortSeries(f"sightline-{n}-effort{k}", codec, grid, k, labourer(codec, k), store)
        for n, codec in codecs.items()
        for k in settings.effort
    ]
    with _progress() as progress:
        if settings.encode_missing:
            for anchor in anchors:  # the coarse points of every picture first
                jobs = [Job(anchor.anchor, p.path, point) for point in anchor.points for p in pictures.pictures]
                _encode(store, anchor.name, jobs, settings.workers, progress)
        else:
            anchors = [series.stored(pictures.pictures) for series in anchors]
        sightline = [SightlineSeries(f"sightline-{n}", codec, grid) for n, codec in codecs.items()]
        for effort in laboured:  # one picture at a time: they share a frozen network
            jobs = [Job(effort, p.path, point) for point in effort.points for p in pictures.pictures]
            _encode(store, effort.name, jobs, 1, progress)
        controls = [UnquantisedSeries(f"sightline-{n}-unquantised", codec) for n, codec in codecs.items()]
        every: list[Series] = [OriginalSeries(), *sightline, *laboured, *controls, *anchors]
        points = _measure(every, tasks, pictures, settings, progress)
    if settings.examples:
        _show_examples(settings, codecs, tasks[0])
    series, rivals = tuple(s.name for s in (*sightline, *laboured)), tuple(a.name for a in anchors)
    results = []
    for index, (name, task_points) in enumerate(zip(names, points, strict=True)):
        task, original = short_name(name), next(p for p in task_points if p.series == "original")
        curve = [p for p in task_points if p.series in (*series, *rivals)]
        results.append(
            TaskResult(
                task=task,
                role="trained through" if index < len(settings.tasks) else "witness",
                original=original,
                points=tuple(curve),
                controls=tuple(p for p in task_points if p.series.endswith("-unquantised")),
                comparisons=tuple(compare(task, curve, original, series, rivals)),
                checks=tuple(check_top(task, curve, original, series)),
            )
        )
    model_ids = {name: codec.model_id for name, codec in codecs.items()}
    task_ids = {short_name(name): task.model_id for name, task in zip(names, tasks, strict=True)}
    return Evaluation(settings, pictures, series, rivals, model_ids, tuple(results), task_ids)


def _reduced_point(name: str) -> Quality:
    """`name`: QUALITY@PERCENT. Raises InvalidSettings."""
    quality, _, percent = name.partition("@")
    try:
        point = Quality(float(quality), int(percent))
    except ValueError:
        point = None
    if point is None or not (1 <= point.quality <= 8 and 1 <= point.scale < 100):
        raise InvalidSettings(f"evaluate: reduced: expected QUALITY@PERCENT, 1 to 8 and below 100, got {name!r}")
    return point


def short_name(name: str) -> str:
    """What a codec or network is called in tables: its name, or the last part of its path."""
    return Path(name).stem if Path(name).suffix == ".onnx" else Path(name).name


def _load_set(settings: EvaluateSettings) -> EvaluationSet:
    if settings.cityscapes is not None:
        return load_cityscapes(settings.cityscapes, settings.cityscapes_split, labels=settings.cityscapes_labels)
    if settings.images_dir is None or settings.annotations is None:
        raise InvalidSettings("evaluate: give images_dir and annotations")
    ids = settings.image_ids if settings.image_list is None else _read_ids(settings.image_list)
    return load_set(settings.images_dir, settings.annotations, ids)


def _read_ids(path: Path) -> tuple[int, ...]:
    try:
        document = json.loads(path.read_bytes())
        return tuple(int(i) for i in (document["image_ids"] if isinstance(document, dict) else document))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSettings(f"evaluate: image_list: {path} is not a JSON list of image ids: {error!r}") from error


def _show_examples(settings: EvaluateSettings, codecs: dict[str, Codec], task: TaskModel) -> None:
    """One panel a codec: each photograph by JPEG and the run's VVC at no more bits than Sightline's."""
    rivals = [(anchor_by_name(n), JPEG_QUALITIES if n == "jpeg" else VVC_QPS)
              for n in settings.anchors if n.startswith(("jpeg", "vvc"))]  # fmt: skip
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    for name, codec in codecs.items():
        rows = [examples_of(picture, codec, settings.example_quality, rivals) for picture in settings.examples]
        save_panel(rows, task, settings.out_dir / f"examples-{name}.jpg")


def _load_codec(name: str, device: str) -> Codec:
    return Codec.load(Path(name) if (Path(name) / "manifest.json").is_file() else name, device=device)


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def _encode(store: CodedStore, name: str, jobs: Sequence[Job], workers: int, progress: Progress) -> None:
    """Make what the store lacks of a series."""
    bar = progress.add_task(f"encode {name}", total=len(jobs))
    for _ in encode_jobs(store, jobs, workers=workers):
        progress.advance(bar)


def _measure(
    every: Sequence[Series],
    tasks: Sequence[TaskModel],
    pictures: EvaluationSet,
    settings: EvaluateSettings,
    progress: Progress,
) -> list[list[Point]]:
    """Points by network, in the order of series and settings. The first series is the original."""
    points: list[list[Point]] = [[] for _ in tasks]
    judges: list[Judge] = []
    store = DetectionStore(settings.cache_dir / "detections.sqlite")
    try:
        with ThreadPoolExecutor(settings.workers) as pool:
            for series in every:
                bar = progress.add_task(f"detect {series.name}", total=len(series.settings) * len(pictures.pictures))
                for index, setting in enumerate(series.settings):
                    codings = (series.code(picture, index) for picture in pictures.pictures)
                    costs, found = detect(tasks, store, codings, pool, lambda n, bar=bar: progress.advance(bar, n))
                    judges = judges or [
                        Judge(task, pictures, own, settings.draws) for task, own in zip(tasks, found, strict=True)
                    ]
                    for judge, own, out in zip(judges, found, points, strict=True):
                        measured = judge.measure(costs, own)
                        out.append(_point(series.name, setting, costs, pictures.pixels, measured))
    finally:
        store.close()
    return points


def _point(series: str, setting: str, costs: Sequence[Cost], pixels: int, measured: dict[Metric, Measurement]) -> Point:
    return Point(
        series,
        setting,
        file_bpp=sum(cost.file_bits for cost in costs) / pixels,
        encode_s=float(np.median([cost.encode_s for cost in costs])),
        decode_s=float(np.median([cost.decode_s for cost in costs])),
        measured=measured,
    )
