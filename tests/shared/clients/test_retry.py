"""What is tried again, when, and when no more."""

import pytest

from shared.clients.retry import Attempts, Retry
from shared.errors import InvalidImage, Overloaded, TooLarge, Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_double_up_to_their_bound_and_begin_anew_after_a_success() -> None:
    attempts = Attempts(Retry(first_s=0.1, max_s=2.0, give_up_s=None), Clock())
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    for bound in bounds:
        assert bound / 2 <= attempts.failed(Unavailable("away")) <= bound
    for _ in range(2000):  # 2.0 ** 2000 would be no float
        attempts.failed(Unavailable("away"))
    attempts.succeeded()
    assert attempts.failed(Overloaded("full")) <= 0.1


@pytest.mark.parametrize("error", [InvalidImage("no"), TooLarge("no")])
def test_what_would_end_the_same_way_again_is_raised_at_once(error: Exception) -> None:
    with pytest.raises(type(error)):
        Attempts(Retry(give_up_s=None)).failed(error)  # type: ignore[arg-type]


def test_it_is_given_up_when_the_next_pause_would_pass_the_limit() -> None:
    clock = Clock()
    attempts = Attempts(Retry(first_s=1.0, max_s=1.0, give_up_s=10.0), clock)
    clock.now = 8.9
    attempts.failed(Unavailable("away"))
    clock.now = 9.6
    with pytest.raises(Unavailable):
        attempts.failed(Unavailable("away"))
    attempts.succeeded()
    attempts.failed(Unavailable("away"))


def test_no_retry_raises_the_first_failure() -> None:
    with pytest.raises(Overloaded):
        Attempts(Retry(give_up_s=0.0)).failed(Overloaded("full"))
