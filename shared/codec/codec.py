"""Frame in, bitstream out, and back: the codec as edge and cloud call it.

    encode   rgb -> resize -> g_a -> y * gain -> h_a -> round -> z_hat -> h_s -> round(y - mean) -> rANS
    decode   rANS -> z_hat -> h_s -> rANS -> symbols + mean -> / gain -> g_s -> resize -> rgb

Left of z_hat and right of y_hat floats rule; between them all is integer (see `shared.codec.hyper`). A bundle with a
context model codes latents in two passes, the second knowing the first. A bundle says for
each quality at which size pictures are coded: a detector looks at a few hundred pixels, and what it never sees need
not be sent. Size and quality of a frame give the coded size by integers alone, so it costs no byte. Frames larger
than `BAND_PIXELS` pass g_a and g_s in overlapping bands of rows, so that memory stays bounded; the overlap exceeds
the transforms' receptive field, so that a band's inside is what the whole frame would have given.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.codec import bitstream as bits
from shared.codec import rans
from shared.codec.bundle import FULL_SIZE, SCALE_STEPS, SCALE_TENSOR, Bundle, load_bundle
from shared.codec.eight_bit import EightBitAnalysis, has_byte_convolution
from shared.codec.elementwise import assembled, rounded
from shared.codec.hyper import HyperSynthesis, IntegerHyperSynthesis, first_pass
from shared.codec.integers import has_int8_matmul, is_compiled_for, rows_of
from shared.codec.precision import fast_dtype
from shared.codec.tables import EntropyTables
from shared.codec.transforms import (
    STRIDE_Y,
    AnalysisTransform,
    HyperAnalysisTransform,
    SynthesisTransform,
    interpolate_levels,
)
from shared.codec.types import (
    MEAN_STEPS,
    QUALITY_MAX,
    QUALITY_MIN,
    Bitstream,
    Frame,
    Symbols,
    at_quality,
    quality_to_steps,
)
from shared.errors import InvalidBitstream, InvalidBundle, NumericalError, SymbolsMismatch, UnknownModel

_Transform = TypeVar("_Transform", AnalysisTransform, HyperAnalysisTransform, SynthesisTransform)

BAND_PIXELS = 3_000_000
HALO = 8  # latent rows; the receptive field of either transform ends within 6
SYMBOL_MAX = 2**24  # beyond it neither float32 latents nor int32 y_hat in 1/16 steps are exact


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Shapes of what is coded for a frame: `y` (M, hy, wy) and `z` (Z, hz, wz)."""

    y: tuple[int, int, int]
    z: tuple[int, int, int]


