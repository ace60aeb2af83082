"""The ways a picture reaches the network: as it is, through an anchor, through Sightline, or unquantised.

Each is a series of settings; a setting codes a picture at a cost in bits and can give back the decoded picture.

* original: one setting; bits are its file, as it came; a decoded picture is known by its pixels.
* an anchor: its grid; bits are the picture's (see `bits`); known by the coded bytes and how they are decoded.
* Sightline: qualities, some of them at reduced sizes too; bits are the whole .slc, header and all; known by its
  decoded pixels, because the transforms may change while the weights do not.
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
from trainer.evaluation.anchors import Anchor, CodedPicture, Point, Rgb, reduced, restored
from trainer.evaluation.coded_store import CodedStore, Coder, P, pixels_sha256
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


def _stored(store: CodedStore, coder: Coder[P], picture: Picture, point: P) -> CodedPicture:
    """What the store has, else made and stored; the picture is read only then."""
    sha256 = _sha256_of(picture.path)
    return store.get(coder, sha256, point) or store.encode(coder, read_rgb(picture.path), sha256, point)


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
        point = self.points[setting]
        coded = _stored(self.store, self.anchor, picture, point)
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
class Quality:
    """One setting of Sightline: its quality, and the size of what it is given in percent of each side."""

    quality: float
    scale: int = 100

    def __str__(self) -> str:
        return str(self.quality) if self.scale == 100 else f"{self.quality}@{self.scale}"


@dataclass(frozen=True, slots=True)
class SightlineSeries:
    name: str
    codec: Codec
    points: tuple[Quality, ...]

    @property
    def settings(self) -> Sequence[str]:
        return [f"q{p.quality:g}" + (f"@{p.scale}" if p.scale < 100 else "") for p in self.points]

    def code(self, picture: Picture, setting: int) -> Coding:
        coded = self._coded(picture, self.points[setting])
        start = time.perf_counter()
        rgb = self.codec.decode(from_bytes(coded.data, [self.codec.model_id])).rgb
        seconds = time.perf_counter() - start
        rgb = restored(rgb, picture.height, picture.width)
        cost = Cost(coded.picture_bits, coded.picture_bits, coded.encode_s, seconds)
        return Coding(cost, f"pixels:{pixels_sha256(rgb)}", lambda: rgb)

    def _coded(self, picture: Picture, point: Quality) -> CodedPicture:
        return _timed(self.codec.encode, read_rgb(picture.path), point)


@dataclass(frozen=True, slots=True)
class EffortSeries(SightlineSeries):
    """Sightline with `steps` of effort: slow as it is, every picture is coded once, like an anchor's.

    Deterministic on one device with one set of libraries alone; its codings are stored under codec and recipe.
    """

    steps: int
    labour: Callable[[Frame, float], Bitstream]
    store: CodedStore

    @property
    def identity(self) -> str:
        return f"{self.name}|{self.codec.model_id}|{recipe(self.steps)}"

    def encode(self, rgb: Rgb, point: Quality) -> CodedPicture:
        return _timed(self.labour, rgb, point)

    def _coded(self, picture: Picture, point: Quality) -> CodedPicture:
        return _stored(self.store, self, picture, point)


def _timed(encode: Callable[[Frame, float], Bitstream], rgb: Rgb, point: Quality) -> CodedPicture:
    frame = Frame(reduced(rgb, point.scale))
    start = time.perf_counter()
    data = to_bytes(encode(frame, point.quality))
    return CodedPicture(data, 8 * len(data), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class UnquantisedSeries:
    """The control: if it betters the original, the codec also improves a weak network, which is not compression."""

    name: str
    codec: Codec
    settings: tuple[str, ...] = ("unquantised",)

    def code(self, picture: Picture, setting: int) -> Coding:
        rgb = self.codec.reconstruct_unquantised(Frame(read_rgb(picture.path))).rgb
        return Coding(Cost(0, 0), f"pixels:{pixels_sha256(rgb)}", lambda: rgb)
