"""The ways a picture reaches the network: as it is, through an anchor, through Sightline, or unquantised.

Each is a series of settings; a setting codes a picture at a cost in bits and can give back the decoded picture.

* original: one setting; bits are its file, as it came; a decoded picture is known by its pixels.
* an anchor: its grid; bits are the picture's (see `bits`); known by the coded bytes and how they are decoded.
* Sightline: qualities; bits are the whole .slc, header and all; known by its decoded pixels, because the transforms may
  change while the weights do not.
* Sightline with effort: the same, its codings stored.
* unquantised: one setting, no bits: g_s(g_a(x)), a control; known by its decoded pixels.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from shared.codec.bitstream import from_bytes, to_bytes
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from trainer.effort import recipe
from trainer.evaluation.anchors import Anchor, CodedPicture, Point, Rgb
from trainer.evaluation.coded_store import CodedStore, pixels_sha256
from trainer.evaluation.evaluation_set import Picture
from trainer.evaluation.pictures import read_rgb


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one picture at one setting. `bits`: what counts; `file_bits`: the whole file; s, NaN if not measured."""

    bits: int
    file_bits: int
    encode_s: float = float("nan")
    decode_s: float = float("nan")


@dataclass(frozen=True, slots=True)
class Coding:
    """One picture at one setting. `key` names the decoded picture, `decode` gives it: uint8 [height, width, 3]."""

    cost: Cost
    key: str
    decode: Callable[[], Rgb]

    def decoded(self) -> Rgb:
        return self.decode()


class Series(Protocol):
    """`name`: of the codec with its preset or bundle; `settings`: names of its points."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Sequence[str]: ...

    def code(self, picture: Picture, setting: int) -> Coding:
        """Code `picture` at `settings[setting]`."""
        ...


@cache
def _sha256_of(path: Path) -> str:
    return pixels_sha256(read_rgb(path))


@dataclass(frozen=True, slots=True)
class OriginalSeries:
    name: str = "original"
    settings: tuple[str, ...] = ("file",)

    def code(self, picture: Picture, setting: int) -> Coding:
        bits = 8 * picture.file_bytes
        key = f"pixels:{_sha256_of(picture.path)}"
        return Coding(Cost(bits, bits), key, lambda: read_rgb(picture.path))


@dataclass(frozen=True, slots=True)
class AnchorSeries:
    """`points`: those of the anchor's grid to be used."""

    anchor: Anchor
    store: CodedStore
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return self.anchor.name

    @property
    def settings(self) -> Sequence[str]:
        return [str(point) for point in self.points]

    def code(self, picture: Picture, setting: int) -> Coding:
        point, sha256 = self.points[setting], _sha256_of(picture.path)
        coded = self.store.get(self.anchor, sha256, point)
        if coded is None:
            coded = self.store.encode(self.anchor, read_rgb(picture.path), sha256, point)
        data = coded.data
        how = f"{self.anchor.decoding}|{point.scale}|{picture.width}x{picture.height}|"
        key = "coded:" + hashlib.sha256(how.encode() + data).hexdigest()
        cost = Cost(coded.picture_bits, 8 * len(data), coded.encode_s)
        return Coding(cost, key, lambda: self.anchor.decode(data, point, picture.height, picture.width))

    def stored(self, pictures: Sequence[Picture]) -> "AnchorSeries":
        """The same with only those points at which every picture is in the store already."""
        whole = [
            point
            for point in self.points
            if all(self.store.path(self.anchor, _sha256_of(p.path), point).exists() for p in pictures)
        ]
        return AnchorSeries(self.anchor, self.store, tuple(whole))


@dataclass(frozen=True, slots=True)
class SightlineSeries:
    name: str
    codec: Codec
    qualities: tuple[float, ...]

    @property
    def settings(self) -> Sequence[str]:
        return [f"q{quality:g}" for quality in self.qualities]

    def code(self, picture: Picture, setting: int) -> Coding:
        frame = Frame(read_rgb(picture.path))
        start = time.perf_counter()
        bitstream = self.codec.encode(frame, self.qualities[setting])
        encoded = time.perf_counter()
        rgb = self.codec.decode(bitstream).rgb
        decoded = time.perf_counter()
        bits = 8 * len(to_bytes(bitstream))
        cost = Cost(bits, bits, encoded - start, decoded - encoded)
        return Coding(cost, f"pixels:{pixels_sha256(rgb)}", lambda: rgb)


@dataclass(frozen=True, slots=True)
class EffortCoder:
    """Sightline with `steps` of effort for each picture; its points are qualities.

    Deterministic on one device with one set of libraries alone; its codings are stored under codec and recipe.
    """

    name: str
    codec: Codec
    steps: int
    labour: Callable[[Frame, float], Bitstream]

    @property
    def identity(self) -> str:
        return f"{self.name}|{self.codec.model_id}|{recipe(self.steps)}"

    def encode(self, rgb: Rgb, point: float) -> CodedPicture:
        start = time.perf_counter()
        data = to_bytes(self.labour(Frame(rgb), point))
        return CodedPicture(data, 8 * len(data), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class EffortSeries:
    """Sightline with effort: slow as it is, every picture is coded once, like an anchor's."""

    coder: EffortCoder
    store: CodedStore
    qualities: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.coder.name

    @property
    def settings(self) -> Sequence[str]:
        return [f"q{quality:g}" for quality in self.qualities]

    def code(self, picture: Picture, setting: int) -> Coding:
        rgb = read_rgb(picture.path)
        coded = self.store.encode(self.coder, rgb, pixels_sha256(rgb), self.qualities[setting])
        start = time.perf_counter()
        decoded = self.coder.codec.decode(from_bytes(coded.data, [self.coder.codec.model_id])).rgb
        cost = Cost(coded.picture_bits, 8 * len(coded.data), coded.encode_s, time.perf_counter() - start)
        return Coding(cost, f"pixels:{pixels_sha256(decoded)}", lambda: decoded)


@dataclass(frozen=True, slots=True)
class UnquantisedSeries:
    """The control: if it betters the original, the codec also improves a weak network, which is not compression."""

    name: str
    codec: Codec
    settings: tuple[str, ...] = ("unquantised",)

    def code(self, picture: Picture, setting: int) -> Coding:
        rgb = self.codec.reconstruct_unquantised(Frame(read_rgb(picture.path))).rgb
        return Coding(Cost(0, 0), f"pixels:{pixels_sha256(rgb)}", lambda: rgb)
