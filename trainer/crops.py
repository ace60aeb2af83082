"""Crops to train on, a pure function of (seed, number), so that a resumed or divided run sees the same ones.

Crop number n belongs to step n // batch. Its picture is entry n mod N of the permutation of epoch n // N; place,
mirroring, zoom and quality level come from a generator seeded with (seed, n). Decoded pictures stay in memory as
uint8 up to a bound; what does not fit is decoded each time.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shared.codec.bundle import SCALE_STEPS
from shared.codec.transforms import STRIDE_Y
from shared.errors import InvalidImage, InvalidInput
from trainer.data import Example, load_coco, tuning_ids

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
BETWEEN_LEVELS = 0.3  # odds that a crop's quality lies between levels
SIZE_JITTER = 1.25
QUALITY_REACH = 1.5
MIN_VISIBLE = 0.35  # an object of which less is left after cropping is ignored, not background


@dataclass(frozen=True, slots=True)
class Picture:
    """A file to crop from. `example`: its annotations, None where there are none."""

    path: Path
    example: Example | None

    def read(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], RGB. Raises InvalidImage."""
        try:
            with Image.open(self.path) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidImage(f"{self.path}: expected a readable picture, got {error}") from error


@dataclass(frozen=True, slots=True)
class Crop:
    """One crop of a `CropBatch`, see there; pictures are [side, side, 3]."""

    pixels: NDArray[np.uint8]
    original: NDArray[np.uint8] | None
    quality_steps: int
    target: dict[str, Tensor] | None
    name: str
    zoom: float


@dataclass(frozen=True, slots=True)
class CropBatch:
    """`crops`: uint8 [B, 3, side, side], channels-last in memory. `originals`: what they were before they were resized,
    uint8 [B, 3, S, S], None where the pictures were resized before cropping. `quality_steps`: int64 [B], in 1/256 of a
    level. `targets`: torchvision's, None without annotations. `names`: file names, for messages. `zooms`: the factor by
    which each picture was resized.
    """

    crops: Tensor
    originals: Tensor | None
    quality_steps: Tensor
    targets: list[dict[str, Tensor]] | None
    names: tuple[str, ...]
    zooms: tuple[float, ...]


def list_pictures(images: Path, annotations: Path | None) -> list[Picture]:
    """All pictures to train on, the committed tuning split's left out. Raises InvalidInput where none is left."""
    images = Path(images)
    if annotations is not None:
        found = [Picture(e.path, e) for e in load_coco(images, annotations)]
    elif images.is_dir():
        found = [Picture(p, None) for p in sorted(images.rglob("*")) if p.suffix.lower() in SUFFIXES]
    else:
        raise InvalidInput(f"{images}: expected a folder of pictures, there is none")
    kept = [p for p in found if not is_for_tuning(p.path)]
    if not kept:
        raise InvalidInput(f"{images}: no pictures to train on: {len(found)} found, all of them kept for tuning")
    return kept


def tuning_pictures(images: Path) -> list[Picture]:
    """Those of the committed tuning split that lie in `images`."""
    return [Picture(p, None) for p in sorted(Path(images).rglob("*")) if is_for_tuning(p)]


def spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """`count` of `pictures`, evenly spread over them, or all where there are no more."""
    return [pictures[i] for i in np.unique(np.linspace(0, len(pictures) - 1, count).round().astype(int))]


def whole_pictures(pictures: Sequence[Picture], count: int, zooms: Sequence[float]) -> Iterator[Tensor]:
    """Up to `count` whole pictures spread over `pictures`, float [3, H, W] in [0, 1], resized by each zoom in turn.

    Borders are repeated to sides that are multiples of 16, as the codec does.
    """
    for zoom, picture in zip(cycle(zooms), spread(pictures, count), strict=False):
        rgb = resized(picture.read(), zoom)
        height, width = rgb.shape[:2]
        padded = np.pad(rgb, ((0, -height % STRIDE_Y), (0, -width % STRIDE_Y), (0, 0)), mode="edge")
        yield torch.from_numpy(padded).permute(2, 0, 1).float() / 255


def is_for_tuning(path: Path) -> bool:
    """Whether a file is, by its COCO name, one of the committed tuning split."""
    return re.fullmatch(r"\d{12}\.jpg", path.name) is not None and int(path.stem) in tuning_ids()


