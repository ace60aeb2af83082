"""An RTSP server for a test, or a skip where the machine has none."""

import pytest

from bench import rtsp


def require() -> None:
    if not rtsp.available():
        pytest.skip(f"needs {rtsp.NEEDS}")


def small_server() -> rtsp.RtspServer:
    """160x96 pixels, 15 a second."""
    return rtsp.RtspServer(rtsp.ball(160, 96, 15)).start()
