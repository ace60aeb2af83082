"""Starts and kills GStreamer's RTSP server, which stands in for a network camera (`bench/rtsp_server.py`)."""

import signal
import subprocess
from functools import cache
from pathlib import Path

PYTHON = Path("/usr/bin/python3")
SERVER = Path(__file__).with_name("rtsp_server.py")
NEEDS = "Debian's gir1.2-gst-rtsp-server-1.0, python3-gi and GStreamer's good and ugly plugins"
_PROBE = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0'); "
    "from gi.repository import Gst, GstRtspServer; Gst.init(None); "
    "assert Gst.ElementFactory.find('x264enc') and Gst.ElementFactory.find('rtph264pay')"
)


def ball(width: int, height: int, fps: int) -> str:
    """A ball that moves, as H.264."""
    return (
        f"videotestsrc is-live=true pattern=ball ! video/x-raw,width={width},height={height},framerate={fps}/1 ! "
        f"x264enc tune=zerolatency speed-preset=ultrafast key-int-max={fps} ! "
        "rtph264pay name=pay0 pt=96 config-interval=1"
    )


def file(path: Path) -> str:
    """An MP4 file with H.264 in it, at its own pace; the stream ends with it."""
    return f"filesrc location={path} ! qtdemux ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=1"


@cache
def available() -> bool:
    """Whether this machine has what it NEEDS."""
    if not PYTHON.exists():
        return False
    return subprocess.run([str(PYTHON), "-c", _PROBE], capture_output=True, check=False).returncode == 0  # noqa: S603


class RtspServer:
    """`start` again after `kill` serves at the same address."""

    def __init__(self, launch: str) -> None:
        self._launch = launch
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/camera"

    def start(self) -> "RtspServer":
        command = [str(PYTHON), str(SERVER), str(self.port), self._launch]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        self.port = int(self._process.stdout.readline())
        return self

    def freeze(self) -> None:
        """It stays connected and says nothing, as a camera behind a cut wire does; until it is killed."""
        assert self._process is not None  # noqa: S101 - it was started
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
