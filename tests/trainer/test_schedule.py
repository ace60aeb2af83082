"""The loss-weight schedule and the gradient balance."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidSettings
from trainer.schedule import GradientBalance, Schedule, ramp

LEVELS = torch.arange(8.0)
PROGRESS = [i / 1000 for i in range(1001)]


def test_distortion_comes_first_then_the_task_then_the_rate_is_pressed():
    schedule = Schedule(rate_start=0.7, press_from=0.75, press_until=0.95)
    start = schedule.weights(0.0, LEVELS)
    task = schedule.weights(schedule.task_at, LEVELS)
    end = schedule.weights(1.0, LEVELS)
    assert float(start.task.max()) == 0
    assert torch.all(start.mse > end.mse)
    torch.testing.assert_close(task.rate, start.rate)
    torch.testing.assert_close(task.task, end.task)
    assert torch.all(end.rate > start.rate)


def test_weights_move_smoothly():
    schedule = Schedule()
    rows = [torch.cat([w.rate, w.mse, w.task]) for w in (schedule.weights(p, LEVELS) for p in PROGRESS)]
    largest = torch.stack(rows).amax(0)
    for one, next_one in itertools.pairwise(rows):
        assert float(((next_one - one).abs() / largest).max()) < 0.03


def test_the_rate_rises_by_steps_with_plateaus_between():
    schedule = Schedule(rate_start=0.5, press_from=0.4, press_until=0.8, press_steps=4)
    values = [schedule.pressure(p) for p in PROGRESS]
    assert values[0] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(1.0)
    assert all(b >= a for a, b in itertools.pairwise(values))
    inside = values[400:800]
    flat = sum(b == a for a, b in itertools.pairwise(inside))
    assert 0.4 < flat / len(inside) < 0.6
    assert len({round(v, 6) for v in values if values.count(v) > 20}) == 5  # four steps join five plateaus


def test_higher_levels_pay_more_for_distortion_and_less_for_rate_at_constant_product():
    weights = Schedule(span=64.0).weights(1.0, LEVELS)
    ratio = weights.mse / weights.rate
    assert float(ratio[7] / ratio[0]) == pytest.approx(64.0, rel=1e-4)
    torch.testing.assert_close(weights.mse * weights.rate, (weights.mse * weights.rate)[:1].expand(8))


def test_leaning_changes_how_loud_a_level_is_and_not_what_it_aims_at():
    even, leaning = (Schedule(lean=lean).weights(1.0, LEVELS) for lean in (0.5, 0.15))
    for weights in (even, leaning):
        torch.testing.assert_close(weights.mse / weights.rate, even.mse / even.rate)
        torch.testing.assert_close(weights.task / weights.rate, even.task / even.rate)
    louder = leaning.task / even.task
    assert torch.all(louder.diff() < 0)
    assert float(louder[0] * louder[-1]) == pytest.approx(1)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 2))
def test_a_ramp_stays_between_zero_and_one_and_never_falls(a: float, b: float, progress: float):
    start, end = min(a, b), max(a, b)
    assert 0 <= ramp(progress, start, end) <= ramp(progress + 0.01, start, end) <= 1


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    schedule = Schedule(warmup_steps=10, lr_floor=0.1)
    assert schedule.learning_rate(0.0, 0) == pytest.approx(0.1)
    assert schedule.learning_rate(0.0, 9) == pytest.approx(1.0)
    assert schedule.learning_rate(1.0, 1000) == pytest.approx(0.1)


def test_latents_are_noisy_until_late_and_rounded_at_the_end():
    schedule = Schedule(rounding_from=0.85)
    assert schedule.rounded(0.85) == 0
    assert schedule.rounded(1.0) == 1


@pytest.mark.parametrize(
    "wrong", [{"distortion_until": 0.5, "task_at": 0.4}, {"press_from": 0.9, "press_until": 0.8}, {"span": 0.0}]
)
def test_impossible_schedules_are_refused(wrong: dict[str, float]):
    with pytest.raises(InvalidSettings, match=next(iter(wrong))):
        Schedule(**wrong)


def test_the_schedule_draws_itself(tmp_path):
    Schedule().plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_terms_in_balance_are_left_alone():
    balance = GradientBalance(share=0.1)
    balance.observe({"rate": 1.0, "mse": 0.3, "task": 0.8})
    assert [balance.factor(n) for n in ("rate", "mse", "task")] == [1, 1, 1]


def test_a_drowned_term_is_lifted_to_its_share_of_the_strongest():
    balance = GradientBalance(share=0.1, limit=8.0)
    balance.observe({"rate": 1.0, "mse": 0.02, "task": 1e-6})
    assert balance.factor("mse") * 0.02 == pytest.approx(0.1)
    assert balance.factor("task") == 8.0
    assert balance.factor("rate") == 1.0


def test_balance_follows_measurements_slowly_ignores_what_is_not_finite_and_survives_a_checkpoint():
    balance = GradientBalance(memory=0.5)
    balance.observe({"rate": 1.0, "mse": 1.0})
    balance.observe({"rate": float("nan"), "mse": 0.0})
    assert balance.norms == {"rate": 1.0, "mse": 0.5}
    again = GradientBalance(memory=0.5)
    again.load_state_dict(balance.state_dict())
    assert again.norms == balance.norms
