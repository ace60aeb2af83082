"""Bjontegaard delta rate at equal task accuracy, or "no result": never a number that the curves do not support.

The mean difference of log rate between two curves over the accuracies both reach (VCEG-M33), by PCHIP interpolation
from the `bjontegaard` package. Task accuracy is noisy and not monotonic in rate, so a curve is its Pareto front first:
strictly increasing in both. A result needs four points on each front and half the accuracy range in common.

Overlap is the common part of the two fronts' accuracy ranges over their union, both looked at from `working_floor` up.
A grid that also has pictures too coarse for any use (a quarter of the size at the coarsest QP) would otherwise decide
alone whether there is a result; the value itself is not touched by the floor. Both figures are reported.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import InvalidInput

MIN_POINTS = 4
MIN_OVERLAP = 0.5
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate-accuracy curve: `bpp` [n] bits per pixel and `accuracy` [n], both strictly increasing."""

    bpp: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.bpp.shape != self.accuracy.shape or self.bpp.ndim != 1:
            raise InvalidInput(
                f"a curve needs as many rates as accuracies, got {self.bpp.shape}, {self.accuracy.shape}"
            )
        if np.any(self.bpp <= 0) or np.any(np.diff(self.bpp) <= 0) or np.any(np.diff(self.accuracy) <= 0):
            raise InvalidInput("a curve must be positive and strictly increasing in rate and in accuracy")


def pareto_front(bpp: ArrayLike, accuracy: ArrayLike) -> NDArray[np.int64]:
    """Indices of the points that no other point betters, by increasing rate: each is more accurate than all cheaper.

    Points that are not finite or cost nothing are left out. Of equal rates the most accurate stays.
    """
    rates, scores = np.asarray(bpp, np.float64), np.asarray(accuracy, np.float64)
    best, kept = -np.inf, []
    for index in np.lexsort((-scores, rates)):
        if np.isfinite(rates[index]) and rates[index] > 0 and scores[index] > best:
            best = scores[index]
            kept.append(index)
    return np.array(kept, np.int64)


def front_curve(bpp: ArrayLike, accuracy: ArrayLike) -> Curve:
    """The Pareto front of measured points as a curve."""
    front = pareto_front(bpp, accuracy)
    return Curve(np.asarray(bpp, np.float64)[front], np.asarray(accuracy, np.float64)[front])


@dataclass(frozen=True, slots=True)
class BdRate:
    """`percent`: rate of the test curve against the anchor's, negative is cheaper; None is "no result", `why` says why.

    `overlap`: what decides, from the working floor up; `overlap_all`: over the whole ranges. Both in [0, 1].
    """

    percent: float | None
    overlap: float
    overlap_all: float
    why: str = ""


def bd_rate(anchor: Curve, test: Curve, *, working_floor: float = -np.inf) -> BdRate:
    """BD-rate of `test` against `anchor`. `working_floor`: accuracy from which overlap is judged."""
    import bjontegaard

    overlap, overlap_all = (_overlap(anchor, test, floor) for floor in (working_floor, -np.inf))
    few = min(len(anchor.bpp), len(test.bpp))
    if few < MIN_POINTS:
        return BdRate(None, overlap, overlap_all, f"{few} points on a front, {MIN_POINTS} needed")
    if overlap < MIN_OVERLAP or overlap_all <= 0:
        return BdRate(None, overlap, overlap_all, f"overlap {overlap:.0%}, {MIN_OVERLAP:.0%} needed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of an overlap that was judged above
        percent = bjontegaard.bd_rate(
            anchor.bpp, anchor.accuracy, test.bpp, test.accuracy, "pchip", require_matching_points=False, min_overlap=0
        )
    return BdRate(float(percent), overlap, overlap_all)


def _overlap(a: Curve, b: Curve, floor: float) -> float:
    """Common part of two accuracy ranges over their union, in [0, 1]."""
    if not len(a.bpp) or not len(b.bpp):
        return 0.0
    lows = [max(float(curve.accuracy[0]), floor) for curve in (a, b)]
    highs = [max(float(curve.accuracy[-1]), floor) for curve in (a, b)]
    union = max(highs) - min(lows)
    return max(0.0, min(highs) - max(lows)) / union if union > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % bootstrap interval; None at an end that too many draws without a result leave open."""

    low: float | None
    high: float | None
    draws_without_result: int


def interval(draws: ArrayLike) -> Interval:
    """Percentile interval of `draws` [n], NaN where a draw has no result.

    A draw without a result could be anything, so it counts as -infinity for the lower end and +infinity for the upper.
    """
    values = np.asarray(draws, np.float64)
    missing = np.isnan(values)
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile(np.where(missing, -np.inf, values), tail, method="lower")
    high = np.quantile(np.where(missing, np.inf, values), 1 - tail, method="higher")
    return Interval(*(float(end) if np.isfinite(end) else None for end in (low, high)), int(missing.sum()))


def bootstrap_weights(images: int, draws: int, seed: int = 8) -> NDArray[np.int32]:
    """How often each image is in each resampled set: int32 [draws, images], rows sum to `images`.

    Made once and used for every codec and network, so that differences are paired.
    """
    chosen = np.random.default_rng(seed).integers(0, images, (draws, images))
    return np.stack([np.bincount(row, minlength=images) for row in chosen]).astype(np.int32)


def bd_rate_interval(
    anchor: tuple[NDArray[np.float64], NDArray[np.float64]],
    test: tuple[NDArray[np.float64], NDArray[np.float64]],
    working_floors: NDArray[np.float64],
) -> Interval:
    """Interval of the BD-rate from resampled curves.

    `anchor`, `test`: bpp and accuracy, each [draws, points], before the front is taken. `working_floors`: [draws].
    """
    results = [
        bd_rate(front_curve(*a), front_curve(*t), working_floor=floor).percent
        for a, t, floor in zip(zip(*anchor, strict=True), zip(*test, strict=True), working_floors.tolist(), strict=True)
    ]
    return interval([np.nan if result is None else result for result in results])
