"""Asking an edge for a frame again, at another quality: requests down its Upload stream, answers up.

A frame is coded anew only where the edge's operator has originals kept; whoever asks waits for a bounded time, and an
edge is asked for few frames at once, because its cameras go first.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from sightline.v1 import ingest_pb2

from cloud.detections.log import FrameName
from shared.errors import InvalidInput, Overloaded, SightlineError, Unavailable
from shared.rpc.status import from_message

_AT_ONCE = 4  # an edge answers no more


class FramesAgain:
    """Of one stream. `news` is called when there is a request to write."""

    def __init__(self, news: Callable[[], None]) -> None:
        self._news = news
        self._to_write: deque[ingest_pb2.FrameAgainRequest] = deque()
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._last_id = 0

    async def ask(self, name: FrameName, quality_steps: int, wait_s: float) -> bytes:
        """The frame in its file form (.slc). `quality_steps`: in 1/256.

        Raises Overloaded, Unavailable after `wait_s` or where the stream ends, and what the edge answers, such as
        NotFound for an original that it no longer keeps.
        """
        if len(self._asked) >= _AT_ONCE:
            raise Overloaded(f"{len(self._asked)} frames are under way from this edge for others; try again later")
        self._last_id += 1
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[self._last_id] = answered
        request = ingest_pb2.FrameAgainRequest(
            request_id=self._last_id,
            camera_id=name.camera,
            epoch=name.epoch,
            seq=name.seq,
            quality_steps=quality_steps,
        )
        self._to_write.append(request)
        self._news()
        try:
            async with asyncio.timeout(wait_s):
                return await answered
        except TimeoutError:
            raise Unavailable(f"the edge of frame {name} did not answer within {wait_s:g} s") from None
        finally:
            del self._asked[request.request_id]

    def next_request(self) -> ingest_pb2.FrameAgainRequest | None:
        return self._to_write.popleft() if self._to_write else None

    def answer(self, answer: ingest_pb2.FrameAgain) -> None:
        """What the edge said; an answer that nobody waits for any more is dropped. Raises InvalidInput for none."""
        kind = answer.WhichOneof("result")
        if kind is None:
            raise InvalidInput("expected a bitstream or an error in `again`, got neither")
        waiting = self._asked.get(answer.request_id)
        if waiting is None or waiting.done():
            return
        if kind == "bitstream":
            waiting.set_result(answer.bitstream)
        else:
            waiting.set_exception(from_message(answer.error))

    def end(self, error: SightlineError) -> None:
        """The stream is over."""
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(error)
