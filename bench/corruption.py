"""Damaged bitstreams by the thousand: `python -m bench.corruption --count 100000`.

Half are injured as they are: each must be a typed error. The other half get fresh checksums, as a hostile sender would
give them: each must be a typed error or decode to a picture of the announced size. Anything else (another exception, a
hang past the time limit, memory that grows) ends the run with exit code 1 and the stream's seed, which repeats it.
"""

import argparse
import json
import resource
import signal
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from shared.codec import bitstream as bits
from shared.codec.codec import Codec
from shared.codec.types import MEAN_STEPS, Bitstream, Frame
from shared.errors import SightlineError

LIMIT_S = 10
SIDES = (1, 16, 48, 64, 80, 100)
FORGED_MAX = 2**24 - 2**16  # a context model's means may differ by as much as this leaves to an encoder's limit


def injure(data: bytes, rng: np.random.Generator) -> bytes:
    """One random injury: flipped bits, a cut, an addition, an overwritten run, exchanged parts or a repeated one."""
    out = bytearray(data)
    at = int(rng.integers(len(out))) if out else 0
    match int(rng.integers(6)):
        case 0:
            for _ in range(int(rng.integers(1, 5))):
                if out:
                    out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
        case 1:
            del out[at:]
        case 2:
            out += rng.bytes(int(rng.integers(1, 200)))
        case 3:
            out[at : at + 8] = rng.bytes(8)
        case 4:
            out = out[at:] + out[:at]
        case _:
            out[at:at] = out[: int(rng.integers(len(out) + 1))]
    return bytes(out)


def forge(codec: Codec, stream: Bitstream, rng: np.random.Generator) -> Bitstream:
    """A well-formed stream that no encoder would make: some latents far outside anything a picture gives."""
    symbols = codec.unpack(stream)
    forged = symbols.symbols.astype(np.float32)
    hit = rng.random(forged.shape) < 0.01
    forged[hit] = rng.integers(-(2 ** int(rng.integers(1, 25))), 2**24, forged.shape)[hit]
    y = torch.from_numpy(np.clip(forged, -FORGED_MAX, FORGED_MAX) + symbols.means / np.float32(MEAN_STEPS))[None]
    z_hat = torch.from_numpy(symbols.z_hat)[None]
    frame = Frame(np.zeros((stream.height, stream.width, 3), np.uint8))
    return codec.pack(codec.quantise_given(z_hat, y, [stream.quality], [frame])[0])


def injure_streams(codec: Codec, stream: Bitstream, rng: np.random.Generator) -> Bitstream:
    """An injury that a sender with its own checksums could make: in a stream, between them, or in the header."""
    match int(rng.integers(6)):
        case 0:
            return replace(stream, hyper=injure(stream.hyper, rng))
        case 1:
            return replace(stream, latents=injure(stream.latents, rng))
        case 2:
            return replace(stream, hyper=stream.latents, latents=stream.hyper)
        case 3:
            return replace(stream, quality=int(rng.integers(256, 2049)), latents=injure(stream.latents, rng))
        case 4:
            return forge(codec, stream, rng)
        case _:
            return replace(stream, height=int(rng.integers(1, 200)), width=int(rng.integers(1, 200)))


def attempt(codec: Codec, good: Bitstream, seed: int) -> str:
    """What one damaged stream gave: the error's name or "picture". Raises whatever is not allowed to happen."""
    rng = np.random.default_rng(seed)
    try:
        if seed % 2:
            data = bits.to_bytes(good)
            broken = injure(data, rng)
            if broken == data:
                return "unhurt"
            bits.from_bytes(broken, [codec.model_id])
            raise AssertionError("damage under its old checksum was accepted")
        stream = bits.from_bytes(bits.to_bytes(injure_streams(codec, good, rng)), [codec.model_id])
        frame = codec.decode(_with_matching_symbols_crc(codec, stream))
    except SightlineError as error:
        return type(error).__name__
    if (frame.height, frame.width) != (stream.height, stream.width):
        raise AssertionError(f"announced {stream.width}x{stream.height}, decoded {frame.width}x{frame.height}")
    return "picture"


def _with_matching_symbols_crc(codec: Codec, stream: Bitstream) -> Bitstream:
    """Whatever the streams decode to, with the CRC of just that: the last check a hostile sender can pass."""
    symbols = codec.unpack(stream, check=False)
    crc = bits.symbols_crc(stream.quality, stream.height, stream.width, symbols.z_hat, symbols.symbols)
    return replace(stream, symbols_crc=crc)


def run(count: int, *, seed: int = 0, reference: str = "detection") -> dict[str, object]:
    """`count` damaged streams from `seed` on. Returns what they gave and how far memory grew, in bytes."""
    codec = Codec.load(reference)
    rng = np.random.default_rng(seed)
    good = [
        codec.encode(Frame(rng.integers(0, 256, (side, SIDES[-1 - i], 3), dtype=np.uint8)), float(rng.uniform(1, 8)))
        for i, side in enumerate(SIDES)
    ]
    for i in range(200):
        attempt(codec, good[i % len(good)], seed + i)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen: Counter[str] = Counter()
    for i in track(range(count), "damaged streams", console=Console(stderr=True)):
        signal.alarm(LIMIT_S)  # ends the process where a decode hangs; no exception can be raised inside a kernel
        try:
            seen[attempt(codec, good[i % len(good)], seed + i)] += 1
        except BaseException:
            print(f"stream {seed + i}: not a typed error", file=sys.stderr)
            raise
    signal.alarm(0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"count": count, "outcomes": dict(seen.most_common()), "memory_growth_bytes": grown}


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged bitstreams by the thousand.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="detection")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.count, seed=arguments.seed, reference=arguments.model), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
