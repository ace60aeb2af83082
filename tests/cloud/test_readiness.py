"""The cloud's readiness follows its log and its disk, and it waits for a disk that comes late."""

import asyncio
import json
import os
import subprocess
import time
from pathlib import Path

from sightline.v1 import ingest_pb2

from cloud.pipeline import LogFailure
from cloud.readiness import DiskCheck, LogCheck
from shared.codec.types import Bitstream
from tests.cloud.harness import RunningCloud
from tests.cloud.test_server import start
from tests.edge.test_server import free_port, page


async def test_a_log_that_cannot_be_written_is_a_problem_until_a_write_succeeds(
    cloud: RunningCloud, spot: Bitstream
) -> None:
    check = LogCheck(cloud.log, cloud.pipeline, cloud.settings.data_dir)
    assert await check() == ""
    pages = cloud.log._db.execute("PRAGMA page_count").fetchone()[0]
    cloud.log._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL as on a full disk
    async with cloud.edge() as edge:
        seq = 0
        while (await edge.deliver("gate", seq, spot)).state == ingest_pb2.ACK_STATE_PERSISTED:  # fills the last page
            seq += 1
        assert "cannot be written" in await check()
        cloud.log._db.execute("PRAGMA max_page_count = 1000000")
        for _ in range(100):
            await asyncio.sleep(0.1)  # a tenth of the pause in which frames are sent away after a failed write
            if (await edge.deliver("gate", seq, spot)).state == ingest_pb2.ACK_STATE_PERSISTED:
                break
    assert await check() == ""


async def test_without_frames_a_write_of_its_own_tells_that_the_disk_is_back(cloud: RunningCloud) -> None:
    """Where nobody sends because the replica is not ready, no frame could show that the log works again."""
    check = LogCheck(cloud.log, cloud.pipeline, cloud.settings.data_dir)
    cloud.pipeline.log_failure = LogFailure("the disk was full", time.monotonic())
    assert await check() == "the disk was full"  # too early for another attempt
    long_ago = time.monotonic() - 60
    cloud.pipeline.log_failure = LogFailure("the disk was full", long_ago)
    assert await check() == ""
    assert not (cloud.settings.data_dir / "readiness.trial").exists()
    cloud.pipeline.log_failure = LogFailure("the disk was full", long_ago)
    elsewhere = LogCheck(cloud.log, cloud.pipeline, cloud.settings.data_dir / "not-there")
    assert "the disk cannot be written" in await elsewhere()


async def test_a_disk_without_room_is_a_problem(tmp_path: Path) -> None:
    assert await DiskCheck(tmp_path)() == ""
    assert f"MiB free in {tmp_path}, got" in await DiskCheck(tmp_path, min_free_bytes=1 << 60)()
    assert "got nan MiB" in await DiskCheck(tmp_path / "not-there")()


async def test_a_cloud_without_its_disk_lives_says_so_and_begins_when_it_comes(
    tmp_path: Path, models: dict[str, str]
) -> None:
    mount = tmp_path / "mount"
    mount.write_text("no folder, as a disk that is not there")
    port = free_port()
    values = {
        **models,
        "listen": "127.0.0.1:0",
        "metrics_listen": f"127.0.0.1:{port}",
        "data_dir": str(mount / "cloud"),
        "threads": "1",
        "log_format": "json",
    }
    popen: subprocess.Popen[str] = start(
        {**os.environ, **{f"SIGHTLINE_CLOUD_{name.upper()}": value for name, value in values.items()}},
        stderr=subprocess.PIPE,
    )
    try:
        assert popen.stdout is not None
        assert popen.stderr is not None
        while json.loads(await asyncio.to_thread(popen.stderr.readline))["message"] != "waiting for the log":
            pass
        assert await asyncio.to_thread(page, port, "/healthz") == (200, "ok\n")
        code, said = await asyncio.to_thread(page, port, "/readyz")
        assert (code, said.partition(" ")[0]) == (503, "log:")
        mount.unlink()
        mount.mkdir()
        assert json.loads(await asyncio.to_thread(popen.stdout.readline))["ready"]
        assert await asyncio.to_thread(page, port, "/readyz") == (200, "ok\n")
        popen.terminate()
        await asyncio.to_thread(popen.communicate, timeout=60)
        assert popen.returncode == 0
    finally:
        popen.kill()
        popen.communicate()
