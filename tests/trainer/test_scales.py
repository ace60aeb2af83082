"""Choosing coded sizes: the smallest that costs hardly more bits at equal distance."""

import numpy as np
from numpy.typing import NDArray

from trainer.scales import choose


def curve(factor: float, floor: float) -> NDArray[np.float64]:
    """Eight points of a size whose distance cannot fall below `floor`; `factor` more bits for the rest."""
    rates = np.geomspace(0.05, 1.6, 8) * factor
    return np.stack([rates, floor + 0.1 / np.geomspace(0.05, 1.6, 8)], 1)


def test_small_sizes_serve_low_qualities_and_the_full_one_high_qualities() -> None:
    scales = choose({8: curve(0.6, 0.08), 12: curve(0.8, 0.02), 16: curve(1.0, 0.0)}, 0.03)
    assert scales == sorted(scales)
    assert (scales[0], scales[-1]) == (8, 16)
    assert 12 in scales


def test_of_equals_the_smaller_and_cheaper_size_is_taken() -> None:
    assert choose({10: curve(1.0, 0.0), 16: curve(1.0, 0.0)}, 0.0) == [10] * 8
    assert choose({10: curve(1.02, 0.0), 16: curve(1.0, 0.0)}, 0.03) == [10] * 8
    assert choose({10: curve(1.05, 0.0), 16: curve(1.0, 0.0)}, 0.03) == [16] * 8
