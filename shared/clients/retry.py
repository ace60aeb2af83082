"""When a call is worth another try, and how long to wait before it.

Worth one: Unavailable (a peer that is down, starting, draining or behind a broken wire) and Overloaded (right input, no
room now). Everything else would end the same way again. Pauses double from `first_s` to `max_s`, each drawn between
half and the whole of it, so that callers who lost one server together do not come back together ("equal jitter",
M. Brooker, "Exponential Backoff And Jitter", 2015).
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import Overloaded, SightlineError, Unavailable

WORTH_A_RETRY = (Unavailable, Overloaded)


@dataclass(frozen=True, slots=True)
class Retry:
    """Pauses from `first_s` up to `max_s` seconds; `give_up_s` without success ends it, None: never, 0: no retry."""

    first_s: float = 0.1
    max_s: float = 5.0
    give_up_s: float | None = 60.0


class Attempts:
    """Counts the failures of one call, or of one subscription since it last heard something."""

    def __init__(self, retry: Retry, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry = retry
        self._clock = clock
        self.succeeded()

    def succeeded(self) -> None:
        """Begins anew."""
        self._failures = 0
        self._since_s = self._clock()

    def failed(self, error: SightlineError) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is to be none."""
        if not isinstance(error, WORTH_A_RETRY):
            raise error
        bound_s = min(self._retry.max_s, self._retry.first_s * 2.0 ** min(self._failures, 32))
        pause_s = bound_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, keeps no secret
        left_s = self.left_s()
        if left_s is not None and pause_s >= left_s:
            raise error
        self._failures += 1
        return pause_s

    def left_s(self) -> float | None:
        """Seconds until it is given up; None: never."""
        if self._retry.give_up_s is None:
            return None
        return max(0.0, self._since_s + self._retry.give_up_s - self._clock())
