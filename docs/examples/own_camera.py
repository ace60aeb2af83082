"""Pictures that a program makes or grabs itself, as arrays: here a bright ball that crosses a dark room.

python docs/examples/own_camera.py 127.0.0.1:7411 10
"""

import sys
from datetime import UTC, datetime

import numpy as np

from shared.clients import CameraClient, CompressOptions, Delivery


def grab(step: int) -> np.ndarray:
    """uint8 [240, 320, 3], RGB: put your camera's own function here."""
    y, x = np.mgrid[:240, :320]
    ball = (x - 20 - 28 * step) ** 2 + (y - 120) ** 2 < 20**2
    return np.where(ball[..., None], np.uint8(230), np.uint8(30)).repeat(3, axis=2)


with CameraClient(sys.argv[1], "own", options=CompressOptions(target_bytes=1500, delivery=Delivery.SPOOLED)) as camera:
    for step in range(int(sys.argv[2])):
        receipt = camera.compress(grab(step), capture_time=datetime.now(UTC))
        print(f"{receipt.frame}: quality {receipt.quality:.2f}, {receipt.coded_bytes} bytes")
