"""Order among things of one key that are finished by whoever is first: each comes to its turn after those before it.

    turn = turns.take(camera)     in the order that is to be kept
    await turn.come()             once all before it are over
    turn.end()                    it is over, or not needed; the next may come once those before it are over too

As a context manager a turn ends with its block, if it has not before.

Different keys never wait for each other. A turn that is never ended holds up its key once, for `patience_s`, and no
longer: order is worth that much and not a standstill.
"""

import asyncio


class Turns:
    """Belongs to one event loop. `patience_s`: the longest that a turn waits for those before it."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._last: dict[str, Turn] = {}

    def take(self, key: str) -> "Turn":
        """The turn after all that were taken of this key."""
        turn = Turn(self, key, self._last.get(key))
        self._last[key] = turn
        return turn

    def __len__(self) -> int:
        """Keys of which a turn is not over."""
        return len(self._last)

    def forget(self, key: str, turn: "Turn") -> None:
        """This turn is over; that matters where nobody came after it."""
        if self._last.get(key) is turn:
            del self._last[key]


class Turn:
    """One place in the order of its key."""

    def __init__(self, turns: Turns, key: str, before: "Turn | None") -> None:
        self._turns = turns
        self._key = key
        self._before: asyncio.Future[None] | None = None if before is None else before._over
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = False

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    async def come(self) -> None:
        """Returns once the turns before this one are over, or patience is."""
        if self._before is not None and not self._before.done():
            await asyncio.wait({self._before}, timeout=self._turns.patience_s)
        self._before = None  # whatever it still does, nobody waits for it because of this one

    def end(self) -> None:
        """Lets the next come; again does no harm."""
        if self._ended:
            return
        self._ended = True
        if self._before is None:
            self._finish()
        else:
            self._before.add_done_callback(lambda _: self._finish())

    def _finish(self) -> None:
        self._over.set_result(None)
        self._turns.forget(self._key, self)