@dataclass(frozen=True, slots=True)
class CodedSizes:
    """How large pictures are when they are coded, so that crops can be of the same size.

    `scales`: sides at quality 1 to 8, in 1/16 of the frame's. `frame_scale`: how much larger frames are than the
    pictures trained on, side by side. `short_side`: pixels of a frame's short side.

    A crop is what a window of the picture becomes when it is resized. The frozen network is shown both, and what it
    sees in the window itself is what is wanted of the decoded crop: resizing is part of what coding costs.

    A step has one size, for a frozen network sees all of a batch at one scale: that of a quality drawn for the step,
    times a factor of up to SIZE_JITTER either way. Its crops' qualities lie within QUALITY_REACH of that quality.
    """

    scales: tuple[int, ...]
    frame_scale: float
    short_side: int

    def zoom(self, quality: float) -> float:
        """The factor by which a picture is resized for a quality in [1, 8]; pictures are not enlarged."""
        side = float(np.interp(quality, np.arange(1, len(self.scales) + 1), self.scales))
        return min(1.0, side / SCALE_STEPS * self.frame_scale)

    def of_step(self, seed: int, step: int) -> tuple[float, float]:
        """The quality drawn for a step, in [1, 8], and the factor by which its pictures are resized."""
        rng = np.random.default_rng((seed, 3, step))
        quality = float(rng.uniform(1, len(self.scales)))
        return quality, min(1.0, self.zoom(quality) * float(np.exp(rng.uniform(-1, 1) * np.log(SIZE_JITTER))))

    def share(self, zoom: float) -> float:
        """How large a picture resized by `zoom` is beside the frame it stands for, side by side."""
        return zoom / self.frame_scale

    def crop(self, most: int, zoom: float) -> int:
        """Side of a step's crops: `most`, or about the short side of its pictures where that is less."""
        return min(most, 64 * max(1, round(self.short_side * self.share(zoom) / 64)))


class Crops(Dataset[Crop]):
    """Crop number -> Crop."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        *,
        crop: int,
        seed: int,
        zoom: tuple[float, float] = (1.0, 1.0),
        targets: bool = False,
        masks: bool = False,
        quality: int | None = None,
        sizes: CodedSizes | None = None,
        batch: int = 1,
        cache_bytes: int = 4 << 30,
    ) -> None:
        """`quality`: of all crops, 1 to 8; None draws one for each. With `sizes`, those of each step's `batch` crops
        follow from them, instead of from `zoom`."""
        self.pictures, self.crop, self.seed, self.zoom = list(pictures), crop, seed, zoom
        self.targets, self.masks, self.quality = targets, masks, quality
        self.sizes, self.batch = sizes, batch
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, number: int) -> Crop:
        index = self._index(number)
        rng = np.random.default_rng((self.seed, 1, number))
        picture = self.pictures[index]
        factor = float(np.exp(rng.uniform(np.log(self.zoom[0]), np.log(self.zoom[1])))) if self.zoom != (1, 1) else 1.0
        crop, low, high = self.crop, 1.0, 8.0
        if self.sizes is not None:
            quality, factor = self.sizes.of_step(self.seed, number // self.batch)
            crop = self.sizes.crop(self.crop, factor)
            low, high = max(low, quality - QUALITY_REACH), min(high, quality + QUALITY_REACH)
        window = crop if self.sizes is None else round(crop / factor)  # of what is cropped, which is then resized
        rgb = self._read(index) if self.sizes is not None else resized(self._read(index), factor)
        height, width = rgb.shape[:2]
        top, left = (int(rng.integers(0, max(0, side - window) + 1)) for side in (height, width))
        mirrored = bool(rng.random() < 0.5)
        if rng.random() < BETWEEN_LEVELS:
            steps = int(rng.integers(round(256 * low), round(256 * high) + 1))
        else:
            steps = 256 * int(rng.integers(math.ceil(low), math.floor(high) + 1))
        if self.quality is not None:  # after the draw, so that the crops are those of a run of all qualities
            steps = 256 * self.quality
        part = rgb[top : top + window, left : left + window]
        short = (window - part.shape[0], window - part.shape[1])
        if any(short):
            part = np.pad(part, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge")
        part = np.ascontiguousarray(part[:, ::-1] if mirrored else part)
        target = None
        if self.targets and picture.example is not None:
            top, left, height, width = (round(side * crop / window) for side in (top, left, height, width))
            target = crop_targets(picture.example, (height, width), (left, top, crop), mirrored, masks=self.masks)
        original = None if self.sizes is None else part
        return Crop(resized_to(part, (crop, crop)), original, steps, target, picture.path.name, factor)

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.pictures))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.pictures)))
        return int(self._order[1][place])

    def _read(self, index: int) -> NDArray[np.uint8]:
        kept = self._cache.get(index)
        if kept is None:
            kept = self.pictures[index].read()
            if kept.nbytes <= self._room:
                self._room -= kept.nbytes
                self._cache[index] = kept
        return kept


def resized(rgb: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """A picture [H, W, 3] with both sides times `factor`, bicubic."""
    if factor == 1.0:
        return rgb
    return resized_to(rgb, (max(1, round(rgb.shape[0] * factor)), max(1, round(rgb.shape[1] * factor))))


def resized_to(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture [H, W, 3] of another height and width, bicubic."""
    if rgb.shape[:2] == size:
        return rgb
    return np.array(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=2.0))


