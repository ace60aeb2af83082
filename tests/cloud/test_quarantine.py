"""The quarantine keeps what was rejected, within its bounds."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cloud.detections.log import FrameName
from cloud.quarantine import Quarantine
from shared.codec.types import Bitstream
from shared.errors import Unavailable


def bitstream(size: int) -> Bitstream:
    return Bitstream("ab" * 32, 1024, 48, 64, bytes(size // 2), bytes(size - size // 2), 0xFFFFFFFF)


async def put(quarantine: Quarantine, seq: int, size: int = 100) -> None:
    await quarantine.put(FrameName("gate", 1 << 63, seq), "payload_crc", f"detail {seq}", "edge", bitstream(size))


async def test_a_rejected_frame_is_kept_as_it_came_and_survives_a_restart(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=10, max_bytes=10_000, clock=lambda: 42_999)
    await put(quarantine, 7)
    await quarantine.close()
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=10, max_bytes=10_000)
    (kept,) = await quarantine.frames()
    assert (kept.camera_id, kept.epoch, kept.seq) == ("gate", 1 << 63, 7)
    assert (kept.reason, kept.edge_id, kept.quarantined_us) == ("payload_crc: detail 7", "edge", 42)
    assert kept.bitstream == bitstream(100)
    await quarantine.close()


async def test_the_oldest_go_first_when_there_are_too_many_or_too_large(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=3, max_bytes=1000)
    for seq in range(5):
        await put(quarantine, seq)
    assert [str(frame.seq) for frame in await quarantine.frames()] == ["2", "3", "4"]
    await put(quarantine, 5, size=850)
    assert [str(frame.seq) for frame in await quarantine.frames()] == ["4", "5"]
    await quarantine.close()
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=3, max_bytes=1000)
    await put(quarantine, 6)  # what was there before the restart counts
    assert [str(frame.seq) for frame in await quarantine.frames()] == ["5", "6"]
    await put(quarantine, 7, size=1001)
    assert await quarantine.frames() == []
    await quarantine.close()


async def test_the_same_frame_again_replaces_itself(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=3, max_bytes=1000)
    for _ in range(5):
        await put(quarantine, 1)
        await put(quarantine, 2)
    assert [str(frame.seq) for frame in await quarantine.frames()] == ["1", "2"]
    await quarantine.close()


def test_a_place_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        Quarantine(tmp_path / "file" / "q.sqlite", max_frames=3, max_bytes=1000)


async def test_a_file_from_before_capture_times_were_kept_is_taken_over(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=3, max_bytes=1000)
    await put(quarantine, 1)
    await quarantine.close()
    with closing(sqlite3.connect(tmp_path / "q.sqlite")) as old:
        old.execute("ALTER TABLE frames DROP COLUMN captured_us")
    quarantine = Quarantine(tmp_path / "q.sqlite", max_frames=3, max_bytes=1000)
    await put(quarantine, 2)
    assert [(frame.seq, frame.captured_us) for frame in await quarantine.frames()] == [(1, 0), (2, 0)]
    await quarantine.close()
