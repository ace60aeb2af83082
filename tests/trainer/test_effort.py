"""Content-adaptive encoding."""

import numpy as np
import pytest
import torch

from cloud.tasks.trunk import MobileNetPyramid
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.effort import encode_with_effort
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
