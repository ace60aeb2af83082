"""Encoding time beside picture encoders: JPEG and WebP (Pillow), and all-intra x265, SVT-AV1 and libvvenc (ffmpeg).

    sightline bench encoders [--short] [--json]

The same photographs at 640x480, on the same cores, milliseconds a picture. The video encoders take all pictures in one
process with as many threads as there are cores, so that neither their start nor idle cores are held against them, and
pictures that are to be coded smaller are reduced before the clock starts. ffmpeg's own cost, with its conversion from
RGB, is a row. Sightline codes a picture on each core, as the edge service does (`lanes`), with everything from pixels
to the bytes of the file, and takes turns with libvvenc; a row beside it has one picture after the other, each on all
cores.

The target compares points of equal accuracy: for each quality of Sightline the cheapest point of VVC that was measured
to reach at least its mAP through a network that took no part (docs/results/results.csv).
"""

import csv
import io
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from bench.pictures import VGA, Rgb, frame, photographs, size_name
from bench.report import Report, Say, run
from bench.timing import Sample, in_turns, sample
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Frame
from trainer.evaluation.anchors import ffmpeg_program

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "results.csv"
TARGET_RATIO = 8.0
VVC = ("-c:v", "libvvenc", "-preset", "faster", "-qpa", "0", "-g", "1", "-qp", "{q}", "-pix_fmt", "yuv420p10le")
HEVC = ("-c:v", "libx265", "-preset", "medium", "-g", "1", "-x265-params", "qp={q}:keyint=1:info=0:log-level=error")
AV1 = ("-c:v", "libsvtav1", "-preset", "8", "-g", "1", "-crf", "{q}", "-pix_fmt", "yuv420p10le")
NOTHING = ("-c:v", "rawvideo", "-pix_fmt", "yuv420p")
GRID = {"x265 medium": (HEVC, "hevc", ((27, 100), (37, 100))), "SVT-AV1 preset 8": (AV1, "ivf", ((35, 100), (55, 100)))}
VVC_POINT = "32@100"  # of usual video; the others are those of our qualities' accuracy
QUALITIES = (1, 2, 3, 4, 5)


def measure(short: bool, say: Say) -> Report:
    size, count, rounds = ((96, 128), 2, 1) if short else (VGA, 8, 7)
    codec = Codec.load("detection")
    frames = [frame(size, i) for i in range(min(count, len(photographs())))]
    settings = {
        "size": size_name(size), "pictures": len(frames), "threads": torch.get_num_threads(),
        "dtype": str(codec.dtype), "ffmpeg": ffmpeg_program()[1],
    }  # fmt: skip
    report = Report("encoders", "encoding beside picture encoders, ms a picture", settings)
    rgbs = [one.rgb for one in frames]
    alike = {quality: point for quality, point in equal_accuracy().items() if quality in QUALITIES}
    points = [VVC_POINT] if short else list(dict.fromkeys([*alike.values(), VVC_POINT]))
    with tempfile.TemporaryDirectory(prefix="sightline-bench-") as folder:
        vvc = {point: _vvc(rgbs, point, Path(folder)) for point in points}
        say("sightline, a picture on each core, and libvvenc in turns")
        ours, theirs = _side_by_side(codec, frames, vvc, rounds)
        for quality in QUALITIES:
            say(f"sightline, quality {quality}")
            coded = [to_bytes(each) for each in codec.encode_batch(frames, quality)]
            works = {
                str(i): (lambda one=one, q=quality: to_bytes(codec.encode(one, q))) for i, one in enumerate(frames)
            }
            alone = sample([one.median for one in in_turns(works, rounds, warm_up=0).values()])
            report.add(f"sightline quality {quality} ({_bpp(coded, size):.2f} bpp)", ours[quality], "ms")
            report.add(f"sightline quality {quality}, one after the other", alone, "ms")
        _pillow(report, rgbs, rounds)
        nothing = _External(rgbs, NOTHING, "null", 0, 100, Path(folder))
        report.add("ffmpeg alone, to YUV", nothing.measured(rounds), "ms")
        for name, (arguments, container, grid) in GRID.items():
            for quantiser, scale in grid:
                say(f"{name}, {quantiser}")
                external = _External(rgbs, arguments, container, quantiser, scale, Path(folder))
                took = external.measured(rounds)
                report.add(f"{name}, q {quantiser} ({external.bpp():.2f} bpp)", took, "ms")
        for point, one in vvc.items():
            name = f"libvvenc faster, QP {one.quantiser} at {one.scale} % ({one.bpp():.2f} bpp)"
            report.add(name, theirs[point], "ms")
    for quality, point in alike.items():
        if point in theirs:
            report.add(
                f"quality {quality} against VVC of its accuracy", ours[quality], "ms",
                peer=(f"libvvenc faster {point}", theirs[point]), ratio_at_least=TARGET_RATIO,
            )  # fmt: skip
    return report


