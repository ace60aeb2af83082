"""COCO's average precision with the images weighted, so that a bootstrap costs a few passes over flat arrays.

    truth, found --match--> Matches (once for each set of detections) --average_precision(weights)--> AP

`match` is `COCOeval.evaluateImg` for all areas and 100 detections an image and category; `average_precision` is
`COCOeval.accumulate` on the multiset in which image i occurs `weights[i]` times. Both equal pycocotools' to the last
bit (tests). Overlaps come from pycocotools, for boxes and for run-length masks.

Why weights are exact: copies of one image give equal detections side by side in the order of scores, so true and false
positives accumulate in blocks. Precision rises within a block of true positives and falls within one of false ones, so
the envelope and the first index reaching a recall are found at block ends. Only equal scores within one image may be
ordered otherwise than in a literal multiset.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Kind = Literal["box", "mask"]
Rle = dict[str, Any]  # pycocotools' compressed run-length encoding: {"size": [height, width], "counts": bytes}

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # an image and category
PERSON = 1  # COCO's category id

_FALSE_POSITIVE, _TRUE_POSITIVE, _IGNORED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Objects:
    """What an image holds. `boxes`: float64 [G, 4] x, y, width, height in pixels; `labels`: int64 [G], category ids;
    `crowd`: bool [G]; `masks`: G run-lengths, or None where objects have boxes only."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    masks: tuple[Rle, ...] | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a network found. `boxes`: float32 [N, 4] x0, y0, x1, y1 in pixels; `scores`: float32 [N]; `labels`: int64
    [N], category ids; `masks`: N run-lengths, or None for a network without masks."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: tuple[Rle, ...] | None


@dataclass(frozen=True, slots=True)
class Matches:
    """Detections of K categories on N images, by category and falling score: category k is `[offsets[k]:offsets[k+1]]`.

    `image`: int32 [D], index of the image; `status`: int8 [10, D], false positive, true positive or ignored at each IoU
    threshold; `positives`: int32 [K, N], objects to be found.
    """

    categories: tuple[int, ...]
    image: NDArray[np.int32]
    status: NDArray[np.int8]
    offsets: NDArray[np.int64]
    positives: NDArray[np.int32]


def match(truth: Sequence[Objects], found: Sequence[Found], categories: Sequence[int], kind: Kind) -> Matches:
    """Match detections to objects, image by image; `truth` and `found` are in the same order of images."""
    index = {category: k for k, category in enumerate(sorted(categories))}
    positives = np.zeros((len(index), len(truth)), np.int32)
    scores: dict[int, list[NDArray[np.float32]]] = defaultdict(list)
    images: dict[int, list[NDArray[np.int32]]] = defaultdict(list)
    statuses: dict[int, list[NDArray[np.int8]]] = defaultdict(list)
    for n, (objects, detections) in enumerate(zip(truth, found, strict=True)):
        for category in (set(objects.labels.tolist()) | set(detections.labels.tolist())) & index.keys():
            k = index[category]
            truths = np.flatnonzero(objects.labels == category)
            truths = truths[np.argsort(objects.crowd[truths], kind="stable")]  # crowds last
            positives[k, n] = np.count_nonzero(~objects.crowd[truths])
            mine = np.flatnonzero(detections.labels == category)
            mine = mine[np.argsort(-detections.scores[mine], kind="stable")][:MAX_DETECTIONS]
            if len(mine):
                scores[k].append(detections.scores[mine])
                images[k].append(np.full(len(mine), n, np.int32))
                statuses[k].append(_match_image(objects, detections, truths, mine, kind))
    offsets, image, status = [0], [np.zeros(0, np.int32)], [np.zeros((10, 0), np.int8)]
    for k in range(len(index)):
        if scores[k]:
            order = np.argsort(-np.concatenate(scores[k]), kind="stable")
            image.append(np.concatenate(images[k])[order])
            status.append(np.concatenate(statuses[k], axis=1)[:, order])
        offsets.append(sum(map(len, image)))
    return Matches(
        tuple(index),
        np.concatenate(image),
        np.ascontiguousarray(np.concatenate(status, axis=1)),
        np.array(offsets, np.int64),
        positives,
    )


