"""BD-rate is a number only where the curves support one, and its interval covers what it should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidInput
from trainer.evaluation.bdrate import (
    Curve,
    bd_rate,
    bd_rate_interval,
    bootstrap_weights,
    front_curve,
    interval,
    pareto_front,
)

ACCURACY = np.array([0.10, 0.16, 0.21, 0.25, 0.27])
BPP = np.array([0.05, 0.1, 0.2, 0.4, 0.8])


def test_half_the_rate_at_every_accuracy_is_minus_fifty_percent() -> None:
    result = bd_rate(Curve(BPP, ACCURACY), Curve(BPP / 2, ACCURACY))
    assert result.percent == pytest.approx(-50, abs=1e-9)
    assert result.overlap == result.overlap_all == pytest.approx(1)


def test_straight_lines_give_the_integral_done_by_hand() -> None:
    # log10 rate is a straight line of accuracy on both: 10a - 2 against 10a - 2 + (a - 0.1), so the mean difference
    # over the common [0.1, 0.4] is the mean of a - 0.1 there, 0.15.
    a = np.linspace(0.1, 0.4, 7)
    anchor, test = Curve(10 ** (10 * a - 2), a), Curve(10 ** (11 * a - 2.1), a)
    assert bd_rate(anchor, test).percent == pytest.approx(100 * (10**0.15 - 1), rel=1e-9)


def test_swapping_the_curves_inverts_the_ratio() -> None:
    anchor, test = Curve(BPP, ACCURACY), Curve(BPP * np.array([0.5, 0.6, 0.6, 0.7, 0.9]), ACCURACY)
    there, back = bd_rate(anchor, test).percent, bd_rate(test, anchor).percent
    assert there is not None
    assert back is not None
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)


def test_three_points_are_no_result() -> None:
    result = bd_rate(Curve(BPP[:3], ACCURACY[:3]), Curve(BPP, ACCURACY))
    assert result.percent is None
    assert "3 points" in result.why


def test_less_than_half_in_common_is_no_result() -> None:
    # 0.10..0.27 against 0.20..0.37: 0.07 of 0.27 in common
    result = bd_rate(Curve(BPP, ACCURACY), Curve(BPP, ACCURACY + 0.1))
    assert result.percent is None
    assert result.overlap == pytest.approx(0.07 / 0.27)
    assert "overlap 26%" in result.why


def test_curves_that_do_not_meet_are_no_result_and_not_a_crash() -> None:
    result = bd_rate(Curve(BPP, ACCURACY), Curve(BPP, ACCURACY + 0.5))
    assert (result.percent, result.overlap) == (None, 0)


def test_overlap_is_judged_from_the_working_floor_and_the_value_is_not_touched_by_it() -> None:
    useless = np.array([0.001, 0.02])
    anchor = Curve(np.concatenate([[0.01, 0.02], BPP]), np.concatenate([useless, ACCURACY]))
    test = Curve(BPP[1:] / 2, ACCURACY[1:])
    without = bd_rate(anchor, test)
    with_floor = bd_rate(anchor, test, working_floor=0.13)
    assert without.percent is None
    assert without.overlap == pytest.approx(0.11 / 0.269)
    assert with_floor.overlap == pytest.approx(0.11 / 0.14)
    assert with_floor.overlap_all == without.overlap_all
    assert with_floor.percent == pytest.approx(-50, abs=1)


def test_the_front_drops_what_a_cheaper_point_betters() -> None:
    bpp = [0.4, 0.1, 0.2, 0.3, 0.2, 0.5]
    accuracy = [0.30, 0.10, 0.22, 0.21, 0.20, 0.30]
    assert pareto_front(bpp, accuracy).tolist() == [1, 2, 0]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=30))
def test_every_front_is_a_curve_and_betters_every_point_it_left_out(points: list[tuple[float, float]]) -> None:
    bpp, accuracy = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    curve = front_curve(bpp, accuracy)
    for rate, score in points:
        if rate > 0:
            assert np.any((curve.bpp <= rate) & (curve.accuracy >= score))


def test_a_curve_that_is_not_increasing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="strictly increasing"):
        Curve(BPP, ACCURACY[::-1].copy())
    with pytest.raises(InvalidInput, match="as many rates"):
        Curve(BPP, ACCURACY[:-1])


def test_resampled_sets_are_as_large_as_the_set_and_the_same_every_time() -> None:
    weights = bootstrap_weights(154, 500)
    assert weights.shape == (500, 154)
    assert (weights.sum(1) == 154).all()
    assert (weights == bootstrap_weights(154, 500)).all()
    assert 0.3 < (weights == 0).mean() < 0.43  # 1/e of the images are left out of a draw


def test_the_interval_of_known_draws() -> None:
    found = interval(np.arange(1001) / 10.0)
    assert (found.low, found.high) == (2.5, 97.5)


def test_draws_without_a_result_open_the_interval_instead_of_narrowing_it() -> None:
    draws = np.arange(1000) / 10.0
    draws[:10] = np.nan
    few = interval(draws)
    assert few.draws_without_result == 10
    assert few.high is not None
    assert few.high > 98
    draws[:100] = np.nan
    many = interval(draws)
    assert (many.low, many.high) == (None, None)


def test_the_interval_covers_the_truth_of_noisy_curves() -> None:
    """Images whose accuracy varies, coded at 0.6 of the anchor's rate: the interval holds -40 %, and is not wide."""
    rng = np.random.default_rng(8)
    images, draws = 100, 200
    talent = rng.normal(0, 0.05, (images, 1))  # shared by both codecs, as an image's difficulty is
    accuracies = [ACCURACY + talent + rng.normal(0, 0.01, (images, 5)) for _ in range(2)]
    rates = [BPP * rng.lognormal(0, 0.2, (images, 1)), 0.6 * BPP * rng.lognormal(0, 0.2, (images, 1))]
    weights = bootstrap_weights(images, draws) / images
    anchor, test = ((weights @ r, weights @ a) for r, a in zip(rates, accuracies, strict=True))
    found = bd_rate_interval(anchor, test, np.full(draws, -np.inf))
    assert found.low is not None
    assert found.high is not None
    assert found.low < -40 < found.high
    assert found.high - found.low < 25
