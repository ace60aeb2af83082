"""Prints every detection of a cloud, from where the last run stopped; runs until it is interrupted.

python docs/examples/follow_detections.py 127.0.0.1:7421 place.cursor
"""

import sys
from pathlib import Path

from shared.clients import CursorFile, DetectionClient, Start

with DetectionClient(sys.argv[1]) as cloud:
    for event in cloud.events(Start.BEGINNING, cursor_file=CursorFile(Path(sys.argv[2]))):
        for found in event.detections:
            print(event.frame, f"{found.label} {found.score:.2f}", found.box, flush=True)
