"""Rejected frames kept for people, as edge and cloud both serve them: listed, fetched, and delivered again after a fix.

A frame that is delivered again needs a name of its own, since its first name has its one record in the log and that is
the rejection. The new name follows from the old one, so that a replay that is repeated, or done from both sides, is the
same frame to the log and makes one event. Epochs are random 64 bits, and so are 64 bits of SHA-256: they do not meet.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp
from sightline.v1 import common_pb2, quarantine_pb2, quarantine_pb2_grpc

from shared.codec import bitstream as bits
from shared.codec.types import QUALITY_STEP, Bitstream
from shared.errors import InvalidInput, NotFound, Unavailable

SERVICE = "sightline.v1.QuarantineService"
PAGE_FRAMES = 100
MAX_PAGE_FRAMES = 1000


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A rejected frame. `id`: grows in the order of rejection. Times in microseconds since 1970 UTC, 0: not known."""

    id: int
    camera_id: str
    epoch: int
    seq: int
    captured_us: int
    quarantined_us: int
    reason: str
    edge_id: str
    bitstream: Bitstream

    @property
    def replay_epoch(self) -> int:
        """The epoch under which it is delivered again; camera and seq stay as they are."""
        name = struct.pack("<QQ", self.epoch, self.seq) + self.camera_id.encode()
        return int.from_bytes(hashlib.sha256(b"sightline replay " + name).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class Replayed:
    """How far a frame that was delivered again has come; `outcome` 0: not known yet."""

    outcome: int = 0
    reason: str = ""


class Keeper(Protocol):
    """Who keeps rejected frames. All methods may raise Unavailable."""

    async def quarantined(self, after_id: int, limit: int) -> list[Quarantined]:
        """At most `limit` frames with a larger id, in order."""
        ...

    async def find_quarantined(self, camera_id: str, epoch: int, seq: int) -> Quarantined | None:
        """The frame with this name, None if it is not kept."""
        ...

    async def replay(self, frame: Quarantined) -> Replayed:
        """Delivers it under its new name, and no longer keeps it as rejected."""
        ...


class QuarantineService(quarantine_pb2_grpc.QuarantineServiceServicer):
    """Serves once `open` has given it a keeper; until then callers are told UNAVAILABLE."""

    def __init__(self) -> None:
        self._keeper: Keeper | None = None

    def open(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def ListQuarantine(
        self, request: quarantine_pb2.ListQuarantineRequest, context: Any
    ) -> quarantine_pb2.ListQuarantineResponse:
        limit = request.limit or PAGE_FRAMES
        if limit > MAX_PAGE_FRAMES or request.after >= 1 << 63:
            raise InvalidInput(
                f"expected a limit of at most {MAX_PAGE_FRAMES} and a cursor that was given, got {request}"
            )
        frames = await self._ready().quarantined(request.after, limit + 1)
        return quarantine_pb2.ListQuarantineResponse(
            frames=[_message(frame) for frame in frames[:limit]],
            next=frames[limit - 1].id if len(frames) > limit else 0,
        )

    async def FetchQuarantined(
        self, request: quarantine_pb2.FetchQuarantinedRequest, context: Any
    ) -> quarantine_pb2.FetchQuarantinedResponse:
        frame = await self._find(request.frame)
        return quarantine_pb2.FetchQuarantinedResponse(frame=_message(frame), bitstream=bits.to_bytes(frame.bitstream))

    async def ReplayQuarantined(
        self, request: quarantine_pb2.ReplayQuarantinedRequest, context: Any
    ) -> quarantine_pb2.ReplayQuarantinedResponse:
        frame = await self._find(request.frame)
        replayed = await self._ready().replay(frame)
        return quarantine_pb2.ReplayQuarantinedResponse(
            replayed_as=common_pb2.FrameName(camera_id=frame.camera_id, epoch=frame.replay_epoch, seq=frame.seq),
            outcome=common_pb2.Outcome.ValueType(replayed.outcome),
            reason=replayed.reason,
        )

    async def _find(self, name: common_pb2.FrameName) -> Quarantined:
        frame = await self._ready().find_quarantined(name.camera_id, name.epoch, name.seq)
        if frame is None:
            raise NotFound(f"no frame {name.camera_id}/{name.epoch:016x}/{name.seq} is kept in quarantine here")
        return frame

    def _ready(self) -> Keeper:
        if self._keeper is None:
            raise Unavailable("still starting; call again in a moment")
        return self._keeper


def _message(frame: Quarantined) -> quarantine_pb2.QuarantinedFrame:
    coded = frame.bitstream
    return quarantine_pb2.QuarantinedFrame(
        frame=common_pb2.FrameName(camera_id=frame.camera_id, epoch=frame.epoch, seq=frame.seq),
        capture_time=_time(frame.captured_us),
        quarantined_time=_time(frame.quarantined_us),
        reason=frame.reason,
        edge_id=frame.edge_id,
        model_id=coded.model_id,
        width=coded.width,
        height=coded.height,
        quality=coded.quality / QUALITY_STEP,
        payload_bytes=len(coded.hyper) + len(coded.latents),
    )


def _time(unix_us: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(unix_us)
    return stamp
