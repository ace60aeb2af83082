"""Times with their spread. What is compared takes turns, so that whatever else the machine does meets all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    def of(self, change: Callable[[float], float]) -> "Sample":
        """The same in another unit; `change` may fall, as from seconds to a rate."""
        ends = sorted((change(self.low), change(self.high)))
        return Sample(change(self.median), *ends)


def sample(values: Sequence[float]) -> Sample:
    if len(values) < 2:
        return Sample(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Sample(median, low, high)


def in_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Sample]:
    """Milliseconds of each by the wall clock, or another `clock` of seconds, after `warm_up` runs that do not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_up + rounds):
        for name, work in works.items():
            start = clock()
            work()
            if turn >= warm_up:
                times[name].append((clock() - start) * 1e3)
    return {name: sample(values) for name, values in times.items()}
