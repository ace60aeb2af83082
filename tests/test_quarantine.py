"""What the cloud rejects is kept on both sides, shown by `sightline quarantine`, and delivered again after a fix."""

import asyncio
import sys
from pathlib import Path

import pytest
from sightline.v1 import common_pb2, edge_pb2

from shared.codec.bitstream import from_bytes
from shared.codec.codec import Codec
from shared.quarantine import Quarantined
from tests.cloud.harness import red_frame
from tests.house import house, send


async def quarantine(address: str, *arguments: str) -> tuple[int | None, str]:
    """`sightline quarantine` in a process of its own: exit code, and what it printed."""
    command = ["-m", "cli.main", "quarantine", "--address", address, *arguments]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_a_rejected_frame_is_listed_on_both_sides_and_replayed_once_after_the_fix(
    tmp_path: Path, codec: Codec
) -> None:
    async with house(tmp_path, codec) as (edge, cloud):
        receipt = await send(edge, red_frame(), edge_pb2.DELIVERY_PERSISTED)
        assert receipt.outcome == common_pb2.OUTCOME_REJECTED
        at_edge, at_cloud = f"127.0.0.1:{edge.server.admin_port}", f"127.0.0.1:{cloud.server.admin_port}"
        name = f"gate/{receipt.frame.epoch:016x}/{receipt.frame.seq}"
        for address in (at_edge, at_cloud):
            code, listed = await quarantine(address, "list")
            assert code == 0, listed
            assert name in listed
            assert "cannot look at red pictures" in listed
        code, out = await quarantine(at_cloud, "fetch", "-o", str(tmp_path / "out"))
        [saved] = (tmp_path / "out").iterdir()
        assert (code, out.strip()) == (0, str(saved))
        assert from_bytes(saved.read_bytes(), [codec.model_id]).width == 64

        cloud.spot.fears_red = False
        code, said = await quarantine(at_edge, "replay", "--all")
        assert code == 0, said
        [kept] = await cloud.quarantine.frames()
        again = f"gate/{kept.replay_epoch:016x}/{receipt.frame.seq}"
        assert said.strip() == f"{name} -> {again}: sent"
        # The cloud's own replay waits for the record, whichever of the two was first, and makes no second one.
        assert await quarantine(at_cloud, "replay", name) == (0, f"{name} -> {again}: detections\n")
        code, said = await quarantine(at_cloud, "replay", name)
        assert code == 1
        assert "no frame" in said
        events = await cloud.events()
    assert [(e.frame.epoch, e.outcome) for e in events] == [
        (receipt.frame.epoch, common_pb2.OUTCOME_REJECTED),
        (kept.replay_epoch, common_pb2.OUTCOME_DETECTIONS),
    ]
    assert events[0].capture_time == events[1].capture_time
    assert events[1].edge_id == "north"


async def test_what_is_rejected_again_is_kept_again_under_its_new_name(tmp_path: Path, codec: Codec) -> None:
    async with house(tmp_path, codec) as (edge, cloud):
        await send(edge, red_frame(), edge_pb2.DELIVERY_PERSISTED)
        [first] = await cloud.quarantine.frames()
        address = f"127.0.0.1:{cloud.server.admin_port}"
        code, said = await quarantine(address, "replay", "--all")
        assert (code, "rejected" in said) == (0, True)
        [second] = await cloud.quarantine.frames()
        assert (second.epoch, second.seq, second.bitstream) == (first.replay_epoch, first.seq, first.bitstream)
        assert second.captured_us == first.captured_us


@pytest.mark.parametrize("arguments", [("replay",), ("replay", "gate/xyz/1")])
async def test_what_is_not_a_frames_name_is_said(arguments: tuple[str, ...]) -> None:
    code, said = await quarantine("127.0.0.1:1", *arguments)
    assert code == 1
    assert "expected" in said


def test_a_replays_name_follows_from_the_first_and_meets_no_other() -> None:
    def kept(camera: str, epoch: int, seq: int) -> Quarantined:
        return Quarantined(1, camera, epoch, seq, 0, 0, "", "", None)  # type: ignore[arg-type]

    names = [(camera, epoch, seq) for camera in ("a", "b") for epoch in (0, 1 << 63) for seq in (1, 2)]
    epochs = {kept(*name).replay_epoch for name in names}
    assert len(epochs) == len(names)
    assert kept("a", 0, 1).replay_epoch == kept("a", 0, 1).replay_epoch < 1 << 64
