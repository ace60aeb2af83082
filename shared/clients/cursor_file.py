"""Where a consumer is, in a file, so that its next run goes on from there.

One line, LOG:SEQUENCE. Written beside itself, synced and renamed, so that it is never half a cursor. It names the last
event that was dealt with, and may lag behind by `every_s`: a consumer that is killed sees the last events again and
misses none.
"""

import os
import secrets
import time
from pathlib import Path

from shared.clients.types import Cursor


class CursorFile:
    """See the head of this module. Raises OSError where the file cannot be read or written."""

    def __init__(self, path: Path, *, every_s: float = 1.0) -> None:
        self.path = path
        self._every_s = every_s
        self._cursor: Cursor | None = None  # newer than the file's
        self._written_s = time.monotonic()

    def load(self) -> Cursor | None:
        """None if there is no file yet. Raises InvalidInput for a file with anything else."""
        try:
            return Cursor.parse(self.path.read_text())
        except FileNotFoundError:
            return None

    def save(self, cursor: Cursor) -> None:
        """Notes that everything up to `cursor` was dealt with; written when the last time is `every_s` ago."""
        self.note(cursor)
        if time.monotonic() - self._written_s >= self._every_s:
            self.flush()

    def note(self, cursor: Cursor) -> None:
        """As `save`, but only `flush` writes it."""
        self._cursor = cursor

    def flush(self) -> None:
        """Writes what was noted."""
        if self._cursor is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with temporary.open("x") as file:
                file.write(f"{self._cursor}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._cursor = None
        self._written_s = time.monotonic()
