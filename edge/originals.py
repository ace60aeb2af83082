"""Original pictures, kept in memory for a moment so that a person can ask for a frame again at a higher quality.

Off unless the operator switches it on (`originals_max_bytes`): an edge that keeps no originals cannot be asked for any.
Bounded by bytes and by age, oldest out first; in memory only, so that they are gone with the process and never on disk.
What is kept is the picture as it came, a JPEG for most cameras, not its pixels.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from edge.engine import Encoded, Engine, Rate
from edge.images import ImageFile, RawPicture
from edge.models import Models
from edge.spool_rows import FrameName
from shared.codec.types import QUALITY_STEP
from shared.errors import NotFound
from shared.logs import frame_id


class Originals:
    """One event loop's. `max_age_s`: seconds after which a picture is no longer given out."""

    def __init__(self, max_bytes: int, max_age_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock_s = clock_s
        self._kept: OrderedDict[FrameName, tuple[float, ImageFile | RawPicture]] = OrderedDict()
        self.bytes_kept = 0

    @property
    def on(self) -> bool:
        """The operator allows it."""
        return self._max_bytes > 0

    def keep(self, name: FrameName, picture: ImageFile | RawPicture) -> None:
        """Takes a picture that was spooled as `name`; makes room for it."""
        if not self.on or name in self._kept:
            return
        self._kept[name] = (self._clock_s(), picture)
        self.bytes_kept += len(picture.data)
        self._drop_old()
        while self.bytes_kept > self._max_bytes:
            self._drop_oldest()

    def find(self, name: FrameName) -> ImageFile | RawPicture:
        """Raises NotFound."""
        self._drop_old()
        if name not in self._kept:
            frame = frame_id(name.camera_id, name.epoch, name.seq)
            raise NotFound(
                f"the original of frame {frame} is not here; originals are kept for at most {self._max_age_s:g} s and "
                f"{self._max_bytes} bytes"
            )
        return self._kept[name][1]

    def _drop_old(self) -> None:
        oldest_s = self._clock_s() - self._max_age_s
        while self._kept and next(iter(self._kept.values()))[0] < oldest_s:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, picture) = self._kept.popitem(last=False)
        self.bytes_kept -= len(picture.data)


async def code_again(
    originals: Originals, engine: Engine, models: Models, name: FrameName, quality_steps: int
) -> Encoded:
    """The frame coded anew with the default bundle. Raises NotFound, InvalidQuality, Overloaded."""
    picture = originals.find(name)
    model_id = models.default
    with models.using(model_id):
        async with engine.admitted(picture, wait=False):  # cameras go first
            return await engine.encode(picture, model_id, Rate(quality=quality_steps / QUALITY_STEP))
