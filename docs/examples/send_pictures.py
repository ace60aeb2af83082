"""Sends pictures to an edge and prints what became of each.

python docs/examples/send_pictures.py 127.0.0.1:7411 photo.jpg other.png
"""

import sys
from pathlib import Path

from shared.clients import CameraClient, CompressOptions
from shared.errors import SightlineError

edge, *pictures = sys.argv[1:]
with CameraClient(edge, "example", options=CompressOptions(quality=5)) as camera:
    for path, result in zip(pictures, camera.compress_many(map(Path, pictures)), strict=True):
        if isinstance(result, SightlineError):
            print(f"{path}: {result}")
        else:
            print(f"{path}: {result.frame}, {result.coded_bytes} bytes, {result.bits_per_pixel:.3f} bit per pixel")
