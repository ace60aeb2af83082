"""The motion gate: closed for noise and for light that changes, open for things that move, however slowly."""

import av
import numpy as np
import pytest

from edge.motion import MotionGate, changed_share


def frame(rgb: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.clip(rgb, 0, 255).astype(np.uint8), format="rgb24")


@pytest.fixture
def street(rng: np.random.Generator) -> np.ndarray:
    """[240, 320, 3]: a fixed view with texture."""
    return np.repeat(rng.integers(60, 180, (240, 320, 1)), 3, axis=2).astype(float)


def test_noise_and_light_keep_it_closed(street: np.ndarray, rng: np.random.Generator) -> None:
    gate = MotionGate(share=0.002, refresh_s=0)
    assert gate.opens(frame(street), 0.0)
    assert not any(gate.opens(frame(street + rng.normal(0, 8, street.shape)), i) for i in range(20))
    assert not gate.opens(frame(street + 15), 21)


def test_a_thing_of_one_percent_of_the_picture_opens_it(street: np.ndarray) -> None:
    gate = MotionGate(share=0.002, refresh_s=0)
    gate.opens(frame(street), 0.0)
    walker = street.copy()
    walker[100:132, 40:64] = 240
    assert gate.opens(frame(walker), 0.1)
    assert not gate.opens(frame(walker), 0.2)
    assert gate.opens(frame(street), 0.3)


def test_what_changes_slowly_is_let_through_in_time(street: np.ndarray) -> None:
    gate = MotionGate(share=0.01, refresh_s=0)
    opened = []
    for i in range(60):
        growing = street.copy()
        growing[: 4 * i, :40] = 250
        opened.append(gate.opens(frame(growing), float(i)))
    assert opened[0]
    assert 5 < sum(opened) < 40


def test_it_opens_by_the_clock_and_for_another_size(street: np.ndarray) -> None:
    gate = MotionGate(share=0.5, refresh_s=10)
    opened = [t for t in range(0, 31) if gate.opens(frame(street), float(t))]
    assert opened == [0, 10, 20, 30]
    assert gate.opens(frame(street[:120]), 31.0)
    assert changed_share(np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32)) == 1.0
