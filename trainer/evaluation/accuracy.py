"""Task accuracy at each point of each series, with its bootstrap draws.

Two kinds of truth: the set's annotations, and "agreement": what the network itself found on the original pictures
with at least `AGREEMENT_SCORE`, for cameras that come without annotations. Boxes for every network, masks for those
that make them, on the pictures whose objects all have one. Draws resample pictures, the same ones for every series and
network of a run, so that differences are paired; rate is resampled with accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud.tasks.types import TaskKind, TaskModel
from trainer.evaluation.bdrate import bootstrap_weights
from trainer.evaluation.evaluation_set import EvaluationSet
from trainer.evaluation.matching import Found, Kind, Objects, Scores, match, score
from trainer.evaluation.series import Cost

AGREEMENT_SCORE = 0.5


@dataclass(frozen=True, slots=True)
class Metric:
    """What accuracy is measured as. `kind`: box or mask; `agreement`: against the original's detections."""

    kind: Kind
    agreement: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {'agreement' if self.agreement else 'mAP'}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One network's accuracy at one point. `bpp`, `scores`: the measured value (arrays of 1); `bpp_draws`, `draws`: as
    resampled (arrays of B), over the same pictures."""

    bpp: float
    scores: Scores
    bpp_draws: NDArray[np.float64]
    draws: Scores


class Judge:
    """Scores one network's detections on a set by every metric that applies to it."""

    def __init__(self, task: TaskModel, pictures: EvaluationSet, originals: Sequence[Found], draws: int) -> None:
        """`originals`: what `task` found on the original pictures. `draws`: number of bootstrap draws."""
        self.task = task
        self._categories = list(pictures.categories)
        self._pixels = np.array([p.width * p.height for p in pictures.pictures], np.float64)
        self._all = np.arange(len(pictures.pictures))
        annotated = [p.objects for p in pictures.pictures]
        self._truth: dict[Metric, tuple[NDArray[np.int64], list[Objects]]] = {Metric("box"): (self._all, annotated)}
        trusted = [as_truth(found) for found in originals]
        self._truth[Metric("box", agreement=True)] = (self._all, trusted)
        if task.kind is TaskKind.INSTANCE_SEGMENTATION:
            masked = np.array([i for i, objects in enumerate(annotated) if objects.masks is not None], np.int64)
            if len(masked):
                self._truth[Metric("mask")] = (masked, [annotated[i] for i in masked])
            self._truth[Metric("mask", agreement=True)] = (self._all, trusted)
        self._weights = {len(rows): bootstrap_weights(len(rows), draws) for rows, _ in self._truth.values()}

    @property
    def metrics(self) -> list[Metric]:
        return list(self._truth)

    def measure(self, costs: Sequence[Cost], found: Sequence[Found]) -> dict[Metric, Measurement]:
        """`costs`, `found`: of every picture of the set, in its order."""
        bits = np.array([cost.bits for cost in costs], np.float64)
        measured = {}
        for metric, (rows, truth) in self._truth.items():
            matches = match(truth, [found[i] for i in rows], self._categories, metric.kind)
            weights = self._weights[len(rows)]
            measured[metric] = Measurement(
                bpp=float(bits[rows].sum() / self._pixels[rows].sum()),
                scores=score(matches),
                bpp_draws=(weights @ bits[rows]) / (weights @ self._pixels[rows]),
                draws=score(matches, weights),
            )
        return measured


def as_truth(found: Found) -> Objects:
    """The detections worth trusting, as objects to be found again."""
    kept = np.flatnonzero(found.scores >= AGREEMENT_SCORE)
    corners = found.boxes[kept].astype(np.float64)
    return Objects(
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        labels=found.labels[kept],
        crowd=np.zeros(len(kept), np.bool_),
        masks=None if found.masks is None else tuple(found.masks[i] for i in kept),
    )
