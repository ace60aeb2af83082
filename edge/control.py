"""What an operator changed at run time and wants to find after a restart: paused cameras and bounds of quality.

Kept in one small JSON file of the data folder, written whole, fsynced and renamed before the change takes effect. A
file that cannot be read stops the start: a camera that was paused for a reason must not begin to send because of it.
"""

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from edge.settings import NAME_PATTERN
from shared.codec.types import quality_to_steps
from shared.errors import InvalidInput, InvalidQuality, InvalidSettings, Paused, TooLarge

_CameraId = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
MAX_PAUSED = 4096


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    paused: frozenset[_CameraId] = frozenset()
    lowest_quality: float = Field(default=1.0, ge=1, le=8)
    highest_quality: float = Field(default=8.0, ge=1, le=8)


@dataclass(slots=True)
class Seen:
    """Of one camera: receipts since the start, and when its last picture came, seconds since 1970."""

    frames: int = 0
    last_s: float = 0.0


class Control:
    """See the head of this module. `max_cameras`: those seen longest ago are forgotten first."""

    def __init__(self, path: Path, max_cameras: int) -> None:
        """Raises InvalidSettings for a file that cannot be read."""
        self._path = path
        self._max_cameras = max_cameras
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        try:
            self._file = _File.model_validate_json(path.read_bytes()) if path.exists() else _File()
        except (OSError, ValidationError) as error:
            raise InvalidSettings(
                f"{path} must hold what operators changed (paused cameras, bounds of quality), got: {error}; mend it, "
                "or remove it to resume every camera"
            ) from None

    @property
    def paused(self) -> frozenset[str]:
        return self._file.paused

    @property
    def quality_bounds(self) -> tuple[float, float]:
        """Lowest and highest quality, in [1, 8]."""
        return self._file.lowest_quality, self._file.highest_quality

    def clamp(self, quality: float) -> float:
        """The nearest quality within the bounds."""
        lowest, highest = self.quality_bounds
        return min(max(quality, lowest), highest)

    def require_running(self, camera_id: str) -> None:
        """Raises Paused."""
        if camera_id in self._file.paused:
            raise Paused(f"camera {camera_id!r} is paused by an operator; it may send again once it is resumed")

    def saw(self, camera_id: str) -> None:
        """A picture of a camera was answered with a receipt."""
        seen = self._seen.setdefault(camera_id, Seen())
        self._seen.move_to_end(camera_id)
        seen.frames += 1
        seen.last_s = time.time()
        if len(self._seen) > self._max_cameras:
            self._seen.popitem(last=False)

    def cameras(self) -> dict[str, Seen]:
        """Seen and paused cameras, by name."""
        return {name: self._seen.get(name, Seen()) for name in sorted({*self._seen, *self._file.paused})}

    def pause(self, camera_id: str) -> None:
        """Raises InvalidInput for what no camera can be called, TooLarge where too many are paused, OSError."""
        if len(self._file.paused) >= MAX_PAUSED:
            raise TooLarge(f"expected at most {MAX_PAUSED} paused cameras")
        self._change(paused=self._file.paused | {camera_id})

    def resume(self, camera_id: str) -> None:
        """Raises OSError."""
        self._change(paused=self._file.paused - {camera_id})

    def set_quality_bounds(self, lowest: float, highest: float) -> None:
        """Raises InvalidQuality, OSError."""
        quality_to_steps(lowest)
        quality_to_steps(highest)
        if lowest > highest:
            raise InvalidQuality(f"expected lowest <= highest quality, got {lowest:g} and {highest:g}")
        self._change(lowest_quality=lowest, highest_quality=highest)

    def _change(self, **fields: object) -> None:
        try:
            changed = _File.model_validate({**self._file.model_dump(), **fields})
        except ValidationError as error:
            raise InvalidInput(f"expected the name of a camera: {error.errors()[0]['msg']}") from None
        partial = self._path.with_name(self._path.name + ".partial")
        with partial.open("w") as out:
            out.write(changed.model_dump_json())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._file = changed
