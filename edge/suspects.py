"""Frames that may be what the cloud dies of, told apart so that one of them cannot stop all that wait behind it.

A frame that makes the cloud fall over is sent again on the next stream, and so on for ever, with all that was sent
beside it. So for each frame the lost streams are counted that it was on:

    `after` losses        sent alone: nothing else is under way, so that the next loss is its own
    ALONE_LOSSES alone    given up: the cloud is told REJECTED instead of the frame, which goes into quarantine

Only losses count that a frame can be to blame for. The cloud had it (RECEIVED) when the stream broke, or ended the
stream with an error about what was sent. A line that breaks before the cloud has a frame, a cloud that is not there, is
silent or drains blame nobody, however often it happens. What is counted is only in memory: an edge that is started
again asks the same question again.
"""

from collections.abc import Iterable

ALONE_LOSSES = 3
_ABOUT_WHAT_WAS_SENT = ("invalid_argument", "resource_exhausted", "unknown")
_BROKEN = ("unavailable", "cancelled", "internal", "aborted", "unknown")


class Suspects:
    """Counts by frame id. `after`: losses until a frame is sent alone; 0: none ever is."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._losses: dict[int, int] = {}
        self._alone: dict[int, int] = {}

    def lost(self, end: str, in_flight: Iterable[tuple[int, bool]]) -> list[int]:
        """A stream ended, by status name or how else; `in_flight`: ids, and whether the cloud said RECEIVED.

        Returns what is to be given up from now on.
        """
        sent = list(in_flight)
        given_up = []
        for frame_id, received in sent:
            if not (end in _ABOUT_WHAT_WAS_SENT or (received and end in _BROKEN)):
                continue
            if len(sent) == 1 and self.is_suspect(frame_id):
                self._alone[frame_id] = self._alone.get(frame_id, 0) + 1
                if self._alone[frame_id] == ALONE_LOSSES:
                    given_up.append(frame_id)
            self._losses[frame_id] = self._losses.get(frame_id, 0) + 1
        return given_up

    def is_suspect(self, frame_id: int) -> bool:
        """To be sent alone."""
        return 0 < self._after <= self._losses.get(frame_id, 0)

    def is_given_up(self, frame_id: int) -> bool:
        """Not to be sent any more."""
        return self._alone.get(frame_id, 0) >= ALONE_LOSSES

    def forget(self, frame_id: int) -> None:
        """It has its final acknowledgement."""
        self._losses.pop(frame_id, None)
        self._alone.pop(frame_id, None)

    def __len__(self) -> int:
        return len(self._losses)