class Codec:
    """One weights bundle, ready to encode and decode. Safe to call from several threads.

    `device`: "cpu" or "cuda[:n]". `dtype`: of the transforms' bodies, float32, bfloat16 or float16; by default
    bfloat16 where the processor has instructions for it, else float32, and g_a in bytes where the processor and the
    bundle are for it (`shared.codec.eight_bit`). `threads`: sets torch's process-wide thread count.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.bundle = bundle
        self.model_id = bundle.model_id
        self.device = torch.device(device)
        self.dtype = dtype or fast_dtype(self.device)
        arch = bundle.architecture
        self.g_a = self._transform("g_a", AnalysisTransform(arch))
        self.g_a_in_bytes = self._in_bytes() if dtype is None else None
        self.h_a = self._transform("h_a", HyperAnalysisTransform(arch))
        self.g_s = self._transform("g_s", SynthesisTransform(arch))
        self.h_s = HyperSynthesis(IntegerHyperSynthesis.from_arrays(bundle.arrays), self.device)
        self._gain, self._inverse_gain = self._gains("gain.log"), self._gains("gain.log_inverse")
        self._scales = np.asarray(bundle.arrays.get(SCALE_TENSOR, FULL_SIZE), np.int64)
        self.tables_y = EntropyTables.from_arrays(bundle.arrays, "tables.y")
        self.tables_z = EntropyTables.from_arrays(bundle.arrays, "tables.z")

    @classmethod
    def load(
        cls,
        reference: str | Path = "detection",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> "Codec":
        """Load a bundled codec by name or a bundle by folder. Raises UnknownModel, InvalidBundle."""
        return cls(load_bundle(reference), device=device, dtype=dtype, threads=threads)

    # -- the two ways through ------------------------------------------------------------------------------------

    def encode(self, frame: Frame, quality: float = 4.0) -> Bitstream:
        """Code one frame at a quality in [1, 8]. Raises InvalidQuality, NumericalError."""
        return self.encode_batch([frame], quality)[0]

    def decode(self, bitstream: Bitstream) -> Frame:
        """Decode one bitstream. Raises InvalidBitstream, UnknownModel."""
        return self.decode_batch([bitstream])[0]

    def encode_batch(self, frames: Sequence[Frame], quality: float = 4.0) -> list[Bitstream]:
        """Code frames of any sizes; frames of one size pass the transforms together."""
        return [self.pack(symbols) for symbols in self.analyse(frames, quality)]

    def decode_batch(self, bitstreams: Sequence[Bitstream]) -> list[Frame]:
        """Decode bitstreams of any sizes; frames of one size pass the transforms together."""
        return self.synthesise([self.unpack(stream) for stream in bitstreams])

    def encode_to_size(self, frame: Frame, target_bytes: int) -> Bitstream:
        """The highest quality whose byte form is at most `target_bytes`; quality 1 where none is that small.

        Bisects over quality; the transform runs once a coded size. Bytes grow with quality, though not strictly: the
        answer fits, a slightly higher quality that also fits may exist.
        """
        latents: dict[int, Tensor] = {}

        def at(quality: int) -> Bitstream:
            scale = self.scale(quality)
            if scale not in latents:
                latents[scale] = self.latents([frame], quality)
            return self.pack(self.quantise(latents[scale], [quality], [frame])[0])

        low, high = QUALITY_MIN, QUALITY_MAX
        best = at(low)
        while low < high:
            middle = (low + high + 1) // 2
            candidate = at(middle)
            if len(bits.to_bytes(candidate)) <= target_bytes:
                low, best = middle, candidate
            else:
                high = middle - 1
        return best

    def reconstruct_unquantised(self, frame: Frame, quality: float = 8.0) -> Frame:
        """g_s(g_a(x)) with neither rounding nor coding: the control that shows what quantisation costs."""
        steps = quality_to_steps(quality)
        gain = self._gain(steps) * self._inverse_gain(steps)
        size = (frame.height, frame.width)
        return self._synthesise_group(self.latents([frame], steps) * gain, size, self.coded_size(*size, steps))[0]

    # -- stages --------------------------------------------------------------------------------------------------

    def analyse(self, frames: Sequence[Frame], quality: float = 4.0) -> list[Symbols]:
        """Transform and quantise: everything of encoding but the entropy coder."""
        steps = quality_to_steps(quality)
        out: list[Symbols | None] = [None] * len(frames)
        for group in _groups([(f.height, f.width) for f in frames]):
            members = [frames[i] for i in group]
            for i, symbols in zip(
                group, self.quantise(self.latents(members, steps), [steps] * len(members), members), strict=True
            ):
                out[i] = symbols
        return [symbols for symbols in out if symbols is not None]

    def pack(self, symbols: Symbols) -> Bitstream:
        """Entropy-code both streams."""
        return Bitstream(
            model_id=self.model_id,
            quality=symbols.quality,
            height=symbols.height,
            width=symbols.width,
            hyper=rans.encode(symbols.z_hat.ravel(), _channel_indexes(symbols.z_hat.shape), self.tables_z),
            latents=self._pack_latents(symbols.symbols, symbols.scale_indexes),
            symbols_crc=bits.symbols_crc(
                symbols.quality, symbols.height, symbols.width, symbols.z_hat, symbols.symbols
            ),
        )

    def unpack(self, bitstream: Bitstream, *, check: bool = True) -> Symbols:
        """Entropy-decode both streams and check the symbols. Raises InvalidBitstream, UnknownModel.

        `check`: False skips the comparison with the symbols' CRC, for measurements of damage.
        """
        if bitstream.model_id != self.model_id:
            raise UnknownModel(f"bitstream is for model {bitstream.model_id}, this codec is {self.model_id}")
        shape = self.latent_shape(bitstream.height, bitstream.width, bitstream.quality)
        bits.check_streams(bitstream, self.tables_z, shape.z, shape.y)  # before anything of that size is made
        z_hat = rans.decode(bitstream.hyper, _channel_indexes(shape.z), self.tables_z).reshape(shape.z)
        symbols, means, scale_indexes = self._unpack_latents(z_hat, bitstream, shape.y)
        crc = bits.symbols_crc(bitstream.quality, bitstream.height, bitstream.width, z_hat, symbols)
        if check and crc != bitstream.symbols_crc:
            raise SymbolsMismatch(
                f"decoded symbols have CRC-32C {crc:08x}, expected {bitstream.symbols_crc:08x}: damaged stream, or "
                "encoder and decoder differ in tables or arithmetic"
            )
        return Symbols(
            z_hat,
            symbols,
            means,
            scale_indexes,
            bitstream.quality,
            bitstream.height,
            bitstream.width,
        )

    def synthesise(self, symbols: Sequence[Symbols]) -> list[Frame]:
        """y_hat to pictures; frames of one size, coded at one size, pass g_s together."""
        out: list[Frame | None] = [None] * len(symbols)
        for group in _groups([(s.height, s.width, self.scale(s.quality)) for s in symbols]):
            members = [symbols[i] for i in group]
            y_hat = torch.from_numpy(np.stack([s.y_hat for s in members])).to(self.device)
            inverse = torch.cat([self._inverse_gain(s.quality) for s in members])
            scaled = y_hat.float().mul_(1 / MEAN_STEPS).mul_(inverse)
            size = (members[0].height, members[0].width)
            coded = self.coded_size(*size, members[0].quality)
            for i, frame in zip(group, self._synthesise_group(scaled, size, coded), strict=True):
                out[i] = frame
        return [frame for frame in out if frame is not None]

    def scale(self, quality: int) -> int:
        """Sides of the coded picture in 1/SCALE_STEPS of the frame's. `quality` in 1/256 steps."""
        return int(at_quality(self._scales, quality))

    def coded_size(self, height: int, width: int, quality: int) -> tuple[int, int]:
        """Height and width at which a frame is coded. `quality` in 1/256 steps."""
        scale = self.scale(quality)
        down, across = ((side * scale + SCALE_STEPS // 2) // SCALE_STEPS for side in (height, width))
        return max(1, down), max(1, across)

    def latent_shape(self, height: int, width: int, quality: int) -> LatentShape:
        """What a frame of that size is coded as at a quality in 1/256 steps."""
        height, width = self.coded_size(height, width, quality)
        hy, wy = -(-height // STRIDE_Y), -(-width // STRIDE_Y)
        arch = self.bundle.architecture
        return LatentShape((arch.m, hy, wy), (arch.z, -(-hy // 4), -(-wy // 4)))

    # -- inside --------------------------------------------------------------------------------------------------

    def _pack_latents(self, symbols: NDArray[np.int32], indexes: NDArray[np.uint8]) -> bytes:
        flat, flat_indexes, skip = symbols.ravel(), indexes.ravel(), self.bundle.skip_below
        if not self.h_s.parameters.context:
            return rans.encode(flat, flat_indexes, self.tables_y, skip)
        first, second = ((flat[part], flat_indexes[part]) for part in _passes(symbols.shape))
        return rans.encode_passes(first, second, self.tables_y, skip)

    def _unpack_latents(
        self, z_hat: NDArray[np.int32], bitstream: Bitstream, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        """Symbols, means and scale indexes [M, hy, wy] from the latent stream. Raises InvalidBitstream."""
        prior = self.h_s.prior(torch.from_numpy(z_hat)[None], [bitstream.quality], (shape[1], shape[2]))
        means, indexes = prior.coding()
        if not self.h_s.parameters.context:
            coded_by = _channels_first(indexes)[0]
            flat = rans.decode(bitstream.latents, coded_by.ravel(), self.tables_y, self.bundle.skip_below)
            return _checked(flat.reshape(shape)), _channels_first(means)[0], coded_by
        symbols = np.zeros(shape, np.int32)
        decoder = rans.PassDecoder(bitstream.latents, self.tables_y, self.bundle.skip_below)
        first, second = _passes(shape)
        symbols.reshape(-1)[first] = decoder.first(_channels_first(indexes)[0].ravel()[first])
        means, indexes = self.h_s.given(prior, torch.from_numpy(_checked(symbols))[None].permute(0, 2, 3, 1))
        coded_by = _channels_first(indexes)[0]
        symbols.reshape(-1)[second] = decoder.second(coded_by.ravel()[second])
        return _checked(symbols), _channels_first(means)[0], coded_by

    def _transform(self, name: str, module: _Transform) -> _Transform:
        prefix = name + "."
        state = {
            key[len(prefix) :]: torch.from_numpy(np.asarray(value))
            for key, value in self.bundle.arrays.items()
            if key.startswith(prefix)
        }
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InvalidBundle(f"bundle {self.bundle.name!r} does not fit {name}: {error}") from error
        module.eval().requires_grad_(False).to(self.device)
        module.to(memory_format=torch.channels_last)
        # what leads to latents and hyper-latents ends in float32, pixels do not need it
        (module if isinstance(module, SynthesisTransform) else module.body).to(self.dtype)
        return module

    def _gains(self, name: str) -> Callable[[int], Tensor]:
        """What multiplies latents at a quality in 1/256 steps, float32 [1, M, 1, 1]; each is worked out once."""
        logarithms = torch.from_numpy(self.bundle.arrays[name].astype(np.float32)).to(self.device)
        return functools.cache(lambda quality: interpolate_levels(logarithms, torch.tensor([quality]).to(self.device)))

    def _in_bytes(self) -> EightBitAnalysis | None:
        ranges = self.bundle.info.get("ranges")
        if (
            not isinstance(ranges, dict)
            or self.device.type != "cpu"
            or not (has_byte_convolution() and has_int8_matmul())
        ):
            return None
        return EightBitAnalysis(self.g_a, ranges.get("g_a", ()))

    @torch.no_grad()
    def latents(self, frames: Sequence[Frame], quality: int) -> Tensor:
        """g_a of frames of one size: y before any gain, float32 [B, M, hy, wy]. Raises NumericalError.

        `quality`, in 1/256 steps, decides nothing here but the size at which the frames are coded.
        """
        height, width = frames[0].height, frames[0].width
        shape = self.latent_shape(height, width, quality).y
        if len(frames) == 1:
            rgb = torch.from_numpy(np.require(frames[0].rgb, requirements="W"))[None]
        else:
            rgb = torch.from_numpy(np.stack([f.rgb for f in frames]))
        rgb = rgb.to(self.device).permute(0, 3, 1, 2)
        coded = self.coded_size(height, width, quality)
        if coded != (height, width):
            rgb = _reduced(rgb, coded)

        def band(top: int, bottom: int) -> Tensor:
            part = rgb[:, :, top * STRIDE_Y : bottom * STRIDE_Y]
            if self.g_a_in_bytes is not None:
                return self.g_a_in_bytes(part)
            missing = ((bottom - top) * STRIDE_Y - part.shape[2], shape[2] * STRIDE_Y - coded[1])
            if any(missing):
                part = _replicate(part, bottom=missing[0], right=missing[1])
            y: Tensor = self.g_a(part.to(self.dtype).div_(255))
            return y

        y = _in_bands(band, shape[1], shape[2], lambda part, skip, rows: part[:, :, skip : skip + rows])
        if not bool(torch.isfinite(y.sum())):  # which any of them would spoil
            raise NumericalError("g_a gave NaN or infinity; expected finite latents")
        return y

    @torch.no_grad()
    def quantise(self, y: Tensor, qualities: list[int], frames: Sequence[Frame]) -> list[Symbols]:
        """Latents to symbols, each frame at its own quality in 1/256 steps. Raises NumericalError."""
        y = y * torch.cat([self._gain(quality) for quality in qualities])
        z_hat = self.h_a(y.to(self.dtype)).round_().to(torch.int32, memory_format=torch.contiguous_format)
        return self.quantise_given(z_hat, y, qualities, frames)

    @torch.no_grad()
    def quantise_given(self, z_hat: Tensor, y: Tensor, qualities: list[int], frames: Sequence[Frame]) -> list[Symbols]:
        """Scaled latents to symbols under these hyper-latents, int32 [B, Z, hz, wz]. Raises NumericalError."""
        prior = self.h_s.prior(z_hat, qualities, (y.shape[2], y.shape[3]))
        y = y.permute(0, 2, 3, 1)
        means, indexes = prior.coding()
        symbols = self._symbols(y, means, indexes)
        if self.h_s.parameters.context:
            means, indexes = self.h_s.given(prior, symbols)
            symbols = self._symbols(y, means, indexes)
        coded = (z_hat.cpu().numpy(), *(_channels_first(column) for column in (symbols, means, indexes)))
        each = zip(*coded, qualities, frames, strict=True)
        return [Symbols(z, s, m, i, quality, frame.height, frame.width) for z, s, m, i, quality, frame in each]

    def _symbols(self, y: Tensor, means: Tensor, indexes: Tensor) -> Tensor:
        """All [B, hy, wy, M]."""
        if is_compiled_for(self.device):
            symbols = torch.empty(y.shape, dtype=torch.int32)
            codes = (rows_of(column) for column in (y, means, indexes))
            largest = rounded(*codes, 1 / MEAN_STEPS, self.bundle.skip_below, SYMBOL_MAX, rows_of(symbols))
        else:
            residual = (y - means.to(torch.float32) * (1 / MEAN_STEPS)).round_()
            symbols = residual.clamp_(-SYMBOL_MAX, SYMBOL_MAX).to(torch.int32)
            symbols.masked_fill_(indexes < self.bundle.skip_below, 0)
            largest = int(symbols.abs().max())
        if largest >= SYMBOL_MAX:
            raise NumericalError(f"a latent is {SYMBOL_MAX} steps or more from its mean; expected fewer")
        return symbols

    @torch.no_grad()
    def _synthesise_group(self, y: Tensor, size: tuple[int, int], coded: tuple[int, int]) -> list[Frame]:
        def band(top: int, bottom: int) -> Tensor:
            part = y[:, :, top:bottom].to(self.dtype, memory_format=torch.channels_last)
            return self._pixels(part) if is_compiled_for(self.device) else self.g_s(part)

        def crop(part: Tensor, skip: int, rows: int) -> Tensor:
            return part[:, :, skip * STRIDE_Y : (skip + rows) * STRIDE_Y]

        rgb = _in_bands(band, y.shape[2], y.shape[3], crop)[:, :, : coded[0], : coded[1]]
        if coded != size:  # of bytes, which is ten times as fast where torch has it, and loses 0.2 squared of them
            rgb = functional.interpolate(rgb.contiguous(memory_format=torch.channels_last), size, mode="bicubic")
        if rgb.dtype != torch.uint8:
            rgb = _to_bytes(rgb)
        pictures: NDArray[np.uint8] = rgb.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [Frame(picture) for picture in pictures]

    def _pixels(self, y: Tensor) -> Tensor:
        """g_s to bytes, uint8 [B, 3, 16 h, 16 w], channels last."""
        fine, coarse = (part.permute(0, 2, 3, 1).contiguous().numpy() for part in self.g_s.parts(y))
        batch, _, height, width = y.shape
        rgb = np.empty((batch, height * STRIDE_Y, width * STRIDE_Y, 3), np.uint8)
        assembled(fine, coarse, rgb)
        return torch.from_numpy(rgb).permute(0, 3, 1, 2)


def _reduced(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 pictures [B, 3, H, W] at a smaller size, low-pass filtered."""
    if rgb.device.type == "cpu":
        return functional.interpolate(rgb, size, mode="bicubic", antialias=True)
    return _to_bytes(functional.interpolate(rgb.float().div_(255), size, mode="bicubic", antialias=True))


def _to_bytes(rgb: Tensor) -> Tensor:
    """Pictures in [0, 1], overwritten, as uint8."""
    return rgb.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _in_bands(
    run: Callable[[int, int], Tensor], rows: int, columns: int, crop: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    """Run a transform over latent rows [0, rows), whole where it is small, else in bands with a halo around each."""
    step = max(16, BAND_PIXELS // (columns * STRIDE_Y * STRIDE_Y))
    if rows <= step + 2 * HALO:
        return run(0, rows)
    parts = []
    for top in range(0, rows, step):
        count = min(step, rows - top)
        start = max(0, top - HALO)
        parts.append(crop(run(start, min(rows, top + count + HALO)), top - start, count))
    return torch.cat(parts, dim=2)


def _replicate(x: Tensor, *, bottom: int, right: int) -> Tensor:
    """Pad by repeating the last row and column."""
    if right:
        x = torch.cat([x, x[:, :, :, -1:].expand(-1, -1, -1, right)], dim=3)
    if bottom:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, bottom, -1)], dim=2)
    return x


def _groups(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indexes of equal sizes together, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    return list(groups.values())


@functools.lru_cache(maxsize=64)
def _passes(shape: tuple[int, int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which of the latents, flat, are of the first pass, and which of the second."""
    first = first_pass(*shape).ravel()
    return np.flatnonzero(first), np.flatnonzero(~first)


def _channels_first(a: Tensor) -> NDArray[Any]:
    """[B, hy, wy, M] as an array [B, M, hy, wy] in that order."""
    batch, height, width, channels = a.shape
    moved: NDArray[Any] = a.reshape(batch, -1, channels).transpose(1, 2).contiguous().cpu().numpy()
    return moved.reshape(batch, channels, height, width)


def _checked(symbols: NDArray[np.int32]) -> NDArray[np.int32]:
    if symbols.size and max(int(symbols.max()), -int(symbols.min())) >= SYMBOL_MAX:
        raise InvalidBitstream(f"expected symbols below {SYMBOL_MAX} in size, the latent stream has larger ones")
    return symbols


def _channel_indexes(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Table index of every hyper-latent: its channel."""
    return np.repeat(np.arange(shape[0], dtype=np.uint8), shape[1] * shape[2])
