"""At which size a bundle codes pictures, for each quality: chosen on tuning pictures, written into the bundle.

A frozen network resizes what it is given to a few hundred pixels, so a picture coded at a smaller size and enlarged
after decoding may serve it as well for the same bits, at a fraction of the transforms' work. Rate (whole files) and
distance of the network's features are measured on whole pictures at each candidate size and quality; for each quality
the smallest size is taken that needs hardly more bits than the best one at the distance it reaches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from shared.codec.bitstream import to_bytes
from shared.codec.bundle import SCALE_STEPS, SCALE_TENSOR, Bundle, load_bundle, save_bundle
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from shared.errors import InvalidSettings
from trainer.crops import Picture, list_pictures, spread, tuning_pictures
from trainer.frozen import load_frozen
from trainer.losses import TaskLoss
from trainer.model import LEVELS


@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """What `train_scales` does.

    `bundle`: name or folder of the codec. `images`: folder of pictures; those of the committed tuning split are used,
    or all where there are none of it. `out`: folder of the new bundle. `network`, `network_weights`: the frozen
    network, as for `train codec`. `candidates`: sizes to choose from, sides in 1/16 of the frame's. `pictures`: how
    many to measure on. `frame_scale`: how much larger the frames that the codec is for are than these pictures, side by
    side: the network sees so much less of them. `tolerance`: more bits than the best size needs that a smaller size may
    cost, as a share.
    """

    bundle: str
    images: Path
    out: Path
    network: str = "faster-rcnn-mobilenetv2"
    network_weights: Path | None = None
    candidates: tuple[int, ...] = (8, 10, 12, 14, 16)
    pictures: int = 24
    frame_scale: float = 1.0
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not self.candidates or not all(1 <= c <= SCALE_STEPS for c in self.candidates):
            raise InvalidSettings(f"train scales: 'candidates' must be in [1, {SCALE_STEPS}], got {self.candidates}")
        if self.tolerance < 0 or self.pictures < 1 or self.frame_scale <= 0:
            raise InvalidSettings(
                "train scales: 'tolerance' must not be negative, 'pictures' at least 1 and 'frame_scale' positive"
            )


def train_scales(settings: ScaleSettings) -> Path:
    """Measure, choose, write the bundle with its sizes. Returns `out`. Raises InvalidInput and what loading does."""
    bundle = load_bundle(settings.bundle)
    task = TaskLoss(load_frozen(settings.network, settings.network_weights), "features")
    pictures = spread(tuning_pictures(settings.images) or list_pictures(settings.images, None), settings.pictures)
    curves = {
        scale: measure(
            Codec(at_scales(bundle, [scale] * LEVELS)),
            pictures,
            task,
            f"{scale}/{SCALE_STEPS} of the side",
            settings.frame_scale,
        )
        for scale in sorted(set(settings.candidates))
    }
    scales = choose(curves, settings.tolerance)
    made = at_scales(bundle, scales)
    own = np.array([curves[scale][level] for level, scale in enumerate(scales)])
    table = {"scale": scales, "bpp": own[:, 0].tolist(), "distance": own[:, 1].tolist(), "pictures": len(pictures)}
    info = {**bundle.info, "sizes": {**table, "network": settings.network}}
    save_bundle(
        settings.out,
        name=made.name,
        architecture=made.architecture,
        skip_below=made.skip_below,
        arrays=made.arrays,
        info=info,
    )
    return settings.out


def at_scales(bundle: Bundle, scales: Sequence[int]) -> Bundle:
    """The bundle, coding at these sizes at quality 1 to 8; its model id is not worked out anew."""
    return replace(bundle, arrays={**bundle.arrays, SCALE_TENSOR: np.array(scales, np.uint8)})


@torch.no_grad()
def measure(
    codec: Codec,
    pictures: Sequence[Picture],
    task: TaskLoss,
    label: str,
    frame_scale: float = 1.0,
    qualities: Sequence[int] = range(1, LEVELS + 1),
    encode: Callable[[Frame, float], Bitstream] | None = None,
) -> NDArray[np.float64]:
    """Mean bits per pixel and feature distance at `qualities`, [Q, 2], of whole pictures at their own size.

    `frame_scale`: how much larger the frames are that they stand for. `encode`: the codec's own, or another for it.
    """
    encode = encode or codec.encode
    sums = np.zeros((len(qualities), 2))
    for picture in track(pictures, label, console=Console(stderr=True)):
        frame = Frame(picture.read())
        x = _tensor(frame)
        scale = task.network.short_side / (min(frame.height, frame.width) * frame_scale)
        if not task.variances:
            task.calibrate(x, scale)
        wanted = task.network.features(x, scale)
        for i, quality in enumerate(qualities):
            coded = encode(frame, quality)
            distance = float(task.distances_to(wanted, _tensor(codec.decode(coded)), scale)[0])
            sums[i] += 8 * len(to_bytes(coded)) / (frame.height * frame.width), distance
    return sums / len(pictures)


def choose(curves: Mapping[int, NDArray[np.float64]], tolerance: float) -> list[int]:
    """For each quality the smallest size within `tolerance` of the best one's rate at equal distance.

    `curves`: by size in 1/16, [8, 2] of rate and distance. Sizes do not fall with quality.
    """
    chosen: list[int] = []
    for level in range(LEVELS):
        allowed = [s for s in sorted(curves) if not chosen or s >= chosen[-1]]
        excess = {s: _excess(curves, s, level) for s in allowed}
        chosen.append(next((s for s in allowed if excess[s] <= np.log1p(tolerance)), allowed[-1]))
    return chosen


def _excess(curves: Mapping[int, NDArray[np.float64]], scale: int, level: int) -> float:
    """Log of the rate that `scale` needs at `level` over the least that any size needs at the distance reached."""
    rate, distance = np.log(curves[scale][level])
    needed = [rate]
    for curve in curves.values():
        rates, distances = np.log(curve[::-1]).T
        distances = np.maximum.accumulate(distances)
        if distances[0] <= distance <= distances[-1]:
            needed.append(float(np.interp(distance, distances, rates)))
    return float(rate - min(needed))


def _tensor(frame: Frame) -> torch.Tensor:
    return torch.from_numpy(frame.rgb.copy()).permute(2, 0, 1)[None].float() / 255
