"""A frame of the log once more, for a person: decoded from what was kept, or coded anew by its edge.

as it was seen     name -> kept bitstream -> decoded in turn with the cameras' frames -> picture
at another quality name -> its record -> its edge -> Upload stream -> coded anew from the original -> decoded
"""

from dataclasses import dataclass

from sightline.v1 import detection_pb2

from cloud.detections.log import DetectionLog, FrameName
from cloud.inference import Inference
from cloud.ingest import IngestService
from cloud.kept import KeptFrames
from shared.codec.bitstream import from_bytes
from shared.codec.types import Bitstream, Frame
from shared.errors import CursorExpired, NotFound, Overloaded

WAIT_S = 15.0  # for an edge
_CALLER = "review"  # whose turn it takes among the cameras
_MAX_WAITING = 16  # reviews decoded at once; people wait, cameras do not


@dataclass(frozen=True, slots=True)
class Reviewed:
    """The picture, and the bitstream that it was decoded from."""

    frame: Frame
    bitstream: Bitstream


class Reviewer:
    """Reads kept frames and asks edges. `max_pixels`: of a frame that an edge sends again."""

    def __init__(
        self, log: DetectionLog, inference: Inference, kept: KeptFrames, ingest: IngestService, max_pixels: int
    ) -> None:
        self.kept = kept
        self._log = log
        self._inference = inference
        self._ingest = ingest
        self._max_pixels = max_pixels
        self._waiting = 0

    async def as_seen(self, name: FrameName) -> Reviewed:
        """What the networks saw. Raises NotFound, Overloaded, UnknownModel, Unavailable."""
        bitstream = await self.kept.find(name)
        if bitstream is None:
            raise NotFound(f"the bitstream of frame {name} is not kept, or no longer")
        return await self._decode(bitstream)

    async def again(self, name: FrameName, quality_steps: int) -> Reviewed:
        """Coded anew by its edge. Raises as FramesAgain.ask, and NotFound for a frame that the log does not have."""
        edge = self._ingest.keeper(await self._edge_of(name), name.camera)
        data = await edge.ask(name, quality_steps, WAIT_S)
        return await self._decode(from_bytes(data, self._inference.codecs.keys(), max_pixels=self._max_pixels))

    async def _edge_of(self, name: FrameName) -> str:
        sequence = await self._log.find(name)
        try:
            records = [] if sequence is None else await self._log.read(sequence - 1, 1)
        except CursorExpired:
            records = []
        if not records or records[0].name != name:
            raise NotFound(f"the log has no frame {name}, or no longer")
        return detection_pb2.DetectionEvent.FromString(records[0].event).edge_id

    async def _decode(self, bitstream: Bitstream) -> Reviewed:
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(f"{self._waiting} pictures are being decoded for review; try again in a moment")
        self._waiting += 1
        try:
            inferred = await self._inference.infer(_CALLER, bitstream, ())
        finally:
            self._waiting -= 1
        assert inferred is not None  # noqa: S101 - it has no time to be over
        return Reviewed(inferred.frame, bitstream)
