"""Finding events: newest first by walking the log backwards, or onwards from one for replay.

The log is read in order of sequence and has no index by camera or class, so a search looks at records, a bounded number
a request, and says how far it came; the page asks on. Parsing goes to a thread.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloud.console.views import of_event
from cloud.detections.log import DetectionLog, Record
from cloud.detections.subscribe import EventFilter
from shared.errors import CursorExpired

_WINDOW = 256  # records read at once
_MAX_SCANNED = 8192  # records looked at in one request


@dataclass(frozen=True, slots=True)
class Found:
    """`next`: where to search on (before or after it), None at the end. `scanned`: records looked at."""

    events: list[dict[str, Any]]
    next: int | None
    scanned: int


async def before(
    log: DetectionLog, event_filter: EventFilter, *, sequence: int | None, since_ns: int, until_ns: int, limit: int
) -> Found:
    """The last `limit` events below `sequence` (None: from the end), logged in [since_ns, until_ns], newest first."""
    span = await log.span()
    high = span.newest if sequence is None else min(sequence - 1, span.newest)
    if until_ns:
        high = min(high, await log.position_at(until_ns + 1))
    events: list[dict[str, Any]] = []
    scanned = 0
    while high >= span.oldest and scanned < _MAX_SCANNED:
        low = max(span.oldest - 1, high - _WINDOW)
        try:
            records = [record for record in await log.read(low, _WINDOW) if record.sequence <= high]
        except CursorExpired:  # retention went on meanwhile
            return Found(events, None, scanned)
        scanned += len(records)
        found, last = await asyncio.to_thread(_matching, records[::-1], event_filter, since_ns, limit - len(events))
        events += found
        if last is not None:
            return Found(events, None if last < 0 else last, scanned)
        high = low
    return Found(events, high + 1 if high >= span.oldest else None, scanned)


async def after(log: DetectionLog, event_filter: EventFilter, *, sequence: int, limit: int) -> Found:
    """The first `limit` events above `sequence`, oldest first."""
    span = await log.span()
    position = max(sequence, span.oldest - 1)
    events: list[dict[str, Any]] = []
    scanned = 0
    while scanned < _MAX_SCANNED:
        records = await log.read(position, _WINDOW)
        if not records:
            return Found(events, None, scanned)
        scanned += len(records)
        found, last = await asyncio.to_thread(_matching, records, event_filter, 0, limit - len(events))
        events += found
        if last is not None:
            return Found(events, last, scanned)
        position = records[-1].sequence
    return Found(events, position, scanned)


def _matching(
    records: Sequence[Record], event_filter: EventFilter, since_ns: int, limit: int
) -> tuple[list[dict[str, Any]], int | None]:
    """At most `limit` of `records` that pass. The number says why it ended before their end: -1 for a record older than
    `since_ns`, else the sequence of the last one taken."""
    events: list[dict[str, Any]] = []
    for record in records:
        if record.logged_ns < since_ns:
            return events, -1
        event = event_filter.apply(record)
        if event is not None:
            events.append(of_event(event, record))
            if len(events) >= limit:
                return events, record.sequence
    return events, None
