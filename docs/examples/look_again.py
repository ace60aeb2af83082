"""Saves the picture of each event of the last hour in which something was found, as the machine saw it and, where the
edge keeps originals, again in the best quality.

python docs/examples/look_again.py 127.0.0.1:7421 pictures
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shared.clients import DetectionClient, EventFilter, Progress
from shared.errors import SightlineError

folder = Path(sys.argv[2])
folder.mkdir(exist_ok=True)
with DetectionClient(sys.argv[1]) as cloud:
    for update in cloud.updates(datetime.now(UTC) - timedelta(hours=1), EventFilter(min_score=0.5)):
        if isinstance(update, Progress):
            if update.caught_up:
                break
            continue
        for name, quality in (("seen", None), ("finer", 8.0)):
            path = folder / f"{update.frame.camera_id}-{update.frame.seq}-{name}.png"
            try:
                path.write_bytes(cloud.review(update.frame, quality=quality).image_png)
                print(path)
            except SightlineError as error:
                print(f"{update.frame} {name}: {error}")
