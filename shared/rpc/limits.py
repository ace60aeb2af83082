"""How much one caller may ask for: calls at once, and calls and frames per second, so that none starves the others.

Each identity has a token bucket that holds two seconds of its rate, and a count of its calls under way. A caller that
has no name is counted by its address. `local` (plaintext on this machine) is not limited: it shares the machine anyway.

    call      over a limit: Overloaded (RESOURCE_EXHAUSTED), before its handler runs
    picture   of CompressStream over the rate: waits its turn, and the stream with it
    frame     of Upload over the rate: RETRY_LATER, so that nothing is lost
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.errors import Overloaded
from shared.rpc.policy import LOCAL

BURST_S = 2.0
MAX_REMEMBERED = 10_000  # identities whose budget is kept; one that is forgotten begins with a full bucket


@dataclass(frozen=True, slots=True)
class CallLimits:
    """`calls`: under way in all. `calls_caller`: of one caller. `rate_caller`: calls and frames per second, 0: any."""

    calls: int
    calls_caller: int
    rate_caller: float


@dataclass(slots=True)
class _Budget:
    tokens: float
    filled_s: float
    running: int = 0


class Budgets:
    """See the head of this module. Belongs to one event loop."""

    def __init__(self, limits: CallLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._running = 0
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()

    @contextmanager
    def call(self, who: str) -> Iterator[None]:
        """One call, from its start to its end. Raises Overloaded."""
        limits = self._limits
        if self._running >= limits.calls:
            raise Overloaded(f"{self._running} calls are under way, the limit is {limits.calls}; try again later")
        budget = self._budget(who)
        if who != LOCAL and budget.running >= limits.calls_caller:
            raise Overloaded(
                f"{who} has {budget.running} calls under way, the limit is {limits.calls_caller}; try again later"
            )
        wait_s = self.wait_s(who)
        if wait_s > 0:
            raise Overloaded(
                f"{who} may make {limits.rate_caller:g} calls and frames per second, got more; try again in "
                f"{wait_s:.3f} s"
            )
        self._running += 1
        budget.running += 1
        try:
            yield
        finally:
            self._running -= 1
            budget.running -= 1

    def wait_s(self, who: str) -> float:
        """Takes one turn, and how long to wait before using it; where that is more than 0 no turn was taken."""
        rate = self._limits.rate_caller
        if who == LOCAL or not rate:
            return 0.0
        budget, now = self._budget(who), self._clock()
        budget.tokens = min(rate * BURST_S, budget.tokens + (now - budget.filled_s) * rate)
        budget.filled_s = now
        if budget.tokens < 1:
            return (1 - budget.tokens) / rate
        budget.tokens -= 1
        return 0.0

    def _budget(self, who: str) -> _Budget:
        budget = self._budgets.get(who)
        if budget is None:
            budget = self._budgets[who] = _Budget(max(1.0, self._limits.rate_caller * BURST_S), self._clock())
            if len(self._budgets) > MAX_REMEMBERED:
                self._forget()
        self._budgets.move_to_end(who)
        return budget

    def _forget(self) -> None:
        """The one unused for longest that has no call under way."""
        for who, budget in self._budgets.items():
            if not budget.running:
                del self._budgets[who]
                return
