"""Camera and consumer in one asyncio program: sends a picture and waits for its detections.

python docs/examples/there_and_back.py 127.0.0.1:7411 127.0.0.1:7421 photo.jpg
"""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from shared.clients import AsyncCameraClient, AsyncDetectionClient, EventFilter, Progress, Start


async def main(edge: str, cloud: str, picture: Path) -> None:
    async with AsyncCameraClient(edge, "there-and-back") as camera, AsyncDetectionClient(cloud) as consumer:
        only_mine = EventFilter(camera_ids=("there-and-back",))
        async with aclosing(consumer.updates(Start.END, only_mine)) as updates:
            receipt = None
            async for update in updates:
                if isinstance(update, Progress):
                    if receipt is None:  # the subscription stands: send now, and miss nothing
                        receipt = await camera.compress(picture)
                elif receipt is not None and update.frame == receipt.frame:
                    for found in (one for one in update.detections if one.score >= 0.5):
                        print(f"{found.label} {found.score:.2f} at {found.box}")
                    print(f"{receipt.coded_bytes} bytes went to the cloud, which took {update.timings.total_ms:.0f} ms")
                    return


asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
