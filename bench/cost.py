"""What a frame costs in processor time on one core: the figures that sizes of machines are worked out from.

    sightline bench cost [--short] [--json]

Processor time hardly depends on what else a machine does, so this is the benchmark for a busy one. One thread; each
stage of the codec at several qualities, and the task models; decoding is unpack and g_s together. An edge's part beside
the codec is that of a 16x16 picture, one camera, from its process's own account.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.pictures import FULL_HD, SMALL, VGA, frame, jpeg, picture, size_name
from bench.report import Report, Say, run
from bench.rpc import compress
from bench.services import folder_on_disk, started
from bench.timing import Sample, in_turns
from cloud.tasks.loading import load_task
from shared.codec.codec import Codec

BATCH = 8
TASKS = {"faster-rcnn-mobilenetv2": "default", "fasterrcnn_resnet50_fpn": "random"}


def measure(short: bool, say: Say) -> Report:
    torch.set_num_threads(1)
    codec = Codec.load("detection")
    rounds = 1 if short else 3
    report = Report("cost", "processor time a frame, one core", {"dtype": str(codec.dtype), "threads": 1})
    for size in [(96, 128)] if short else [SMALL, VGA, FULL_HD]:
        for quality in (4,) if short or size == FULL_HD else (1, 2, 4, 8):
            say(f"{size_name(size)}, quality {quality}")
            given = frame(size)
            stream = codec.encode(given, quality)
            name = f"{size_name(size)}, quality {quality}"
            report.add(f"encode {name}", spent(lambda: codec.encode(given, quality), rounds), "ms")  # noqa: B023
            report.add(f"decode {name}", spent(lambda: codec.decode(stream), rounds), "ms")  # noqa: B023
            report.add(f"size {name}", (len(stream.hyper) + len(stream.latents)) / 1e3, "kB")
    image = [torch.from_numpy(picture((96, 128) if short else VGA)).permute(2, 0, 1)]
    for name, weights in list(TASKS.items())[: 1 if short else 2]:
        say(name)
        task = load_task(name, weights=weights)
        report.add(f"{name} on 640x480", spent(lambda: task.predict(image), rounds), "ms")  # noqa: B023
        if weights == "default":
            batched = spent(lambda: task.predict(image * BATCH), rounds).of(lambda ms: ms / BATCH)  # noqa: B023
            report.add(f"{name}, a frame of a batch of {BATCH}", batched, "ms")
    say("the edge")
    with folder_on_disk() as folder, started("edge", ["--threads", "1"], folder) as edge, asyncio.Runner() as loop:
        file = jpeg(picture((16, 16)))
        for delivery in ("NONE", "SPOOLED"):
            frames = 10 if short else 200
            before = _processor_s(edge.pid)
            loop.run(compress(edge.address, [file], frames, 1, f"DELIVERY_{delivery}"))
            took = (_processor_s(edge.pid) - before) / (frames + 1) * 1e3
            report.add(f"the edge, all of a 16x16 frame, {delivery.lower()}", took, "ms")
    return report


def spent(work: Callable[[], object], rounds: int) -> Sample:
    """Milliseconds of this process on the processor, after one run that does not count."""
    return in_turns({"it": work}, rounds, clock=time.process_time)["it"]


def _processor_s(pid: int) -> float:
    """User and system time of a process, its threads included (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    return run(__doc__, "cost", measure)


if __name__ == "__main__":
    raise SystemExit(main())
