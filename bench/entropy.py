"""Entropy coder against its peers: ns a symbol and bytes above the entropy, all in one process on the same symbols.

    sightline bench entropy [--short] [--json]

192 x 68 x 120 symbols (the latents of a 1080p frame with 192 channels) are drawn from Gaussians of scale indexes that
are spread evenly over the 64 ("uniform"), or crowd at the small ones as those of natural pictures do ("natural").
Nothing is skipped. Peers: `compressai.ans`, given tables and lists ready-made, and `constriction` with its quantised
Gaussians. Times are of the calling thread on the processor, because a wall clock also measures what else the machine
does; the row for two threads is the wall clock's. In each round each coder runs four times and the last counts,
when memory and caches are its own. Medians and quartiles of several rounds.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import torch
from compressai import ans
from compressai.entropy_models import GaussianConditional
from numpy.typing import NDArray

from bench.report import Report, Say, run
from bench.timing import Sample, in_turns, sample
from shared.codec import rans
from shared.codec.tables import EntropyTables, gaussian_tables

SHAPE = (192, 68, 120)
SCALES = np.exp(np.linspace(np.log(0.11), np.log(256), 64))
TARGET_RATIO, TARGET_NS = 20.0, 4.0
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One coder on one distribution, ns a symbol. `over_percent`: bytes above the entropy of the Gaussians that were
    drawn from."""

    distribution: str
    coder: str
    encode: Sample
    decode: Sample
    bits_per_symbol: float
    over_percent: float


@dataclass(frozen=True)
class _Coder:
    name: str
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int]


def measure_coders(rounds: int = ROUNDS, shape: tuple[int, int, int] = SHAPE) -> list[Row]:
    """All coders on both distributions. Every decode is compared with what was encoded."""
    tables = gaussian_tables(SCALES)
    rng = np.random.default_rng(0)
    n = int(np.prod(shape))
    spreads = {
        "uniform": rng.integers(0, 64, n).astype(np.uint8),
        "natural": np.minimum(np.abs(rng.normal(0, 16, n)), 63).astype(np.uint8),
    }
    rows = []
    for name, indexes in spreads.items():
        symbols = np.rint(rng.normal(0, SCALES[indexes])).astype(np.int32)
        rows += _measure_distribution(name, symbols, indexes, tables, rounds)
    return rows


def measure_threads(rounds: int = ROUNDS, shape: tuple[int, int, int] = SHAPE) -> dict[str, float]:
    """Wall-clock speed-up of two threads over one, on one frame (shared chunks) and on two frames."""
    tables = gaussian_tables(SCALES)
    rng = np.random.default_rng(1)
    indexes = np.minimum(np.abs(rng.normal(0, 16, int(np.prod(shape)))), 63).astype(np.uint8)
    symbols = np.rint(rng.normal(0, SCALES[indexes])).astype(np.int32)
    data = rans.encode(symbols, indexes, tables)
    with ThreadPoolExecutor(2) as pool:
        works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "encode, one frame": (
                lambda: rans.encode(symbols, indexes, tables),
                lambda: rans.encode(symbols, indexes, tables, pool=pool),
            ),
            "decode, one frame": (
                lambda: rans.decode(data, indexes, tables),
                lambda: rans.decode(data, indexes, tables, pool=pool),
            ),
            "decode, four frames": (
                lambda: [rans.decode(data, indexes, tables) for _ in range(4)],
                lambda: list(pool.map(lambda _: rans.decode(data, indexes, tables), range(4))),
            ),
        }
        ratios = {}
        for name, (one, two) in works.items():
            found = in_turns({"one": one, "two": two}, rounds)
            ratios[name] = found["one"].median / found["two"].median
        return ratios


def measure(short: bool, say: Say) -> Report:
    """Figures of both distributions and of two threads."""
    report = Report("entropy", "rANS beside its peers, ns a symbol", {"symbols": "x".join(map(str, SHAPE)), "seed": 0})
    rounds = 2 if short else ROUNDS
    say("one core")
    rows = measure_coders(rounds, (24, 34, 60) if short else SHAPE)
    for row in rows:
        if row.coder == "sightline":
            peer = next(each for each in rows if (each.distribution, each.coder) == (row.distribution, "compressai"))
            for name, ours, theirs in (("encode", row.encode, peer.encode), ("decode", row.decode, peer.decode)):
                report.add(
                    f"{name}, {row.distribution}", ours, "ns",
                    peer=(peer.coder, theirs), at_most=TARGET_NS, ratio_at_least=TARGET_RATIO,
                )  # fmt: skip
            report.add(f"above the entropy, {row.distribution}", row.over_percent, "%")
        elif row.coder != "compressai":
            report.add(f"{row.coder}: encode, {row.distribution}", row.encode, "ns")
            report.add(f"{row.coder}: decode, {row.distribution}", row.decode, "ns")
    say("two threads")
    for name, ratio in measure_threads(rounds, (24, 34, 60) if short else SHAPE).items():
        report.add(f"two threads over one, {name}", ratio, "x")
    report.notes.append(
        "Times on one core are the calling thread's on the processor, those of two threads the wall clock's."
    )
    return report


