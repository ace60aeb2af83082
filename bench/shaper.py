"""A link of a given rate: a TCP proxy in front of a port, with a token bucket in the direction of the port.

Over any time longer than `BURST_S` it carries its rate, also where this process is late. What it has not let through
waits in a buffer of `BUFFER_BYTES`, as a modem's queue does, then in the sender's socket and so in the sender. The way
back is not limited.
"""

import asyncio
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

BUFFER_BYTES = 32 << 10
STEP_BYTES = 4096
BURST_S = 0.05


class Shaper:
    """An async context manager. `port` is where to connect. `rate_bps` may be changed at any time."""

    def __init__(self, target_port: int, rate_bps: float) -> None:
        self.rate_bps = rate_bps
        self.passed_bytes = 0
        self.port = 0
        self._target = target_port
        self._free_at = 0.0  # when the link has carried what was given to it
        self._writers: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0))
        # Set before listening, so that the window is small from the first byte on.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._server = await asyncio.start_server(self._carry, sock=listening, limit=STEP_BYTES)
        self.port = listening.getsockname()[1]
        return self

    async def __aexit__(self, *_: BaseException | type[BaseException] | TracebackType | None) -> None:
        self._server.close()
        for writer in self._writers:  # its reader hears of it, and ends what carries
            writer.transport.abort()
        if self._carrying:
            await asyncio.wait(self._carrying)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None  # noqa: S101 - a coroutine runs in a task
        self._carrying.add(this)
        self._writers.add(writer)
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        down = asyncio.create_task(_pass_all(there, writer))
        try:
            while data := await reader.read(STEP_BYTES):
                now = time.monotonic()
                self._free_at = max(now - BURST_S, self._free_at) + 8 * len(data) / self.rate_bps
                if self._free_at > now:
                    await asyncio.sleep(self._free_at - now)
                back.write(data)
                await back.drain()
                self.passed_bytes += len(data)
        except ConnectionError:
            pass
        finally:
            down.cancel()
            back.close()
            writer.close()
            self._writers.discard(writer)
            self._carrying.discard(this)


async def _pass_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
