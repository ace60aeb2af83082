"""The batcher's promises, with a runner that waits for the test to let it go on."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.batching import Batcher, BatchLimits
from shared.errors import Overloaded

LIMITS = BatchLimits(max_batch=4, max_delay_s=0.0, max_waiting=100, max_waiting_camera=50)


class Runner:
    """Remembers the batches it was given; while `gate` is closed it holds the one it has. Fails on "poison"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()

    async def __call__(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        self.entered.set()
        await self.gate.wait()
        if "poison" in items:
            raise ValueError("cannot run poison")
        return [item.upper() for item in items]


async def started(limits: BatchLimits = LIMITS) -> tuple[Batcher[str, str], Runner]:
    runner = Runner()
    batcher = Batcher(runner, limits)
    batcher.start()
    return batcher, runner


async def occupied(limits: BatchLimits = LIMITS) -> tuple[Batcher[str, str], Runner, "asyncio.Task[object]"]:
    """A batcher whose runner is held with one frame, so that what is submitted next waits."""
    batcher, runner = await started(limits)
    runner.gate.clear()
    first = asyncio.create_task(batcher.submit("first", "s", "first"))
    await runner.entered.wait()
    return batcher, runner, first


def submit(
    batcher: Batcher[str, str], camera: str, count: int, shape: str = "s", cost: float = 1
) -> "list[asyncio.Task]":
    return [asyncio.create_task(batcher.submit(camera, shape, f"{camera}{i}", cost)) for i in range(count)]


async def test_an_idle_runner_takes_a_frame_at_once_whatever_the_delay() -> None:
    batcher, runner = await started(BatchLimits(4, max_delay_s=60, max_waiting=9, max_waiting_camera=9))
    async with asyncio.timeout(5):
        batched = await batcher.submit("a", "s", "x")
        assert (batched.result, batched.batch_size) == ("X", 1)
        await asyncio.sleep(0)  # the runner turns idle again
        assert (await batcher.submit("a", "s", "y")).result == "Y"
    assert runner.batches == [["x"], ["y"]]
    await batcher.close()


async def test_frames_that_came_meanwhile_are_run_together_up_to_the_limit() -> None:
    batcher, runner, first = await occupied()
    waiting = submit(batcher, "a", 6)
    await asyncio.sleep(0)
    runner.gate.set()
    results = await asyncio.gather(first, *waiting)
    assert runner.batches == [["first"], ["a0", "a1", "a2", "a3"], ["a4", "a5"]]
    assert [r.batch_size for r in results] == [1, 4, 4, 4, 4, 2, 2]
    await batcher.close()


async def test_only_frames_of_one_shape_share_a_batch() -> None:
    batcher, runner, first = await occupied()
    waiting = submit(batcher, "a", 2, "small") + submit(batcher, "b", 2, "large")
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *waiting)
    assert runner.batches[1:] == [["a0", "a1"], ["b0", "b1"]]
    await batcher.close()


async def test_a_busy_runner_holds_a_batch_until_it_is_full_but_not_longer_than_the_delay() -> None:
    batcher, runner, first = await occupied(BatchLimits(4, max_delay_s=60, max_waiting=99, max_waiting_camera=99))
    waiting = submit(batcher, "a", 2)
    await asyncio.sleep(0)
    runner.gate.set()
    await first
    await asyncio.sleep(0.05)
    assert len(runner.batches) == 1
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting, *submit(batcher, "b", 2))
    assert sorted(runner.batches[1]) == ["a0", "a1", "b0", "b1"]
    await batcher.close()

    batcher, runner, first = await occupied(BatchLimits(4, max_delay_s=0.05, max_waiting=99, max_waiting_camera=99))
    waiting = submit(batcher, "a", 2)
    await asyncio.sleep(0)
    runner.gate.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    assert runner.batches[1] == ["a0", "a1"]
    await batcher.close()


async def test_a_camera_with_ten_times_the_frames_waits_behind_its_own() -> None:
    batcher, runner, first = await occupied()
    flood = submit(batcher, "flood", 40)
    await asyncio.sleep(0)
    others = submit(batcher, "b", 4) + submit(batcher, "c", 4)
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *others, *flood)
    served = [item for batch in runner.batches for item in batch]
    last_of_others = max(served.index(item) for item in ("b3", "c3"))
    assert last_of_others <= 1 + 3 * 4  # all that is behind it: the first, and four rounds of three cameras
    assert [item for item in served if item.startswith("flood")] == [f"flood{i}" for i in range(40)]
    await batcher.close()


async def test_a_flood_of_one_shape_does_not_starve_another_shape() -> None:
    batcher, runner, first = await occupied()
    flood = submit(batcher, "flood", 40, "small")
    await asyncio.sleep(0)
    other = submit(batcher, "b", 1, "large")
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *other, *flood)
    assert [batch[0] for batch in runner.batches].index("b0") <= 2
    await batcher.close()


