"""The short form of `bench.backlog`: two hours without a cloud, drained once, in order, in bounded memory."""

from pathlib import Path

import pytest

from bench.backlog import run


@pytest.mark.slow(reason="starts edge and cloud as fresh processes and drains hundreds of frames")
async def test_a_backlog_is_drained_once_in_order_and_the_edge_does_not_grow(tmp_path: Path) -> None:
    plot = tmp_path / "memory.svg"
    found = await run(tmp_path, hours=2, interval_s=30, cameras=2, plot=plot)
    assert found["frames"] == 480
    assert (found["doubled"], found["out_of_order"]) == (0, 0)
    assert found["edge_growth_bytes"] < 64 << 20
    assert found["cloud_growth_bytes"] < 512 << 20, "more than batches of the largest size need"
    assert plot.read_text().lstrip().startswith("<?xml")
