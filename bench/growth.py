"""How cost grows: with pixels, cameras, quality, frames in a batch, cores.

    sightline bench growth [--short] [--json]

The slope is fitted to the logarithms of both sides: 1 is cost in proportion, 0 none. Pixels, quality, batch and cores
are the codec's, in this process; cameras are those of an edge in a process of its own, each of which sends its next
64x64 picture when its last is spooled, so that what grows is the service and not the transforms.
"""

import asyncio
import os
import time
from collections.abc import Sequence

import numpy as np
import torch

from bench.pictures import SMALL, frame, jpeg, picture
from bench.report import Plot, Report, Say, run
from bench.rpc import compress
from bench.services import folder_on_disk, started
from bench.timing import in_turns
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec

Line = list[tuple[float, float]]


def measure(short: bool, say: Say) -> Report:
    codec = Codec.load("detection")
    cores = len(os.sched_getaffinity(0))
    report = Report("growth", "what grows with what", {"dtype": str(codec.dtype), "threads": torch.get_num_threads()})
    rounds = 1 if short else 3
    say("pixels")
    sizes = [(64, 96), (128, 192)] if short else [(192, 320), (384, 640), (768, 1280), (1536, 2560)]
    _pixels(report, codec, sizes, rounds)
    size = (96, 128) if short else SMALL
    say("quality")
    _quality(report, codec, size, rounds)
    say("batch")
    _batch(report, codec, size, (1, 2) if short else (1, 2, 4, 8), rounds)
    say("cores")
    _cores(report, codec, size, cores, rounds)
    say("cameras")
    _cameras(report, (1, 2) if short else (1, 4, 16, 64), 8 if short else 128)
    return report


def slope(line: Line) -> float:
    """Of the logarithms."""
    x, y = np.log(np.array(line)).T
    return float(np.polyfit(x, y, 1)[0])


def _pixels(report: Report, codec: Codec, sizes: Sequence[tuple[int, int]], rounds: int) -> None:
    lines: dict[str, Line] = {"encode": [], "decode": []}
    for size in sizes:
        given = frame(size)
        stream = codec.encode(given)
        found = in_turns(
            {"encode": lambda g=given: codec.encode(g), "decode": lambda s=stream: codec.decode(s)}, rounds
        )
        for name, took in found.items():
            lines[name].append((size[0] * size[1], took.median))
    for name, line in lines.items():
        report.add(f"{name}, slope against pixels", slope(line), "")
        report.add(f"{name}, a megapixel of the largest", line[-1][1] / line[-1][0] * 1e6, "ms")
    report.plots.append(Plot("Cost against pixels, quality 4", "pixels", "ms a picture", lines, log=True))


def _quality(report: Report, codec: Codec, size: tuple[int, int], rounds: int) -> None:
    lines: dict[str, Line] = {"encode": [], "decode": []}
    kilobytes: Line = []
    given = frame(size)
    for quality in range(1, 9):
        stream = codec.encode(given, quality)
        works = {"encode": lambda q=quality: codec.encode(given, q), "decode": lambda s=stream: codec.decode(s)}
        for name, took in in_turns(works, rounds).items():
            lines[name].append((quality, took.median))
        kilobytes.append((quality, len(to_bytes(stream)) / 1e3))
    for name, line in lines.items():
        report.add(f"{name}, quality 8 over quality 1", line[-1][1] / line[0][1], "x")
    report.add("bytes, quality 8 over quality 1", kilobytes[-1][1] / kilobytes[0][1], "x")
    report.plots.append(Plot("Cost against quality, 640x384", "quality", "ms a picture", lines))
    report.plots.append(Plot("Size against quality, 640x384", "quality", "kB", {"sightline": kilobytes}))


def _batch(report: Report, codec: Codec, size: tuple[int, int], batches: Sequence[int], rounds: int) -> None:
    lines: dict[str, Line] = {"encode": [], "decode": []}
    for count in batches:
        frames = [frame(size, i) for i in range(count)]
        streams = codec.encode_batch(frames)
        works = {
            "encode": lambda f=frames: codec.encode_batch(f),
            "decode": lambda s=streams: codec.decode_batch(s),
        }
        for name, took in in_turns(works, rounds).items():
            lines[name].append((count, took.median / count))
    for name, line in lines.items():
        report.add(f"{name}, a frame of a batch of {batches[-1]} over one alone", line[-1][1] / line[0][1], "x")
    report.plots.append(Plot("Cost against batch, 640x384", "frames in a batch", "ms a frame", lines))


def _cores(report: Report, codec: Codec, size: tuple[int, int], cores: int, rounds: int) -> None:
    lines: dict[str, Line] = {"encode": [], "decode": []}
    given = frame(size)
    stream = codec.encode(given)
    before = torch.get_num_threads()
    for threads in sorted({1, *(2**i for i in range(1, 8) if 2**i <= cores), cores}):
        torch.set_num_threads(threads)
        works = {"encode": lambda: codec.encode(given), "decode": lambda: codec.decode(stream)}
        for name, took in in_turns(works, rounds).items():
            lines[name].append((threads, took.median))
    torch.set_num_threads(before)
    for name, line in lines.items():
        report.add(f"{name}, one core over {cores}", line[0][1] / line[-1][1], "x")
    report.plots.append(Plot("Cost against cores, 640x384", "cores", "ms a picture", lines))


def _cameras(report: Report, cameras: Sequence[int], frames: int) -> None:
    file = jpeg(picture((64, 64)))
    rates: Line = []
    waits: Line = []
    with folder_on_disk() as folder, started("edge", [], folder) as edge:
        for count in cameras:
            start = time.perf_counter()
            sent = asyncio.run(compress(edge.address, [file], frames, count, "DELIVERY_SPOOLED"))
            rates.append((count, (frames + count) / (time.perf_counter() - start)))
            waits.append((count, float(np.median([one.wait_ms for one in sent]))))
    for (count, rate), (_, wait) in zip(rates, waits, strict=True):
        report.add(f"64x64 frames spooled, {count} cameras", rate, "frames/s")
        report.add(f"a camera's wait, {count} cameras", wait, "ms")
    report.plots.append(Plot("Frames spooled against cameras, 64x64", "cameras", "frames/s", {"edge": rates}))


def main() -> int:
    return run(__doc__, "growth", measure)


if __name__ == "__main__":
    raise SystemExit(main())
