"""Crops to train on, a pure function of (seed, number), so that a resumed or divided run sees the same ones.

Crop number n belongs to step n // batch. Its picture is entry n mod N of the permutation of epoch n // N; place,
mirroring, zoom and quality level come from a generator seeded with (seed, n). Decoded pictures stay in memory as
uint8 up to a bound; what does not fit is decoded each time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from shared.errors import InvalidImage, InvalidInput
from trainer.data import Example, load_coco, tuning_ids

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
BETWEEN_LEVELS = 0.3  # odds that a crop's quality lies between levels
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
class CropBatch:
    """`crops`: uint8 [B, 3, crop, crop], channels-last in memory. `quality_steps`: int64 [B], in 1/256 of a level.
    `targets`: torchvision's, None without annotations. `names`: file names, for messages.
    """

    crops: Tensor
    quality_steps: Tensor
    targets: list[dict[str, Tensor]] | None
    names: tuple[str, ...]


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


def is_for_tuning(path: Path) -> bool:
    """Whether a file is, by its COCO name, one of the committed tuning split."""
    return re.fullmatch(r"\d{12}\.jpg", path.name) is not None and int(path.stem) in tuning_ids()


class Crops(Dataset[tuple[Any, ...]]):
    """Crop number -> (uint8 [crop, crop, 3], quality steps, target or None, name)."""

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
        cache_bytes: int = 4 << 30,
    ) -> None:
        """`quality`: of all crops, 1 to 8; None draws one for each."""
        self.pictures, self.crop, self.seed, self.zoom = list(pictures), crop, seed, zoom
        self.targets, self.masks, self.quality = targets, masks, quality
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._room = cache_bytes
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], int, dict[str, Tensor] | None, str]:
        index = self._index(number)
        rng = np.random.default_rng((self.seed, 1, number))
        picture = self.pictures[index]
        factor = float(np.exp(rng.uniform(np.log(self.zoom[0]), np.log(self.zoom[1])))) if self.zoom != (1, 1) else 1.0
        rgb = resized(self._read(index), factor)
        height, width = rgb.shape[:2]
        top, left = (int(rng.integers(0, max(0, side - self.crop) + 1)) for side in (height, width))
        mirrored = bool(rng.random() < 0.5)
        steps = int(rng.integers(256, 2049)) if rng.random() < BETWEEN_LEVELS else 256 * int(rng.integers(1, 9))
        if self.quality is not None:  # after the draw, so that the crops are those of a run of all qualities
            steps = 256 * self.quality
        part = rgb[top : top + self.crop, left : left + self.crop]
        short = (self.crop - part.shape[0], self.crop - part.shape[1])
        if any(short):
            part = np.pad(part, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge")
        target = None
        if self.targets and picture.example is not None:
            target = crop_targets(picture.example, (height, width), (left, top, self.crop), mirrored, masks=self.masks)
        return np.ascontiguousarray(part[:, ::-1] if mirrored else part), steps, target, picture.path.name

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
    size = (max(1, round(rgb.shape[1] * factor)), max(1, round(rgb.shape[0] * factor)))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))


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


def collate(items: Sequence[tuple[NDArray[np.uint8], int, dict[str, Tensor] | None, str]]) -> CropBatch:
    crops, steps, targets, names = zip(*items, strict=True)
    labelled = [t for t in targets if t is not None]
    return CropBatch(
        crops=torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2),
        quality_steps=torch.tensor(steps),
        targets=labelled if len(labelled) == len(items) else None,
        names=tuple(names),
    )


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
    return CropBatch(
        batch.crops.to(device, non_blocking=True),
        batch.quality_steps.to(device, non_blocking=True),
        None if targets is None else [{k: v.to(device) for k, v in t.items()} for t in targets],
        batch.names,
    )