def crop_targets(
    example: Example, size: tuple[int, int], window: tuple[int, int, int], mirrored: bool, *, masks: bool = False
) -> dict[str, Tensor]:
    """Targets of a square crop. `size`: height and width the picture was resized to; `window`: left, top, side in it.

    Objects that are mostly cut away go to `ignore`. With `masks`: uint8 [N, side, side], and `has_mask` bool [N].
    """
    left, top, side = window
    ratio = np.array([size[1] / example.width, size[0] / example.height] * 2, np.float32)
    every = np.concatenate([example.boxes, example.ignore]) * ratio - np.array([left, top, left, top], np.float32)
    clipped = every.clip(0, side)
    sides, whole = clipped[:, 2:] - clipped[:, :2], every[:, 2:] - every[:, :2]
    visible = np.where((sides >= 2).all(1), sides.prod(1) / np.maximum(whole.prod(1), 1e-6), 0)
    if mirrored:
        clipped[:, [0, 2]] = side - clipped[:, [2, 0]]
    count = len(example.boxes)
    kept = np.flatnonzero(visible[:count] >= MIN_VISIBLE)
    cut = (visible > 0) & ((np.arange(len(every)) >= count) | (visible < MIN_VISIBLE))
    target = {
        "boxes": torch.from_numpy(clipped[kept].astype(np.float32)),
        "labels": torch.from_numpy(example.labels[kept]),
        "ignore": torch.from_numpy(clipped[cut].astype(np.float32)),
    }
    if masks:
        target["masks"] = _crop_masks(example, size, window, mirrored, kept)
        target["has_mask"] = torch.tensor([example.segments[i] is not None for i in kept], dtype=torch.bool)
    return target


def _crop_masks(
    example: Example, size: tuple[int, int], window: tuple[int, int, int], mirrored: bool, kept: NDArray[np.intp]
) -> Tensor:
    left, top, side = window
    placed = torch.zeros(len(kept), side, side, dtype=torch.uint8)
    whole = torch.from_numpy(example.masks()[kept])
    if len(kept) and tuple(whole.shape[1:]) != size:
        whole = torch.nn.functional.interpolate(whole[:, None], size=size, mode="nearest")[:, 0]
    part = whole[:, top : top + side, left : left + side]
    placed[:, : part.shape[1], : part.shape[2]] = part
    return placed.flip(2) if mirrored else placed


def collate(items: Sequence[Crop]) -> CropBatch:
    labelled = [item.target for item in items if item.target is not None]
    originals = [item.original for item in items if item.original is not None]
    return CropBatch(
        crops=_stacked([item.pixels for item in items]),
        originals=_stacked(originals) if originals else None,
        quality_steps=torch.tensor([item.quality_steps for item in items]),
        targets=labelled if len(labelled) == len(items) else None,
        names=tuple(item.name for item in items),
        zooms=tuple(item.zoom for item in items),
    )


def _stacked(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class CropNumbers(Sampler[list[int]]):
    """Batches of crop numbers without end, from `step` on: this process's share of each global batch."""

    def __init__(self, step: int, batch: int, *, rank: int = 0, processes: int = 1) -> None:
        self.step, self.batch, self.rank, self.processes = step, batch, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.processes
        step = self.step
        while True:
            first = step * self.batch + self.rank * share
            yield list(range(first, first + share))
            step += 1


def move(batch: CropBatch, device: torch.device) -> CropBatch:
    """The batch on another device."""
    targets: list[Mapping[str, Tensor]] | None = batch.targets  # type: ignore[assignment]
    return replace(
        batch,
        crops=batch.crops.to(device, non_blocking=True),
        originals=None if batch.originals is None else batch.originals.to(device, non_blocking=True),
        quality_steps=batch.quality_steps.to(device, non_blocking=True),
        targets=None if targets is None else [{k: v.to(device) for k, v in t.items()} for t in targets],
    )
