"""Counts objects by camera and class over all that a cloud's log holds, and ends.

python docs/examples/tally.py 127.0.0.1:7421
"""

import sys
from collections import Counter

from shared.clients import DetectionClient, EventFilter, Outcome, Progress, Start

counts: Counter[tuple[str, str]] = Counter()
sure = EventFilter(min_score=0.5, outcomes=(Outcome.DETECTIONS,))
with DetectionClient(sys.argv[1]) as cloud:
    for update in cloud.updates(Start.BEGINNING, sure):
        if isinstance(update, Progress):
            if update.caught_up:
                break
        else:
            counts.update((update.frame.camera_id, found.label) for found in update.detections)
for (camera, label), number in counts.most_common():
    print(f"{camera}: {number} {label}")
