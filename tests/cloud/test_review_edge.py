"""A real edge with originals switched on, a real cloud, and a consumer who wants to look more closely."""

import io
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image
from sightline.v1 import common_pb2, detection_pb2

from edge.server import Edge
from edge.settings import EdgeSettings
from shared.clients import AsyncCameraClient, CompressOptions, Delivery
from shared.codec.types import Frame
from tests.cloud.harness import RunningCloud


async def test_a_frame_coded_coarsely_is_seen_again_in_better_quality(
    cloud: RunningCloud, astronaut: Frame, tmp_path: Path
) -> None:
    settings = EdgeSettings.load(
        listen="127.0.0.1:0",
        metrics_listen="",
        data_dir=tmp_path / "edge",
        cloud=f"127.0.0.1:{cloud.server.port}",
        originals_max_bytes="1MiB",
    )
    edge = await Edge.start(settings)
    try:
        rgb = np.ascontiguousarray(astronaut.rgb[:128, :192])
        async with AsyncCameraClient(f"127.0.0.1:{edge.server.port}", "gate") as camera:
            receipt = await camera.compress(
                rgb, CompressOptions(quality=1.0, delivery=Delivery.PERSISTED), capture_time=datetime.now(UTC)
            )
        assert receipt.frame is not None
        name = common_pb2.FrameName(camera_id="gate", epoch=receipt.frame.epoch, seq=receipt.frame.seq)
        consumer = cloud.consumers()
        errors, sizes = [], []
        for quality in (0, 8.0):
            seen = await consumer.Review(
                detection_pb2.ReviewRequest(frame=name, quality=quality, return_bitstream=True), timeout=60
            )
            picture = np.asarray(Image.open(io.BytesIO(seen.image_png))).astype(int)
            errors.append(float(((picture - rgb) ** 2).mean()))
            sizes.append(len(seen.bitstream))
            assert seen.quality == (quality or 1.0)
        assert errors[1] < errors[0] / 2
        assert sizes[1] > sizes[0]
        assert len(await cloud.events()) == 1  # looking again makes no event
    finally:
        await edge.close()
