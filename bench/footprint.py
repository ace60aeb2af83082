"""What an edge costs before it does anything: imports, start, first frame, memory. Of a cloud, imports.

    sightline bench footprint [--short] [--json]

Imports are timed in fresh interpreters with the file cache warm; the peer is `import torch` alone, which the edge
cannot do without. First frame: from starting `sightline edge` to the receipt of a 640x480 JPEG that was sent at once,
with the entropy coder's kernels cached on disk as after any earlier start. Memory of a process that has coded one
frame and is idle.
"""

import asyncio
import time

from bench.pictures import VGA, jpeg, picture
from bench.processes import output_of
from bench.report import Report, Say, resident_bytes, run
from bench.rpc import compress
from bench.services import folder_on_disk, started
from bench.timing import Sample, sample

_TIMED = "import resource,time\nt=time.perf_counter()\nimport {}\nprint(time.perf_counter()-t)"
_TIMED += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)"


def measure(short: bool, say: Say) -> Report:
    rounds = 1 if short else 3
    report = Report("footprint", "imports, start and memory of an edge", {"rounds": rounds})
    say("imports")
    seconds, held = _imports("edge.server", rounds)
    torch_s, torch_held = _imports("torch", rounds)
    report.add("import edge.server", seconds, "s", peer=("import torch", torch_s), at_most=3.0)
    report.add("memory after import", held / 2**20, "MiB", peer=("import torch", torch_held / 2**20))
    seconds, held = _imports("cloud.server", rounds)
    report.add("import cloud.server", seconds, "s", peer=("import torch", torch_s))
    report.add("memory after import of cloud.server", held / 2**20, "MiB", peer=("import torch", torch_held / 2**20))
    file = jpeg(picture(VGA))
    ready, first, idle = [], [], []
    for turn in range(rounds + 1):  # the first compiles kernels where they are not cached yet
        say(f"start {turn} of {rounds}")
        with folder_on_disk() as folder:
            start = time.perf_counter()
            with started("edge", [], folder) as edge:
                ready_s = time.perf_counter() - start
                asyncio.run(compress(edge.address, [file], 0, 1, "DELIVERY_SPOOLED"))  # the one that goes before
                first_s = time.perf_counter() - start
                time.sleep(1)
                if turn:
                    ready.append(ready_s)
                    first.append(first_s)
                    idle.append(resident_bytes(edge.pid) / 2**20)
    report.add("start to serving", sample(ready), "s")
    report.add("start to the first frame spooled", sample(first), "s", at_most=6.0)
    report.add("memory, idle after a frame", sample(idle), "MiB", at_most=700)
    return report


def _imports(module: str, rounds: int) -> tuple[Sample, float]:
    """Seconds, and bytes that the process then holds."""
    seconds, held = [], 0.0
    for turn in range(rounds + 1):
        told = output_of(_TIMED.format(module)).split()
        if turn:
            seconds.append(float(told[0]))
        held = float(told[1])
    return sample(seconds), held


def main() -> int:
    return run(__doc__, "footprint", measure)


if __name__ == "__main__":
    raise SystemExit(main())
