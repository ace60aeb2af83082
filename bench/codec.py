"""The whole codec, pixels to bytes and back, beside compressai's mbt2018-mean.

    sightline bench codec [--short] [--json]

One photograph at a time. The peer has random weights, so its rate says nothing; its time hardly depends on them, but
for the entropy coder, which has less to write than it would have. 1080p on an H200 is a target of its own and is
measured where there is a GPU. The last rows are of a process that is told to use no more than AVX2, as on a processor
without AVX-512 and AMX: neither bfloat16 nor products of bytes.
"""

import sys
from dataclasses import replace

import torch
from compressai.zoo import mbt2018_mean

from bench.pictures import FULL_HD, SMALL, VGA, frame, size_name
from bench.processes import AVX2_ONLY, output_of
from bench.report import Report, Say, run
from bench.timing import in_turns
from shared.codec.bitstream import to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Frame

PEER = "mbt2018-mean"
QUALITIES = (1.0, 2.0, 4.0, 6.0, 8.0)
GPU_FRAMES, GPU_BATCH = 200, 8


def measure(short: bool, say: Say) -> Report:
    codec = Codec.load("detection")
    peer = _peer()
    sizes = [(128, 192)] if short else [SMALL, VGA, FULL_HD]
    settings = {"dtype": str(codec.dtype), "threads": torch.get_num_threads(), "model": codec.model_id[:12]}
    report = Report("codec", "pixels to bytes and back, ms a picture", settings)
    for size in sizes:
        large = size[0] > 1000
        for quality in (4.0,) if short else (1.0, 4.0, 8.0) if large else QUALITIES:
            say(f"{size_name(size)}, quality {quality:g}")
            _compare(report, codec, peer if quality == 4 else None, frame(size), quality, 2 if short else 3)
    say("without AVX-512")
    made = output_of(f"from bench.codec import print_one_size; print_one_size({short})", AVX2_ONLY)
    report.figures += [replace(row, what=f"{row.what}, AVX2 only") for row in Report.from_json(made).figures]
    if torch.cuda.is_available():
        say("1080p on the GPU")
        _gpu(report)
    report.notes.append("The peer is shown beside quality 4 only; its time does not depend on the quality.")
    return report


def print_one_size(short: bool) -> None:
    """Quality 4 at 640x480 beside the peer, as a report in JSON on standard output."""
    codec = Codec.load("detection")
    report = Report("codec", "", {"dtype": str(codec.dtype)})
    _compare(report, codec, _peer(), frame((128, 192) if short else VGA), 4.0, 2 if short else 3)
    sys.stdout.write(report.to_json())


def _peer() -> torch.nn.Module:
    peer: torch.nn.Module = mbt2018_mean(4, pretrained=False).eval()
    peer.update(force=True)  # type: ignore[operator]
    return peer


def _compare(
    report: Report, codec: Codec, peer: torch.nn.Module | None, given: Frame, quality: float, rounds: int
) -> None:
    stream = codec.encode(given, quality)
    bpp = 8 * len(to_bytes(stream)) / (given.height * given.width)
    encode, decode = {"ours": lambda: codec.encode(given, quality)}, {"ours": lambda: codec.decode(stream)}
    if peer is not None:
        x = torch.from_numpy(given.rgb).permute(2, 0, 1)[None].float() / 255
        missing = (-x.shape[3] % 64, -x.shape[2] % 64)
        x = torch.nn.functional.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
        with torch.inference_mode():
            coded = peer.compress(x)

        def their_encode() -> None:
            with torch.inference_mode():
                peer.compress(x)

        def their_decode() -> None:
            with torch.inference_mode():
                peer.decompress(coded["strings"], coded["shape"])

        encode[PEER], decode[PEER] = their_encode, their_decode
    name = f"{size_name((given.height, given.width))}, quality {quality:g} ({bpp:.2f} bpp)"
    for what, works in (("encode", encode), ("decode", decode)):
        found = in_turns(works, rounds)
        report.add(f"{what} {name}", found["ours"], "ms", peer=(PEER, found[PEER]) if PEER in found else None)


def _gpu(report: Report) -> None:
    """Sustained, in batches, copies and rANS on their own threads included."""
    import time
    from concurrent.futures import ThreadPoolExecutor

    codec = Codec.load("detection", device="cuda")
    frames = [frame(FULL_HD, i) for i in range(GPU_BATCH)]
    with ThreadPoolExecutor() as pool:
        for turn in range(2):  # the first warms up
            start = time.perf_counter()
            packed = []
            for _ in range(GPU_FRAMES // GPU_BATCH):
                packed += [pool.submit(codec.pack, symbols) for symbols in codec.analyse(frames, 4.0)]
            streams = [each.result() for each in packed]
            encode_s = time.perf_counter() - start
            start = time.perf_counter()
            unpacked = [pool.submit(codec.unpack, stream) for stream in streams]
            for i in range(0, GPU_FRAMES, GPU_BATCH):
                codec.synthesise([each.result() for each in unpacked[i : i + GPU_BATCH]])
            decode_s = time.perf_counter() - start
            if turn:
                for what, seconds in (("encode", encode_s), ("decode", decode_s)):
                    rate = len(streams) / seconds
                    report.add(f"{what} 1080p on the GPU", rate, "frames/s", more_is_better=True, at_least=250)


def main() -> int:
    return run(__doc__, "codec", measure)


if __name__ == "__main__":
    raise SystemExit(main())