def _measure_distribution(
    name: str, symbols: NDArray[np.int32], indexes: NDArray[np.uint8], tables: EntropyTables, rounds: int
) -> list[Row]:
    coders = [
        _Coder(
            "sightline",
            lambda: rans.encode(symbols, indexes, tables),
            lambda data: rans.decode(data, indexes, tables),
            len,
        ),
        _compressai(symbols, indexes),
        _constriction(symbols, indexes),
    ]
    entropy = _entropy_bits(indexes)
    times: dict[str, tuple[list[float], list[float]]] = {coder.name: ([], []) for coder in coders}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for coder in coders:
            for turn in range(4):
                started = time.thread_time()
                data = coder.encode()
                encoded = time.thread_time()
                decoded = coder.decode(data)
                if turn == 3:
                    times[coder.name][0].append(encoded - started)
                    times[coder.name][1].append(time.thread_time() - encoded)
            sizes[coder.name] = coder.size(data)
            if not np.array_equal(np.asarray(decoded, np.int32), symbols):
                raise AssertionError(f"{coder.name} gave back other symbols")
    nanoseconds = {name: [[t / len(symbols) * 1e9 for t in part] for part in both] for name, both in times.items()}
    return [
        Row(
            distribution=name,
            coder=coder.name,
            encode=sample(nanoseconds[coder.name][0]),
            decode=sample(nanoseconds[coder.name][1]),
            bits_per_symbol=8 * sizes[coder.name] / len(symbols),
            over_percent=(8 * sizes[coder.name] / entropy - 1) * 100,
        )
        for coder in coders
    ]


def _compressai(symbols: NDArray[np.int32], indexes: NDArray[np.uint8]) -> _Coder:
    model = GaussianConditional(SCALES.tolist())
    model.update()
    cdfs, lengths, offsets = (
        array.tolist()
        for array in (model._quantized_cdf, model._cdf_length, model._offset)
        if isinstance(array, torch.Tensor)
    )
    symbol_list, index_list = symbols.tolist(), indexes.tolist()
    return _Coder(
        "compressai",
        lambda: ans.RansEncoder().encode_with_indexes(symbol_list, index_list, cdfs, lengths, offsets),
        lambda data: ans.RansDecoder().decode_with_indexes(data, index_list, cdfs, lengths, offsets),
        len,
    )


def _constriction(symbols: NDArray[np.int32], indexes: NDArray[np.uint8]) -> _Coder:
    reach = int(np.abs(symbols).max())
    family = constriction.stream.model.QuantizedGaussian(-reach, reach)
    means, scales = np.zeros(len(symbols), np.float32), SCALES[indexes].astype(np.float32)

    def encode() -> Any:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, family, means, scales)
        return coder.get_compressed()

    return _Coder(
        "constriction",
        encode,
        lambda words: constriction.stream.stack.AnsCoder(words).decode(family, means, scales),
        lambda words: 4 * len(words),
    )


def _entropy_bits(indexes: NDArray[np.uint8]) -> float:
    """Of the Gaussians, exact: what no coder that knows the scales can stay below on average."""
    entropies = []
    for scale in SCALES:
        reach = int(12 * scale) + 2
        edges = torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5
        upper = torch.special.erfc(edges.abs() / (scale * 2**0.5)) / 2
        pmf = torch.where(edges[1:] > 0, upper[:-1] - upper[1:], upper[1:] - upper[:-1])
        pmf[reach] = 1 - 2 * upper[reach + 1]
        entropies.append(float(-torch.special.xlogy(pmf, pmf).sum() / np.log(2)))
    return float(np.array(entropies)[indexes].sum())


def main() -> int:
    return run(__doc__, "entropy", measure)


if __name__ == "__main__":
    raise SystemExit(main())
