"""Content-adaptive encoding."""

import numpy as np
import pytest
import torch

from cloud.tasks.trunk import MobileNetPyramid
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.effort import RATE, Descent, encode_with_effort
from trainer.frozen import FrozenNetwork
from trainer.losses import TaskLoss
from trainer.schedule import Schedule


@pytest.fixture
def task() -> TaskLoss:
    torch.manual_seed(0)
    return TaskLoss(FrozenNetwork("random", MobileNetPyramid(), 96), "features")


@pytest.fixture
def frame(astronaut: Frame) -> Frame:
    return Frame(np.ascontiguousarray(astronaut.rgb[20:140, 150:270]))  # neither side a multiple of 16


def test_more_effort_lowers_the_cost_and_any_decoder_reads_the_result(codec: Codec, frame: Frame, task: TaskLoss):
    result = encode_with_effort(codec, frame, 6.0, task, steps=15, schedule=Schedule())
    assert result.cost < result.plain_cost
    decoded = codec.decode(result.bitstream)
    assert decoded.rgb.shape == frame.rgb.shape
    plain = codec.decode(codec.encode(frame, 6.0))
    assert not np.array_equal(decoded.rgb, plain.rgb)


def test_without_effort_the_plain_encoding_comes_out(codec: Codec, frame: Frame, task: TaskLoss):
    result = encode_with_effort(codec, frame, 3.0, task, steps=0, schedule=Schedule())
    assert result.cost == pytest.approx(result.plain_cost, rel=1e-6)
    assert result.bitstream == codec.encode(frame, 3.0)


def test_equal_seeds_give_equal_bits(codec: Codec, frame: Frame, task: TaskLoss):
    one, two = (
        encode_with_effort(codec, frame, 6.0, task, steps=3, schedule=Schedule(), seed=5).bitstream for _ in range(2)
    )
    assert one == two


def test_a_move_follows_the_latents_own_gradient_and_that_of_all():
    values, movable = torch.zeros(3), torch.tensor([True, True, False])
    Descent(values, movable).step(torch.tensor([1.0, -4.0, 100.0]))
    of_all = ((1 + 16) / 2) ** 0.5
    expected = torch.tensor([-1 / (1 * of_all) ** 0.5, 4 / (4 * of_all) ** 0.5, 0.0])
    assert torch.allclose(values, RATE * expected)


def test_where_no_latent_is_movable_none_moves():
    values = torch.ones(2)
    Descent(values, torch.tensor([False, False])).step(torch.ones(2))
    assert torch.equal(values, torch.ones(2))
