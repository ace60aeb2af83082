"""Prints each detection that scores at least 0.5, from where the last run stopped, until it is interrupted.

python docs/examples/follow_detections.py 127.0.0.1:7421 place.cursor
"""

import sys
from pathlib import Path

from shared.clients import CursorFile, DetectionClient, Start

with DetectionClient(sys.argv[1]) as cloud:
    for event in cloud.events(Start.BEGINNING, cursor_file=CursorFile(Path(sys.argv[2]))):
        for found in (one for one in event.detections if one.score >= 0.5):
            print(event.frame, f"{found.label} {found.score:.2f}", found.box, flush=True)
