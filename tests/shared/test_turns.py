"""Order among what is finished by whoever is first."""

import asyncio

from shared.turns import Turn, Turns


async def finish(turn: Turn, done: list[str], label: str) -> None:
    await turn.come()
    done.append(label)
    turn.end()


async def test_turns_of_a_key_come_in_the_order_in_which_they_were_taken() -> None:
    turns, done = Turns(60), list[str]()
    taken = {label: turns.take(label[0]) for label in ("a1", "a2", "b1", "a3", "b2")}
    tasks = [asyncio.create_task(finish(taken[label], done, label)) for label in ("b2", "a3", "a2")]
    await asyncio.sleep(0)
    assert done == []
    await finish(taken["b1"], done, "b1")
    await tasks[0]
    assert done == ["b1", "b2"]  # another key waits for nobody of this one
    await finish(taken["a1"], done, "a1")
    await asyncio.gather(*tasks)
    assert done == ["b1", "b2", "a1", "a2", "a3"]
    assert len(turns) == 0


async def test_a_turn_that_is_given_up_lets_the_next_come_after_those_before_it() -> None:
    turns, done = Turns(60), list[str]()
    first, second, third = (turns.take("a") for _ in range(3))
    second.end()
    second.end()
    waiting = asyncio.create_task(finish(third, done, "third"))
    await asyncio.sleep(0)
    await finish(first, done, "first")
    await waiting
    assert done == ["first", "third"]
    turns.take("a").end()
    assert len(turns) == 0


async def test_a_turn_that_never_ends_holds_up_its_key_once_and_not_for_ever() -> None:
    turns, done = Turns(0.05), list[str]()
    turns.take("a")
    turns.take("a").end()
    later = [turns.take("a") for _ in range(20)]
    async with asyncio.timeout(60):
        await asyncio.gather(*(finish(turn, done, str(number)) for number, turn in enumerate(later)))
    assert done == [str(number) for number in range(20)]
