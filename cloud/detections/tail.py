"""The newest records of a log, kept in memory: consumers that follow cause no reads."""

import bisect
from collections import deque
from collections.abc import Iterable

from cloud.detections.log import Record

MAX_RECORDS = 4096
MAX_BYTES = 16 << 20


class Tail:
    """An unbroken run of records up to the newest, bounded in count and bytes."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()
        self._bytes = 0

    @property
    def oldest(self) -> int | None:
        """The first sequence held, None if there is none."""
        return self._records[0].sequence if self._records else None

    def extend(self, records: Iterable[Record]) -> None:
        """Adds what follows the newest record held, and lets go of the oldest beyond the bounds."""
        for record in records:
            self._records.append(record)
            self._bytes += len(record.event)
        while self._records and (len(self._records) > MAX_RECORDS or self._bytes > MAX_BYTES):
            self._bytes -= len(self._records.popleft().event)

    def forget_through(self, sequence: int) -> None:
        """Lets go of records up to and with `sequence`."""
        while self._records and self._records[0].sequence <= sequence:
            self._bytes -= len(self._records.popleft().event)

    def read(self, after: int, limit: int) -> list[Record] | None:
        """At most `limit` records that follow `after`, or None where the first of them is not held."""
        if not self._records or after < self._records[0].sequence - 1:
            return None
        start = bisect.bisect_right(self._records, after, key=lambda record: record.sequence)
        return [self._records[i] for i in range(start, min(start + limit, len(self._records)))]