async def test_costs_share_the_work_and_not_the_frames() -> None:
    batcher, runner, first = await occupied(BatchLimits(1, 0.0, 100, 100))
    big, small = submit(batcher, "big", 5, "l", cost=10), submit(batcher, "small", 50, "s", cost=1)
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *big, *small)
    served = [batch[0] for batch in runner.batches[1:]]
    before_last_big = served[: served.index("big4")]
    assert 35 <= sum(item.startswith("small") for item in before_last_big) <= 45
    await batcher.close()


async def test_a_frame_that_cannot_be_run_fails_alone() -> None:
    batcher, runner, first = await occupied()
    good = submit(batcher, "a", 3)
    bad = asyncio.create_task(batcher.submit("p", "s", "poison"))
    await asyncio.sleep(0)
    runner.gate.set()
    results = await asyncio.gather(first, *good, bad, return_exceptions=True)
    assert [r.result for r in results[:4]] == ["FIRST", "A0", "A1", "A2"]
    assert isinstance(results[4], ValueError)
    assert (await batcher.submit("a", "s", "next")).result == "NEXT"
    await batcher.close()


async def test_a_frame_can_be_answered_with_an_exception_without_holding_up_its_batch() -> None:
    async def run(items: Sequence[str]) -> list[str | Exception]:
        return [KeyError(item) if item == "bad" else item for item in items]

    batcher: Batcher[str, str] = Batcher(run, LIMITS)
    batcher.start()
    good, bad = await asyncio.gather(
        batcher.submit("a", "s", "good"), batcher.submit("b", "s", "bad"), return_exceptions=True
    )
    assert good.result == "good"
    assert isinstance(bad, KeyError)
    await batcher.close()


async def test_a_batch_is_bounded_by_cost_and_a_dearer_frame_runs_alone() -> None:
    batcher, runner, first = await occupied(BatchLimits(4, 0.0, 100, 100, max_cost=10))
    waiting = submit(batcher, "a", 1, cost=99) + submit(batcher, "b", 4, cost=5)
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *waiting)
    assert runner.batches[1:] == [["a0"], ["b0", "b1"], ["b2", "b3"]]
    await batcher.close()


async def test_a_second_lane_takes_a_batch_while_the_first_is_under_way() -> None:
    batcher, runner, first = await occupied(BatchLimits(4, 0.0, 100, 100, lanes=2))
    waiting = submit(batcher, "a", 6)
    await asyncio.sleep(0.05)
    assert runner.batches == [["first"], ["a0", "a1", "a2", "a3"]]
    runner.gate.set()
    await asyncio.gather(first, *waiting)
    assert runner.batches[2] == ["a4", "a5"]
    await batcher.close()


async def test_no_room_is_overloaded_in_all_and_for_one_camera() -> None:
    batcher, runner, first = await occupied(BatchLimits(4, 0.0, max_waiting=5, max_waiting_camera=3))
    waiting = submit(batcher, "a", 3)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="one camera is 3"):
        await batcher.submit("a", "s", "x")
    waiting += submit(batcher, "b", 2)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="limit is 5"):
        await batcher.submit("c", "s", "x")
    runner.gate.set()
    await asyncio.gather(first, *waiting)
    assert (await batcher.submit("a", "s", "x")).result == "X"
    await batcher.close()


async def test_a_frame_nobody_waits_for_any_more_is_not_run() -> None:
    batcher, runner, first = await occupied()
    waiting = submit(batcher, "a", 3)
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    assert runner.batches[1] == ["a0", "a2"]
    assert batcher.waiting == 0
    await batcher.close()


async def test_closing_leaves_nobody_waiting() -> None:
    batcher, _, first = await occupied()
    waiting = [first, *submit(batcher, "a", 3)]
    await asyncio.sleep(0)
    await batcher.close()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["s", "m", "l"]), st.integers(1, 9)), max_size=60
    ),
    max_batch=st.integers(1, 5),
)
def test_every_frame_gets_its_own_result_once_and_cameras_stay_in_order(
    frames: list[tuple[str, str, int]], max_batch: int
) -> None:
    async def scenario() -> None:
        batcher, runner, first = await occupied(BatchLimits(max_batch, 0.0, 100, 100))
        names = [f"{camera}:{shape}:{i}" for i, (camera, shape, _) in enumerate(frames)]
        tasks = [
            asyncio.create_task(batcher.submit(camera, shape, name, cost))
            for name, (camera, shape, cost) in zip(names, frames, strict=True)
        ]
        await asyncio.sleep(0)
        runner.gate.set()
        results = await asyncio.gather(first, *tasks)
        assert [r.result for r in results[1:]] == [name.upper() for name in names]
        served = [item for batch in runner.batches[1:] for item in batch]
        assert sorted(served) == sorted(names)
        assert all(
            len(batch) <= max_batch and len({i.split(":")[1] for i in batch}) == 1 for batch in runner.batches[1:]
        )
        for camera in "abcd":
            for shape in "sml":
                mine = [int(item.split(":")[2]) for item in served if item.startswith(f"{camera}:{shape}:")]
                assert mine == sorted(mine)
        await batcher.close()

    asyncio.run(scenario())
