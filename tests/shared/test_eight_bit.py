"""g_a in bytes: what it computes, layer by layer, and how little that differs from g_a in floats."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.codec import bitstream as bits
from shared.codec import codec as codec_module
from shared.codec import eight_bit
from shared.codec.codec import Codec
from shared.codec.eight_bit import EightBitAnalysis, has_byte_convolution, ranges
from shared.codec.transforms import AnalysisTransform, Architecture
from shared.codec.types import Frame
from shared.errors import InvalidBundle

FINEST = 8 * 256
needs_vnni = pytest.mark.skipif(not has_byte_convolution(), reason="no fast, exact convolution of bytes (VNNI) here")


@pytest.fixture(scope="module")
def in_floats() -> Codec:
    return Codec.load("detection", dtype=torch.float32)


def small_g_a() -> AnalysisTransform:
    torch.manual_seed(3)
    return AnalysisTransform(Architecture(c4=16, c8=16, c16=32, m=16)).requires_grad_(False)


def as_tensor(frame: Frame) -> Tensor:
    return torch.from_numpy(frame.rgb.copy()).permute(2, 0, 1)[None]


def crop(frame: Frame) -> Frame:
    return Frame(np.ascontiguousarray(frame.rgb[: frame.height // 16 * 16, : frame.width // 16 * 16]))


def reference(in_bytes: EightBitAnalysis, g_a: AnalysisTransform, rgb: Tensor) -> Tensor:
    """The same in float64, from the floats that all bytes stand for."""
    x = kept = F.pixel_unshuffle(rgb.double() - eight_bit.ZERO, eight_bit.UNSHUFFLE) / 255
    for (layer, role), (conv, _) in zip(in_bytes._layers, eight_bit._layers(g_a), strict=True):
        weight = conv.weight.double()
        steps = (weight.abs().amax((1, 2, 3), keepdim=True) / 127).float()
        made = F.conv2d(x, (weight / steps).round() * steps, layer.bias.double(), conv.stride, conv.padding)
        if role == "out":
            return made + g_a.short(rgb.float() / 255 - 0.5)
        if role == "relu":
            kept, made = x, made.relu()
        elif role == "added":
            made = made + kept
        scale = layer.made
        assert scale is not None
        x = ((made / scale.step).round() + scale.zero).clamp(0, 255).sub(scale.zero) * scale.step
    raise AssertionError("no last layer")


@needs_vnni
def test_bytes_compute_what_float64_does_with_the_numbers_they_stand_for(astronaut: Frame) -> None:
    g_a, rgb = small_g_a(), as_tensor(Frame(np.ascontiguousarray(astronaut.rgb[:96, :128])))
    in_bytes = EightBitAnalysis(g_a, ranges(g_a, [rgb.float() / 255]))
    made, expected = in_bytes(rgb), reference(in_bytes, g_a, rgb)
    spread = float(expected.std())
    # a half may round either way, and one byte's step is then off in what follows: few are, and by little
    assert float((made - expected).abs().mean()) < 2e-3 * spread
    assert float((made - expected).abs().max()) < 0.05 * spread


@needs_vnni
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32), (304, 16), (32, 144)])
def test_the_short_cut_is_as_exact_as_floats_need(
    height: int, width: int, in_floats: Codec, rng: np.random.Generator
) -> None:
    rgb = torch.from_numpy(rng.integers(0, 256, (2, 3, height, width), dtype=np.uint8))
    y = torch.from_numpy(rng.normal(size=(2, in_floats.g_a.short.out_channels, height // 16, width // 16)))
    conv = in_floats.g_a.short
    bias = None if conv.bias is None else conv.bias.double()
    expected = y + F.conv2d(rgb.double() / 255 - 0.5, conv.weight.double(), bias, conv.stride)
    made = eight_bit._ShortCut(conv).added_to(y.float(), eight_bit._unshuffled(rgb))
    # all bytes of pixels are as likely here, the worst case; a thousandth of what rounding to integers costs
    assert float(((made - expected) * in_floats._gain(FINEST)).square().mean()) < 1e-3 / 12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (16, 16), (15, 33), (31, 18)])
def test_pixels_beyond_the_last_ones_repeat_them(height: int, width: int, rng: np.random.Generator) -> None:
    rgb = torch.from_numpy(rng.integers(0, 256, (2, 3, height, width), dtype=np.uint8))
    whole = F.pad(rgb.float(), (0, -width % 16, 0, -height % 16), mode="replicate")
    blocks = F.pixel_unshuffle(whole, 4).reshape(2, 3, 16, *(side // 4 for side in whole.shape[2:]))
    expected = blocks.transpose(1, 2).flatten(1, 2).to(torch.uint8)
    assert torch.equal(eight_bit._unshuffled(rgb), expected)


@needs_vnni
def test_latents_are_off_by_a_twentieth_of_what_rounding_costs_at_most(
    codec: Codec, in_floats: Codec, photographs: dict[str, Frame]
) -> None:
    assert codec.g_a_in_bytes is not None
    gain = codec._gain(FINEST)
    for frame in photographs.values():
        off = (codec.latents([frame], FINEST) - in_floats.latents([frame], FINEST)) * gain
        assert float(off.square().mean()) < 0.05 / 12
        sizes = [len(bits.to_bytes(each.encode(frame, 8))) for each in (codec, in_floats)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.005)


@needs_vnni
@pytest.mark.parametrize("values", [0, 255, "noise", "extremes"])
def test_pictures_beyond_all_measured_ranges_are_clipped_and_no_more(
    values: int | str, codec: Codec, in_floats: Codec, rng: np.random.Generator
) -> None:
    shape = (160, 208, 3)
    if values == "noise":
        rgb = rng.integers(0, 256, shape, dtype=np.uint8)
    elif values == "extremes":
        rgb = (255 * rng.integers(0, 2, shape)).astype(np.uint8)
    else:
        rgb = np.full(shape, values, np.uint8)
    frame, gain = Frame(rgb), codec._gain(FINEST)
    off = (codec.latents([frame], FINEST) - in_floats.latents([frame], FINEST)) * gain
    assert float(off.square().mean()) < 0.1 / 12


@needs_vnni
def test_bands_and_batches_are_what_one_whole_frame_gives(
    codec: Codec, photographs: dict[str, Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = crop(photographs["coffee"])
    whole = codec.latents([frame], FINEST)
    mirrored = Frame(np.ascontiguousarray(frame.rgb[:, ::-1]))
    torch.testing.assert_close(codec.latents([mirrored, frame], FINEST)[1:], whole, rtol=0, atol=1e-3)
    monkeypatch.setattr(codec_module, "BAND_PIXELS", 1)
    torch.testing.assert_close(codec.latents([frame], FINEST), whole, rtol=0, atol=1e-3)


@needs_vnni
def test_a_number_type_that_was_asked_for_and_a_bundle_without_ranges_are_in_floats(codec: Codec) -> None:
    assert Codec(codec.bundle).g_a_in_bytes is not None
    assert Codec(codec.bundle, dtype=torch.float32).g_a_in_bytes is None
    older = {key: value for key, value in codec.bundle.info.items() if key != "ranges"}
    assert Codec(replace(codec.bundle, info=older)).g_a_in_bytes is None


def test_without_fast_bytes_the_floats_do_it(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "has_byte_convolution", lambda: False)
    assert Codec(codec.bundle).g_a_in_bytes is None


@needs_vnni
def test_a_convolution_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating(eight_bit._ByteConv):
        def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
            return super().__call__(x, onto).clamp(max=2.0**23)

    monkeypatch.setattr(eight_bit, "_ByteConv", Saturating)
    has_byte_convolution.cache_clear()
    assert not has_byte_convolution()
    monkeypatch.undo()
    has_byte_convolution.cache_clear()
    assert has_byte_convolution()


@pytest.mark.parametrize("largest", [[], [1.0] * 8, [1.0] * 8 + [0.0], [1.0] * 8 + [float("nan")], [1.0] * 8 + ["1"]])
def test_ranges_that_do_not_fit_are_refused(largest: list[Any]) -> None:
    with pytest.raises(InvalidBundle, match="expected 9 positive numbers"):
        EightBitAnalysis(small_g_a(), largest)


def test_the_bundles_ranges_hold_photographs(codec: Codec, in_floats: Codec, photographs: dict[str, Frame]) -> None:
    written = codec.bundle.info["ranges"]["g_a"]
    seen = ranges(in_floats.g_a, [as_tensor(crop(frame)).float() / 255 for frame in photographs.values()])
    assert len(seen) == len(written)
    assert all(one < eight_bit.MARGIN * most for one, most in zip(seen, written, strict=True))
