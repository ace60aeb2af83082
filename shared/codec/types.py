"""What passes between the stages of the codec: one frozen, typed object at each.

    Frame --Codec.analyse--> Symbols --Codec.pack--> Bitstream --Codec.unpack--> Symbols --Codec.synthesise--> Frame

Notation follows the literature: `y` latents, `z` hyper-latents, `_hat` after quantisation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidImage, InvalidQuality

QUALITY_STEP = 256  # a quality is carried as an integer in 1/256 steps
QUALITY_MIN = 1 * QUALITY_STEP
QUALITY_MAX = 8 * QUALITY_STEP
MAX_SIDE = 8192  # pixels
MEAN_STEPS = 16  # a mean is carried in 1/16 of the quantisation step


def quality_to_steps(quality: float) -> int:
    """Quality in [1, 8] to its integer form in [256, 2048]. Raises InvalidQuality outside, or if not a number."""
    if not 1.0 <= quality <= 8.0:  # also false for NaN
        raise InvalidQuality(f"quality must be in [1, 8], got {quality}")
    return round(quality * QUALITY_STEP)


def at_quality(table: NDArray[np.int64], quality: int) -> NDArray[np.int64]:
    """What integers [8, ...] at quality 1 to 8 are at a quality in 1/256 steps: linear, rounding half up, no float."""
    low, fraction = divmod(min(max(quality, QUALITY_MIN), QUALITY_MAX) - QUALITY_MIN, QUALITY_STEP)
    high = min(low + 1, len(table) - 1)
    mixed: NDArray[np.int64] = (
        table[low] * (QUALITY_STEP - fraction) + table[high] * fraction + QUALITY_STEP // 2
    ) // QUALITY_STEP
    return mixed


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture. `rgb`: uint8 [height, width, 3], sRGB, sides in [1, 8192] pixels."""

    rgb: NDArray[np.uint8]

    def __post_init__(self) -> None:
        rgb = self.rgb
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise InvalidImage(f"a frame must be uint8 [height, width, 3], got {rgb.dtype} {list(rgb.shape)}")
        if not (1 <= rgb.shape[0] <= MAX_SIDE and 1 <= rgb.shape[1] <= MAX_SIDE):
            raise InvalidImage(f"frame sides must be in [1, {MAX_SIDE}], got {rgb.shape[1]}x{rgb.shape[0]}")

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])


@dataclass(frozen=True, slots=True)
class Symbols:
    """What the entropy coder codes, and what decides how: the same on both sides, bit by bit.

    `z_hat`: int32 [Z, hz, wz], rounded hyper-latents.
    `symbols`: int32 [M, hy, wy], round(y - mean) in quantisation steps.
    `means`: int32 [M, hy, wy], in 1/16 of the quantisation step; `scale_indexes`: uint8 [M, hy, wy]. Both from h_s.
    `quality`: integer in 1/256 steps, [256, 2048]. `height`, `width`: of the frame, pixels.
    """

    z_hat: NDArray[np.int32]
    symbols: NDArray[np.int32]
    means: NDArray[np.int32]
    scale_indexes: NDArray[np.uint8]
    quality: int
    height: int
    width: int

    @property
    def y_hat(self) -> NDArray[np.int32]:
        """Quantised latents in 1/16 of the quantisation step, int32 [M, hy, wy]; exact on every machine."""
        return self.symbols * np.int32(MEAN_STEPS) + self.means


@dataclass(frozen=True, slots=True)
class Bitstream:
    """One coded frame; `shared.codec.bitstream` gives it its bytes.

    `model_id`: hex SHA-256 of the weights bundle (the byte form carries a prefix of it).
    `hyper`, `latents`: the two rANS streams.
    `symbols_crc`: CRC-32C over header fields and decoded symbols, catches a table or platform mismatch.
    """

    model_id: str
    quality: int
    height: int
    width: int
    hyper: bytes
    latents: bytes
    symbols_crc: int
