"""The rate controller: which quality frames get that leave it open, so that the uplink's budget is used and no more.

Three things are estimated from what passes by, none is assumed:

    scene     log of coded bits over the bundle's typical bits at that quality, smoothed over frames
    frames    frames a second that want to be delivered, smoothed over FRAMES_S
    capacity  bits a second the link carries: what the cloud says it received while frames queue for the link; while
              none do, the link can carry more than it is offered, so the estimate climbs, at most to the budget

    wanted bits a second = capacity * (1 + (target - queue) / DRAIN_S)          queue and target in s of capacity
    quality              = where the bundle's curve, moved to the scene, gives wanted / frames bits a frame

The queue is what waits for the link, or what was coded beyond the budget, whichever is more: so the budget holds on a
faster link too. What waits because the cloud is slow does not count: fewer bits would not hasten it. A short standing
queue (TARGET_S) tells a saturated link from an idle one, so a link below the budget is kept full without being told its
rate; at the budget itself the target is 0. A longer queue, such as an outage leaves, lowers the rate and so the quality
until it has drained, within the bounds. Only frames that left quality open are changed.

Times are passed in, in s of a monotonic clock; sizes are bits of both streams.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from shared.codec.types import QUALITY_STEP, Bitstream

TARGET_S = 0.3
DRAIN_S = 4.0
FRAMES_S = 2.0
RECEIVED_S = 1.0
CLIMB = 0.25  # of the capacity estimate, a second
SLOWEST, FASTEST = 0.1, 1.15  # bounds on wanted / capacity
SCENE_WEIGHT = 0.15  # of a frame
TYPICAL_BPP = (0.05, 0.1, 0.18, 0.32, 0.55, 0.84, 1.15, 1.52)  # for a bundle that does not tell its own


class Flow:
    """An amount a second, exponentially smoothed over `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._value = 0.0
        self._weight = 0.0  # how much of an average's weight has been seen: the start is not taken for silence
        self._at: float | None = None

    def add(self, amount: float, now: float) -> None:
        self._pass(now)
        self._value += amount / self._seconds

    def a_second(self, now: float) -> float:
        """The rate now; 0 before anything was seen."""
        self._pass(now)
        return self._value / max(self._weight, 0.1) if self._value else 0.0

    def _pass(self, now: float) -> None:
        if self._at is not None and now > self._at:
            kept = math.exp((self._at - now) / self._seconds)
            self._value *= kept
            self._weight = 1 - (1 - self._weight) * kept
        self._at = now if self._at is None else max(self._at, now)


def is_curve(values: Sequence[float]) -> bool:
    """Whether these can be a bundle's bits a pixel at quality 1 to 8."""
    return len(values) == 8 and values[0] > 0 and all(a < b for a, b in pairwise(values))


class RateController:
    """See the head of this module. `budget_bps`: bits a second that the uplink may use. `curve`: the bundle's typical
    bits a pixel at quality 1 to 8, ascending; only ratios matter.
    """

    def __init__(self, budget_bps: float, curve: Sequence[float] = TYPICAL_BPP) -> None:
        if not is_curve(curve):
            raise ValueError(f"curve must be 8 ascending positive numbers, got {list(curve)}")
        self.budget_bps = budget_bps
        self.capacity_bps = budget_bps
        self._curve = [math.log(value) for value in curve]
        self._scene: float | None = None
        self._frames, self._received = Flow(FRAMES_S), Flow(RECEIVED_S)
        self._frame_bits = 0.0
        self._overspent = 0.0  # bits coded beyond the budget
        self._at: float | None = None

    def on_encoded(self, quality: float, bits: int, now: float) -> None:
        """A frame for the cloud was coded."""
        seen = math.log(max(bits, 1)) - self._log_curve(quality)
        self._scene = seen if self._scene is None else self._scene + SCENE_WEIGHT * (seen - self._scene)
        self._frame_bits = bits if not self._frame_bits else self._frame_bits + SCENE_WEIGHT * (bits - self._frame_bits)
        self._frames.add(1, now)
        self._overspent += bits

    def on_received(self, bits: int, now: float) -> None:
        """The cloud told that a frame reached it."""
        self._received.add(bits, now)

    def quality(self, queued_frames: int, bounds: tuple[float, float], now: float) -> float:
        """For the next frame that leaves it open, within `bounds`, with `queued_frames` waiting for the link."""
        waiting_s = queued_frames * self._frame_bits / self.capacity_bps
        self._follow_link(waiting_s, now)
        queue_s = max(waiting_s, self._overspent / self.budget_bps)
        frames_a_second = self._frames.a_second(now)
        if self._scene is None:
            return bounds[1]
        frames_a_second = max(frames_a_second, 1 / FRAMES_S)
        target_s = TARGET_S if self.capacity_bps < 0.99 * self.budget_bps else 0.0
        share = min(FASTEST, max(SLOWEST, 1 + (target_s - queue_s) / DRAIN_S))
        return min(bounds[1], max(bounds[0], self._quality_at(self._scene_bits(frames_a_second / share))))

    def _follow_link(self, waiting_s: float, now: float) -> None:
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._overspent = max(0.0, self._overspent - self.budget_bps * elapsed)
        elapsed = min(1.0, elapsed)
        if waiting_s > TARGET_S / 2:
            received = self._received.a_second(now)
            step = min(1.0, elapsed / RECEIVED_S)
            self.capacity_bps += step * (max(received, 0.01 * self.budget_bps) - self.capacity_bps)
        else:
            self.capacity_bps *= 1 + CLIMB * elapsed
        self.capacity_bps = min(self.budget_bps, self.capacity_bps)

    def _scene_bits(self, frames_a_second: float) -> float:
        """Log of the curve's value that makes the capacity last for so many frames of this scene."""
        return math.log(self.capacity_bps / frames_a_second) - (self._scene or 0.0)

    def _log_curve(self, quality: float) -> float:
        low = min(6, int(quality) - 1)
        return self._curve[low] + (quality - 1 - low) * (self._curve[low + 1] - self._curve[low])

    def _quality_at(self, log_value: float) -> float:
        """The inverse of `_log_curve`, extended beyond both ends."""
        low = max(0, min(6, sum(value <= log_value for value in self._curve) - 1))
        return 1 + low + (log_value - self._curve[low]) / (self._curve[low + 1] - self._curve[low])


class Pacing:
    """A controller between the service and the uplink of one edge. `queued_frames` tells what waits for the link,
    `bounds` what an operator allows; `tell` is told the link's estimated bits a second and the quality chosen.
    """

    def __init__(
        self,
        controller: RateController,
        *,
        queued_frames: Callable[[], int],
        bounds: Callable[[], tuple[float, float]],
        tell: Callable[[float, float], None],
    ) -> None:
        self._controller, self._queued_frames, self._bounds, self._tell = controller, queued_frames, bounds, tell

    def quality(self) -> float:
        """For a frame that leaves it open."""
        chosen = self._controller.quality(self._queued_frames(), self._bounds(), time.monotonic())
        self._tell(self._controller.capacity_bps, chosen)
        return chosen

    def on_spooled(self, bits: Bitstream) -> None:
        """A frame will be sent."""
        size = 8 * (len(bits.hyper) + len(bits.latents))
        self._controller.on_encoded(bits.quality / QUALITY_STEP, size, time.monotonic())

    def on_received(self, size_bytes: int) -> None:
        """The cloud has a frame of so many bytes."""
        self._controller.on_received(8 * size_bytes, time.monotonic())
