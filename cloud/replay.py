"""Rejected frames delivered again by the cloud itself: the pipeline's own way, under the frame's new name."""

import time

from sightline.v1 import common_pb2, ingest_pb2

from cloud.detections.log import FrameName
from cloud.pipeline import Pipeline, ReceivedFrame
from cloud.quarantine import Quarantine
from shared.codec import bitstream as bits
from shared.errors import Unavailable
from shared.quarantine import Quarantined, Replayed


class Replayer:
    """The keeper behind the cloud's QuarantineService (`shared.quarantine.Keeper`)."""

    def __init__(self, pipeline: Pipeline, quarantine: Quarantine) -> None:
        self._pipeline = pipeline
        self._quarantine = quarantine

    async def quarantined(self, after_id: int, limit: int) -> list[Quarantined]:
        return await self._quarantine.frames(after_id, limit)

    async def find_quarantined(self, camera_id: str, epoch: int, seq: int) -> Quarantined | None:
        return await self._quarantine.find(FrameName(camera_id, epoch, seq))

    async def replay(self, frame: Quarantined) -> Replayed:
        """Returns when its new record is in the log. Raises Unavailable where another attempt may help."""
        now_us = time.time_ns() // 1000
        received = ReceivedFrame(
            name=FrameName(frame.camera_id, frame.replay_epoch, frame.seq),
            edge_id=frame.edge_id,
            bitstream=frame.bitstream,
            payload_crc=bits.payload_crc(frame.bitstream),  # what was damaged on the way still fails its symbols' check
            capture_us=frame.captured_us,
            spooled_us=now_us,
            expires_us=0,
            received_us=now_us,
        )
        verdict = await self._pipeline.process(received)
        if verdict.state == ingest_pb2.ACK_STATE_RETRY_LATER:
            raise Unavailable(f"not now, it is kept: {verdict.detail}")
        await self._quarantine.remove(FrameName(frame.camera_id, frame.epoch, frame.seq))
        return Replayed(verdict.outcome or common_pb2.OUTCOME_UNSPECIFIED, verdict.detail)