def _match_image(
    objects: Objects, found: Found, truths: NDArray[np.int64], mine: NDArray[np.int64], kind: Kind
) -> NDArray[np.int8]:
    """Status int8 [10, len(mine)] of one category's detections on one image."""
    if not len(truths):
        return np.full((len(IOU_THRESHOLDS), len(mine)), _FALSE_POSITIVE, np.int8)
    crowd = objects.crowd[truths]
    if kind == "box":
        corners = found.boxes[mine].astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        overlaps = coco_mask.iou(boxes, objects.boxes[truths], crowd.tolist())
    else:
        if objects.masks is None or found.masks is None:
            raise ValueError("masks can be matched only where both the objects and the detections have them")
        theirs, own = objects.masks, found.masks
        overlaps = coco_mask.iou([own[i] for i in mine], [theirs[i] for i in truths], crowd.tolist())
    return _greedy(np.ascontiguousarray(overlaps), crowd, IOU_THRESHOLDS)


@numba.njit(cache=True, nogil=True)
def _greedy(overlaps, crowd, thresholds):  # type: ignore[no-untyped-def]
    """Highest score first, each takes the free object it overlaps most; a crowd takes any number."""
    detections, objects = overlaps.shape
    status = np.zeros((len(thresholds), detections), np.int8)
    for t in range(len(thresholds)):
        taken = np.zeros(objects, np.bool_)
        for d in range(detections):
            best, chosen = min(thresholds[t], 1 - 1e-10), -1
            for g in range(objects):
                if taken[g] and not crowd[g]:
                    continue
                if chosen > -1 and not crowd[chosen] and crowd[g]:
                    break
                if overlaps[d, g] >= best:
                    best, chosen = overlaps[d, g], g
            if chosen > -1:
                taken[chosen] = True
                status[t, d] = _IGNORED if crowd[chosen] else _TRUE_POSITIVE
    return status


def average_precision(matches: Matches, weights: NDArray[np.int32] | None = None) -> NDArray[np.float64]:
    """AP by draw, category and IoU threshold: float64 [B, K, 10], NaN where a category has no object in a draw.

    `weights`: int32 [B, N], how often each image counts in each draw; None is every image once (B = 1).
    """
    if weights is None:
        weights = np.ones((1, matches.positives.shape[1]), np.int32)
    weights = np.ascontiguousarray(weights, np.int32)
    wanted = weights.astype(np.int64) @ matches.positives.T.astype(np.int64)  # [B, K]
    out = np.full((len(weights), len(matches.categories), len(IOU_THRESHOLDS)), np.nan)
    _accumulate(matches.image, matches.status, matches.offsets, weights, wanted, RECALLS, out)
    return out


@numba.njit(cache=True, nogil=True)
def _accumulate(image, status, offsets, weights, wanted, recalls, out):  # type: ignore[no-untyped-def]
    draws, categories, thresholds = out.shape
    longest = 0
    for k in range(categories):
        longest = max(longest, offsets[k + 1] - offsets[k])
    precision, recall = np.empty(longest), np.empty(longest)
    for k in range(categories):
        begin, count = offsets[k], offsets[k + 1] - offsets[k]
        for b in range(draws):
            if wanted[b, k] == 0:
                continue
            for t in range(thresholds):
                hits, misses = 0, 0
                for i in range(count):
                    kind = status[t, begin + i]
                    if kind == _TRUE_POSITIVE:
                        hits += weights[b, image[begin + i]]
                    elif kind == _FALSE_POSITIVE:
                        misses += weights[b, image[begin + i]]
                    recall[i] = hits / wanted[b, k]
                    precision[i] = hits / (misses + hits + 2.220446049250313e-16)
                for i in range(count - 1, 0, -1):
                    precision[i - 1] = max(precision[i - 1], precision[i])
                at, total = 0, 0.0
                for r in range(len(recalls)):
                    while at < count and recall[at] < recalls[r]:
                        at += 1
                    if at == count:
                        break
                    total += precision[at]
                out[b, k, t] = total / len(recalls)


@dataclass(frozen=True, slots=True)
class Scores:
    """COCO's figures by draw, each float64 [B], in [0, 1]: AP over IoU 0.50:0.95, AP50, and AP of persons."""

    ap: NDArray[np.float64]
    ap50: NDArray[np.float64]
    person_ap: NDArray[np.float64]


def score(matches: Matches, weights: NDArray[np.int32] | None = None) -> Scores:
    """Means over the categories that occur (COCO's rule). NaN where none does, and for persons where there are none."""
    ap = average_precision(matches, weights)
    occurs = ~np.isnan(ap[:, :, 0])
    count = np.where(occurs.any(1), occurs.sum(1), np.nan)
    filled = np.where(occurs[:, :, None], ap, 0.0)
    person = np.full(len(ap), np.nan)
    if PERSON in matches.categories:
        person = ap[:, matches.categories.index(PERSON)].mean(1)
    return Scores(filled.mean(2).sum(1) / count, filled[:, :, 0].sum(1) / count, person)
