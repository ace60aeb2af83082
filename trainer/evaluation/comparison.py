"""What follows from measured points: BD-rates, the check at the highest quality, and the unquantised control.

Pure post-processing: a network's measurements come in by series and setting, figures and intervals go out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.accuracy import Measurement, Metric
from trainer.evaluation.bdrate import BdRate, Interval, bd_rate, bd_rate_interval, front_curve, interval

WORKING_SHARE = 0.5  # of the original's accuracy: below it no one runs a detector, and overlap is not judged there


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of one series as one network sees it: rates in bits a pixel, wall times in s (medians)."""

    series: str
    setting: str
    file_bpp: float
    encode_s: float
    decode_s: float
    measured: Mapping[Metric, Measurement]


@dataclass(frozen=True, slots=True)
class Comparison:
    """BD-rate of `series` against `anchor`, at equal accuracy of one network by one metric."""

    task: str
    metric: Metric
    series: str
    anchor: str
    result: BdRate
    interval: Interval


@dataclass(frozen=True, slots=True)
class TopCheck:
    """The highest quality against the original. `relative`: accuracy lost (negative) or won, as a share of the
    original's; `fewer_bits`: how many times fewer bits than the original files."""

    task: str
    metric: Metric
    series: str
    setting: str
    relative: float
    interval: Interval
    fewer_bits: float


def compare(
    task: str, points: Sequence[Point], original: Point, series: Sequence[str], anchors: Sequence[str]
) -> list[Comparison]:
    """Every series against every anchor by every metric."""
    found = []
    for metric, uncompressed in original.measured.items():
        floor = WORKING_SHARE * float(uncompressed.scores.ap[0])
        floors = WORKING_SHARE * uncompressed.draws.ap
        measured = {name: [p.measured[metric] for p in points if p.series == name] for name in (*series, *anchors)}
        curves = {
            name: front_curve([m.bpp for m in own], [m.scores.ap[0] for m in own]) for name, own in measured.items()
        }
        draws = {
            name: (np.array([m.bpp_draws for m in own]).T, np.array([m.draws.ap for m in own]).T)
            for name, own in measured.items()
        }
        for name in series:
            for anchor in anchors:
                result = bd_rate(curves[anchor], curves[name], working_floor=floor)
                spread = Interval(None, None, len(floors))
                if measured[name] and measured[anchor]:
                    spread = bd_rate_interval(draws[anchor], draws[name], floors)
                found.append(Comparison(task, metric, name, anchor, result, spread))
    return found


def check_top(task: str, points: Sequence[Point], original: Point, series: Sequence[str]) -> list[TopCheck]:
    """The costliest point of each series against the original, by every metric, as a paired bootstrap."""
    checks = []
    for name in series:
        own = [p for p in points if p.series == name]
        if not own:
            continue
        top = max(own, key=lambda p: p.measured[Metric("box")].bpp)
        for metric, before in original.measured.items():
            after = top.measured[metric]
            with np.errstate(divide="ignore", invalid="ignore"):
                relative = after.scores.ap[0] / before.scores.ap[0] - 1
                draws = after.draws.ap / before.draws.ap - 1
            fewer = before.bpp / after.bpp
            checks.append(TopCheck(task, metric, name, top.setting, float(relative), interval(draws), fewer))
    return checks
