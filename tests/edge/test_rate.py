"""The rate controller on simulated links: full but not over, backlogs drained, no oscillation. Time is passed in."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from edge.rate import Flow, RateController

CURVE = (0.05, 0.096, 0.18, 0.32, 0.55, 0.84, 1.15, 1.52)
PIXELS = 640 * 480


@dataclass(frozen=True)
class Run:
    """One row a frame: time in s, quality, queue in s of the link's rate then; `received` bits by time."""

    times: np.ndarray
    quality: np.ndarray
    queue_s: np.ndarray
    received: np.ndarray

    def between(self, start: float, end: float) -> "Run":
        kept = (self.times >= start) & (self.times < end)
        return Run(self.times[kept], self.quality[kept], self.queue_s[kept], self.received[kept])


def simulate(
    controller: RateController,
    link_bps: Callable[[float], float],
    *,
    seconds: float,
    frames_a_second: float = 15.0,
    scene: Callable[[float], float] = lambda now: 1.0,
    backlog: int = 0,
    bounds: tuple[float, float] = (1.0, 8.0),
) -> Run:
    """Frames at an even pace through a first-in first-out link. `scene`: factor on the curve's bits."""
    rng = np.random.default_rng(8)
    queue = deque([int(0.3 * PIXELS)] * backlog)
    rows, sent = [], 0.0
    step = 1 / frames_a_second
    for i in range(int(seconds * frames_a_second)):
        now = i * step
        room = link_bps(now) * step + sent
        received = 0
        while queue and queue[0] <= room:
            bits = queue.popleft()
            room -= bits
            received += bits
            controller.on_received(bits, now)
        sent = room if queue else 0.0
        quality = controller.quality(len(queue), bounds, now)
        bits = int(np.interp(quality, range(1, 9), CURVE) * PIXELS * scene(now) * np.exp(rng.normal(0, 0.1)))
        controller.on_encoded(quality, bits, now)
        queue.append(bits)
        rows.append((now, quality, sum(queue) / link_bps(now), received))
    return Run(*(np.array(column) for column in zip(*rows, strict=True)))


def test_a_link_that_falls_to_an_eighth_and_comes_back_is_kept_full_and_never_builds_a_long_queue() -> None:
    controller = RateController(4e6, CURVE)
    run = simulate(controller, lambda now: 0.5e6 if 40 <= now < 100 else 4e6, seconds=160)
    for start, end, rate in ((10, 40, 4e6), (75, 100, 0.5e6), (120, 160, 4e6)):
        part = run.between(start, end)
        assert part.received.sum() / (end - start) > 0.9 * rate, (start, end)
        assert part.received.sum() / (end - start) < 1.03 * rate, (start, end)
        assert part.queue_s.max() < 2.5, (start, end)
    assert run.queue_s.max() < 12  # what was coded for the fast link in the moment of its fall
    assert run.between(70, 100).quality.std() < 0.35  # no oscillation
    assert run.between(130, 160).quality.std() < 0.35


def test_a_budget_below_the_link_is_held() -> None:
    run = simulate(RateController(1e6, CURVE), lambda now: 50e6, seconds=60).between(10, 60)
    assert 0.93e6 < run.received.sum() / 50 < 1.02e6


def test_a_scene_that_costs_three_times_as_much_gets_a_lower_quality_and_no_more_bits() -> None:
    run = simulate(RateController(1e6, CURVE), lambda now: 50e6, seconds=80, scene=lambda now: 3.0 if now > 40 else 1.0)
    calm, busy = run.between(20, 40), run.between(50, 80)
    assert busy.quality.mean() < calm.quality.mean() - 1
    assert busy.received.sum() / 30 < 1.03e6


def test_a_backlog_drains_at_the_lowest_quality_and_then_quality_comes_back() -> None:
    run = simulate(RateController(2e6, CURVE), lambda now: 2e6, seconds=120, backlog=400, bounds=(2.0, 8.0))
    assert run.quality[50] == 2.0
    assert run.queue_s[50] > 10
    assert run.between(100, 120).queue_s.max() < 1.0
    assert run.between(100, 120).quality.mean() > 3.0


def test_bounds_hold_whatever_the_link_does() -> None:
    run = simulate(RateController(1e9, CURVE), lambda now: 1e9, seconds=20, bounds=(3.0, 6.0))
    assert set(run.quality) == {6.0}
    run = simulate(RateController(1e4, CURVE), lambda now: 1e4, seconds=20, bounds=(3.0, 6.0))
    assert run.quality[-1] == 3.0


def test_before_anything_was_coded_the_highest_quality_is_tried() -> None:
    assert RateController(1e6, CURVE).quality(0, (1.0, 7.0), 0.0) == 7.0


def test_a_curve_that_does_not_ascend_is_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        RateController(1e6, (1, 2, 3, 3, 4, 5, 6, 7))


def test_a_flow_knows_its_rate_soon_and_forgets_it_in_silence() -> None:
    flow = Flow(2.0)
    for i in range(100):
        flow.add(3, i * 0.1)
    assert flow.a_second(9.9) == pytest.approx(30, rel=0.1)
    assert flow.a_second(30.0) < 0.01