def equal_accuracy(file: Path = RESULTS) -> dict[int, str]:
    """For a quality, VVC's cheapest point, "QP@percent", with at least its mAP; qualities beyond VVC's are left out.
    Empty where the results are not there, as in an installation without the documents."""
    if not file.exists():
        return {}
    with file.open() as lines:
        rows = [row for row in csv.reader(lines) if len(row) > 6 and row[1] == "witness" and row[4] == "box mAP"]
    reached = [(float(row[5]), row[3], float(row[7])) for row in rows if row[2].startswith("vvc")]
    found = {}
    for _, _, series, setting, _, _, _, accuracy, *_ in rows:
        if series.startswith("sightline") and setting[1:].isdecimal():
            enough = [(bpp, point) for bpp, point, theirs in reached if theirs >= float(accuracy)]
            if enough:
                found[int(setting[1:])] = min(enough)[1]
    return found


def _side_by_side(
    codec: Codec, frames: Sequence[Frame], others: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[int, Sample], dict[str, Sample]]:
    """Milliseconds a picture, at each quality where each core has pictures of its own, and of each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as lanes:
            works: dict[str, Callable[[], object]] = {
                str(quality): lambda quality=quality: list(
                    lanes.map(lambda one: to_bytes(codec.encode(one, quality)), frames)
                )
                for quality in QUALITIES
            }
            # not counted: an edge runs on, its threads on a core each and its caches filled by no other program
            again = {"again": works[str(QUALITIES[0])]}
            taken = in_turns(again | works | dict(others), rounds)
            found = {name: took.of(lambda ms: ms / len(frames)) for name, took in taken.items()}
    finally:
        torch.set_num_threads(threads)
    return {quality: found[str(quality)] for quality in QUALITIES}, {name: found[name] for name in others}


def _pillow(report: Report, rgbs: Sequence[Rgb], rounds: int) -> None:
    for name, options in (
        ("JPEG quality 75", {"format": "JPEG", "quality": 75}),
        ("JPEG quality 20", {"format": "JPEG", "quality": 20}),
        ("WebP quality 50", {"format": "WEBP", "quality": 50}),
    ):
        pictures, sizes = [Image.fromarray(rgb) for rgb in rgbs], []

        def code(options: dict[str, object] = options, pictures: list[Image.Image] = pictures) -> list[bytes]:
            coded = []
            for one in pictures:
                out = io.BytesIO()
                one.save(out, **options)
                coded.append(out.getvalue())
            return coded

        sizes = code()
        took = in_turns({name: code}, rounds)[name].of(lambda ms: ms / len(rgbs))
        report.add(f"{name} ({_bpp(sizes, rgbs[0].shape[:2]):.2f} bpp)", took, "ms")


class _External:
    """All pictures by one of ffmpeg's encoders, in one process, into a file in `folder`."""

    def __init__(
        self, rgbs: Sequence[Rgb], arguments: Sequence[str], container: str, quantiser: int, scale: int, folder: Path
    ) -> None:
        height, width = (2 * round(side * scale / 200) for side in rgbs[0].shape[:2])
        small = [Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS) for rgb in rgbs]
        self.raw = b"".join(one.tobytes() for one in small)
        self.quantiser, self.scale, self.size, self.count = quantiser, scale, rgbs[0].shape[:2], len(rgbs)
        self.out = folder / f"{container}-{quantiser}-{scale}"
        self.command = [ffmpeg_program()[0], "-hide_banner", "-nostdin", "-loglevel", "error", "-f", "rawvideo"]
        self.command += ["-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1", "-i", "pipe:0"]
        self.command += ["-threads", str(len(os.sched_getaffinity(0)))]
        self.command += [argument.replace("{q}", str(quantiser)) for argument in arguments]
        self.command += ["-y", "-f", container, str(self.out)]

    def __call__(self) -> None:
        subprocess.run(self.command, input=self.raw, check=True, capture_output=True)  # noqa: S603 - ours

    def measured(self, rounds: int) -> Sample:
        """Milliseconds a picture."""
        return in_turns({"": self}, rounds)[""].of(lambda ms: ms / self.count)

    def bpp(self) -> float:
        """Bits a pixel of the original size, once it has run."""
        return 8 * self.out.stat().st_size / (self.size[0] * self.size[1] * self.count)


def _vvc(rgbs: Sequence[Rgb], point: str, folder: Path) -> _External:
    quantiser, _, scale = point.partition("@")
    return _External(rgbs, VVC, "vvc", int(quantiser), int(scale), folder)


def _bpp(coded: Sequence[bytes], size: Sequence[int]) -> float:
    return 8 * sum(len(each) for each in coded) / (len(coded) * size[0] * size[1])


def main() -> int:
    return run(__doc__, "encoders", measure)


if __name__ == "__main__":
    raise SystemExit(main())
