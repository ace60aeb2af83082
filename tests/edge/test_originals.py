"""Originals at the edge: none unless asked for, bounded by bytes and age, and gone when their time is over."""

import numpy as np
import pytest

from edge.images import PixelFormat, RawPicture
from edge.originals import Originals
from edge.spool_rows import FrameName
from shared.errors import NotFound


def picture(side: int) -> RawPicture:
    return RawPicture(PixelFormat.GRAY8, side, side, np.zeros((side, side), np.uint8).tobytes())


def name(seq: int) -> FrameName:
    return FrameName("gate", 1 << 63, seq)


def held(originals: Originals, *seqs: int) -> list[bool]:
    def here(seq: int) -> bool:
        try:
            originals.find(name(seq))
        except NotFound:
            return False
        return True

    return [here(seq) for seq in seqs]


def test_switched_off_it_keeps_nothing() -> None:
    originals = Originals(0, 60.0)
    originals.keep(name(1), picture(8))
    assert not originals.on
    assert originals.bytes_kept == 0
    with pytest.raises(NotFound, match="the original of frame gate/8000000000000000/1 is not here"):
        originals.find(name(1))


def test_the_oldest_leave_when_bytes_or_age_pass_the_bound() -> None:
    now_s = [0.0]
    originals = Originals(150, 60.0, clock_s=lambda: now_s[0])
    for seq in (1, 2, 3):
        originals.keep(name(seq), picture(8))
        now_s[0] += 10
    originals.keep(name(3), picture(8))  # a retry of the same frame
    assert held(originals, 1, 2, 3) == [False, True, True]
    assert originals.bytes_kept == 128
    now_s[0] = 75.0
    assert held(originals, 2, 3) == [False, True]
    originals.keep(name(4), picture(64))  # larger than all there may be
    assert held(originals, 3, 4) == [False, False]
    assert originals.bytes_kept == 0
