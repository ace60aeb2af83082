"""Whether a picture shows something new: a gate before the encoder, for cameras that mostly look at nothing.

A picture is averaged down to a grid of cells of about 8x8 pixels and compared with the last picture that was let
through, so that what changes slowly is let through in time. The median difference is taken off first: clouds and
a camera's exposure change all cells alike. Averaging over a cell divides the sensor's noise by eight, so that a
threshold of a few levels is far above it.
"""

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

CELL_PIXELS = 8
CELL_LEVELS = 6.0


class MotionGate:
    """`share`: of the cells, in (0, 1], that must differ by more than CELL_LEVELS of 255. `refresh_s`: let a picture
    through after this many seconds whatever it shows, so that silence means a camera that is gone; 0: never."""

    def __init__(self, share: float, refresh_s: float) -> None:
        self._share = share
        self._refresh_s = refresh_s
        self._scaler = VideoReformatter()
        self._last: NDArray[np.float32] | None = None
        self._last_s = 0.0

    def opens(self, frame: av.VideoFrame, time_s: float) -> bool:
        """Whether to let `frame` through; `time_s` rises by the source's clock."""
        grid = self._grid(frame)
        due = self._refresh_s > 0 and time_s - self._last_s >= self._refresh_s
        if self._last is not None and not due and changed_share(self._last, grid) < self._share:
            return False
        self._last, self._last_s = grid, time_s
        return True

    def _grid(self, frame: av.VideoFrame) -> NDArray[np.float32]:
        width = max(1, round(frame.width / CELL_PIXELS))
        height = max(1, round(frame.height / CELL_PIXELS))
        small = self._scaler.reformat(frame, width, height, "gray", interpolation="AREA")
        return small.to_ndarray().astype(np.float32)


def changed_share(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Share in [0, 1] of cells that differ by more than CELL_LEVELS beyond the median difference; 1 if the sizes do."""
    if before.shape != after.shape:
        return 1.0
    difference = after - before
    difference -= np.median(difference)
    return float(np.mean(np.abs(difference) > CELL_LEVELS))
