"""What is kept for review: found again as it came, bounded by bytes and age, also after a restart."""

import asyncio
from pathlib import Path

import pytest

from cloud.detections.log import FrameName
from cloud.kept import KeptBounds, KeptFrames
from shared.codec.types import Bitstream
from shared.errors import Unavailable


def coded(size: int) -> Bitstream:
    return Bitstream("c" * 64, 1024, 48, 64, b"h" * 10, b"l" * (size - 10), 0xFEDCBA98)


def name(seq: int) -> FrameName:
    return FrameName("gate", 1 << 63, seq)


async def kept_after(kept: KeptFrames, frames: dict[int, Bitstream]) -> None:
    for seq, bitstream in frames.items():
        kept.keep(name(seq), bitstream)
        async with asyncio.timeout(30):
            while await kept.find(name(seq)) is None:  # the writer has a thread of its own
                pass


async def test_a_frame_is_found_as_it_came_also_after_a_restart(tmp_path: Path) -> None:
    bounds = KeptBounds(60.0, 10_000)
    kept = KeptFrames(tmp_path / "review.sqlite", bounds)
    kept.keep(name(1), coded(100))
    kept.keep(name(1), coded(300))  # the same frame again changes nothing
    await kept.close()
    kept = KeptFrames(tmp_path / "review.sqlite", bounds)
    assert await kept.find(name(1)) == coded(100)
    assert await kept.find(name(2)) is None
    assert (kept.frames, kept.coded_bytes, kept.not_kept) == (1, 100, 0)
    await kept.close()


async def test_the_oldest_leave_when_bytes_or_age_pass_the_bound(tmp_path: Path) -> None:
    now_ns = [0]
    kept = KeptFrames(tmp_path / "review.sqlite", KeptBounds(60.0, 250), clock=lambda: now_ns[0])
    await kept_after(kept, {1: coded(100), 2: coded(100), 3: coded(100)})
    assert [await kept.find(name(seq)) is not None for seq in (1, 2, 3)] == [False, True, True]
    assert (kept.frames, kept.coded_bytes) == (2, 200)
    now_ns[0] = 61 * 10**9
    await kept_after(kept, {4: coded(10)})
    assert [await kept.find(name(seq)) is not None for seq in (2, 3, 4)] == [False, False, True]
    assert (kept.frames, kept.coded_bytes) == (1, 10)
    await kept.close()


async def test_zero_bytes_keep_nothing(tmp_path: Path) -> None:
    kept = KeptFrames(tmp_path / "review.sqlite", KeptBounds(60.0, 0))
    kept.keep(name(1), coded(10))
    await kept.close()
    kept = KeptFrames(tmp_path / "review.sqlite", KeptBounds(60.0, 1000))
    assert await kept.find(name(1)) is None
    await kept.close()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "review.sqlite").write_bytes(b"not a database, by any means " * 100)
    with pytest.raises(Unavailable, match="cannot be opened"):
        KeptFrames(tmp_path / "review.sqlite", KeptBounds(60.0, 1000))
