"""The integer hyper-decoder is the same function on every machine, whatever the process around it has switched on."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from shared.codec import hyper, integers
from shared.codec.codec import Codec
from shared.codec.hyper import CONTEXT, HyperSynthesis, IntegerHyperSynthesis, first_pass
from shared.errors import InvalidBundle
from tests.shared.hyper_reference import reference_given, reference_hyper_synthesis


def random_parameters(seed: int, z: int = 8, h: int = 8, m: int = 8, context: int = 0) -> IntegerHyperSynthesis:
    """Small but nasty: weights to the ends of their range, so that clamps, signs and rounding all occur."""
    return IntegerHyperSynthesis.from_arrays(random_arrays(seed, z, h, m, context))


def random_arrays(seed: int, z: int = 8, h: int = 8, m: int = 8, context: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((4 * h, z), (4 * h, h), (2 * m + context, h))
    arrays: dict[str, np.ndarray] = {
        "h_s.act_max": np.array([255, 255]),
        "h_s.shift": np.array([22, 23, 25]),
        "h_s.level_bias": rng.integers(-5000, 5000, (8, 4 * h)),
    }
    for i, (out, inner) in enumerate(shapes, start=1):
        arrays[f"h_s.weight{i}"] = rng.integers(-127, 128, (out, inner, 3, 3)).astype(np.int8)
        arrays[f"h_s.bias{i}"] = rng.integers(-3000, 3000, out)
        arrays[f"h_s.multiplier{i}"] = rng.integers(1000, 20000, out)
    if context:
        arrays |= {CONTEXT + "act_max": np.array([255]), CONTEXT + "shift": np.array([22, 23])}
        for i, (out, inner, size) in enumerate(((context, m, 3), (2 * m, context, 1)), start=1):
            arrays[f"{CONTEXT}weight{i}"] = rng.integers(-127, 128, (out, inner, size, size)).astype(np.int8)
            arrays[f"{CONTEXT}bias{i}"] = rng.integers(-3000, 3000, out)
            arrays[f"{CONTEXT}multiplier{i}"] = rng.integers(1000, 20000, out)
    return arrays


def run(parameters: IntegerHyperSynthesis, z_hat: np.ndarray, quality: int, size: tuple[int, int]):
    prior = HyperSynthesis(parameters).prior(torch.from_numpy(z_hat)[None], [quality], size)
    return channels_first(prior.coding())


def run_given(parameters: IntegerHyperSynthesis, z_hat: np.ndarray, quality: int, symbols: np.ndarray):
    h_s = HyperSynthesis(parameters)
    prior = h_s.prior(torch.from_numpy(z_hat)[None], [quality], symbols.shape[1:])
    return channels_first(h_s.given(prior, torch.from_numpy(symbols)[None].permute(0, 2, 3, 1)))


def channels_first(coding: tuple[torch.Tensor, torch.Tensor], i: int = 0) -> tuple[np.ndarray, np.ndarray]:
    means, indexes = (column[i].permute(2, 0, 1).numpy() for column in coding)
    return means, indexes


@contextmanager
def bfloat16_math() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_int8() -> Iterator[None]:
    """As on a processor whose bytes cannot be multiplied exactly or fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "has_int8_matmul", lambda: False)
        yield


@contextmanager
def without_int8_in_tf32() -> Iterator[None]:
    with without_int8(), tf32():
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a GPU, where torch does all of it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (hyper, integers):
            patch.setattr(module, "is_compiled_for", lambda device: False)
        yield


@contextmanager
def plainly() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    "around", [plainly, autocast, tf32, bfloat16_math, one_thread, without_int8, without_int8_in_tf32, without_kernels]
)
def test_equals_the_reference_on_200_random_latents_whatever_is_switched_on(around: Callable, codec: Codec) -> None:
    parameters = codec.h_s.parameters
    rng = np.random.default_rng(5)
    for _ in range(200):
        spread = float(rng.choice([0.5, 3.0, 40.0, 400.0]))
        z_hat = np.rint(rng.normal(0, spread, (parameters.layers[0].weight.shape[1], 1, 1))).astype(np.int32)
        quality = int(rng.integers(256, 2049))
        with around():
            means, indexes = run(parameters, z_hat, quality, (4, 4))
        expected_means, expected_indexes = reference_hyper_synthesis(parameters, z_hat, quality, (4, 4))
        np.testing.assert_array_equal(means, expected_means)
        np.testing.assert_array_equal(indexes, expected_indexes)


@pytest.mark.parametrize("seed", range(4))
def test_equals_unbounded_integers_with_extreme_weights(seed: int) -> None:
    parameters = random_parameters(seed)
    z_hat = np.random.default_rng(seed).integers(-300, 300, (8, 3, 2)).astype(np.int32)
    means, indexes = run(parameters, z_hat, 777, (11, 7))
    expected_means, expected_indexes = reference_hyper_synthesis(parameters, z_hat, 777, (11, 7), dtype=object)
    np.testing.assert_array_equal(means, expected_means.astype(np.int64))
    np.testing.assert_array_equal(indexes, expected_indexes.astype(np.int64))
    assert len(np.unique(indexes)) > 5, "a reference that always says the same tells nothing"


@pytest.mark.parametrize(
    "around", [plainly, autocast, bfloat16_math, without_int8, without_int8_in_tf32, without_kernels]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_second_pass_equals_unbounded_integers_with_extreme_weights(seed: int, around: Callable) -> None:
    parameters = random_parameters(seed, context=6)
    rng = np.random.default_rng(seed)
    z_hat = rng.integers(-300, 300, (8, 3, 2)).astype(np.int32)
    symbols = np.rint(rng.normal(0, 60, (8, 11, 7))).astype(np.int32)
    with around():
        means, indexes = run_given(parameters, z_hat, 777, symbols)
    expected_means, expected_indexes = reference_given(parameters, z_hat, 777, symbols, dtype=object)
    np.testing.assert_array_equal(means, expected_means.astype(np.int64))
    np.testing.assert_array_equal(indexes, expected_indexes.astype(np.int64))
    assert len(np.unique(indexes)) > 5, "a reference that always says the same tells nothing"


def test_the_second_pass_knows_the_first_and_nothing_else() -> None:
    parameters = random_parameters(5, context=6)
    rng = np.random.default_rng(5)
    z_hat = rng.integers(-50, 50, (8, 3, 2)).astype(np.int32)
    symbols = rng.integers(-9, 9, (8, 11, 7)).astype(np.int32)
    first = first_pass(8, 11, 7)
    assert first.sum() in (first.size // 2, first.size // 2 + 1)
    before, after = run(parameters, z_hat, 777, (11, 7)), run_given(parameters, z_hat, 777, symbols)
    other = run_given(parameters, z_hat, 777, np.where(first, symbols, symbols + 5))
    for plain, given, with_others in zip(before, after, other, strict=True):
        np.testing.assert_array_equal(plain[first], given[first])
        np.testing.assert_array_equal(given, with_others)
        assert (plain[~first] != given[~first]).mean() > 0.2
    with pytest.raises(ValueError, match="one pass"):
        run_given(random_parameters(5), z_hat, 777, symbols)


def test_golden_vector_of_the_second_pass_never_changes() -> None:
    parameters = random_parameters(99, context=8)
    rng = np.random.default_rng(99)
    z_hat = rng.integers(-50, 50, (8, 6, 5)).astype(np.int32)
    symbols = rng.integers(-200, 200, (8, 24, 20)).astype(np.int32)
    means, indexes = run_given(parameters, z_hat, 1300, symbols)
    digest = hashlib.sha256(means.astype("<i4").tobytes() + indexes.tobytes()).hexdigest()
    assert digest == "306d821d3151528f5880f3e2242267ca2058ee6f18e34c17fa5dc24c779df911"


def test_golden_vector_never_changes() -> None:
    parameters = random_parameters(99)
    z_hat = np.random.default_rng(99).integers(-50, 50, (8, 6, 5)).astype(np.int32)
    means, indexes = run(parameters, z_hat, 1300, (24, 20))
    digest = hashlib.sha256(means.astype("<i4").tobytes() + indexes.tobytes()).hexdigest()
    assert digest == "28c6391edba7040bde786f62126476473fb021d8b30b5b62d2d222833ffc3fbd"


def test_batch_and_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = random_parameters(3)
    z_hat = np.random.default_rng(3).integers(-20, 20, (3, 8, 9, 4)).astype(np.int32)
    qualities = [256, 1000, 2048]
    coding = HyperSynthesis(parameters).prior(torch.from_numpy(z_hat), qualities, (36, 15)).coding()
    monkeypatch.setattr("shared.codec.integers.BAND_BYTES", 1)
    for i, quality in enumerate(qualities):
        alone = run(parameters, z_hat[i], quality, (36, 15))
        np.testing.assert_array_equal(channels_first(coding, i), alone)


def test_batch_and_bands_change_nothing_of_the_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = random_parameters(3, context=6)
    rng = np.random.default_rng(3)
    z_hat = rng.integers(-20, 20, (3, 8, 9, 4)).astype(np.int32)
    symbols = rng.integers(-9, 9, (3, 8, 36, 15)).astype(np.int32)
    qualities = [256, 1000, 2048]
    h_s = HyperSynthesis(parameters)
    prior = h_s.prior(torch.from_numpy(z_hat), qualities, (36, 15))
    coding = h_s.given(prior, torch.from_numpy(symbols).permute(0, 2, 3, 1))
    monkeypatch.setattr("shared.codec.integers.BAND_BYTES", 1)
    for i, quality in enumerate(qualities):
        alone = run_given(parameters, z_hat[i], quality, symbols[i])
        np.testing.assert_array_equal(channels_first(coding, i), alone)


def test_parameters_that_could_leave_exact_integers_are_refused() -> None:
    arrays = random_arrays(0, context=6)
    IntegerHyperSynthesis.from_arrays(arrays)
    with pytest.raises(InvalidBundle, match="would not be exact"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.bias2": np.full(32, 2**40)})
    with pytest.raises(InvalidBundle, match="multipliers"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.multiplier3": np.full(16, 2**21)})
    with pytest.raises(InvalidBundle, match="int8"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.weight1": arrays["h_s.weight1"].astype(np.int16)})
    with pytest.raises(InvalidBundle, match="act_max"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.act_max": np.array([255, 256])})
    with pytest.raises(InvalidBundle, match="beside this h_s"):
        IntegerHyperSynthesis.from_arrays(arrays | {CONTEXT + "weight1": arrays[CONTEXT + "weight1"][:, :-1]})
    with pytest.raises(InvalidBundle, match="as long as its outputs"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.bias2": arrays["h_s.bias2"][:-1]})
    wide = np.ones((32, 8192, 3, 3), np.int8)
    with pytest.raises(InvalidBundle, match="products"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.weight2": wide})


def test_level_bias_is_the_table_at_whole_qualities_and_between_them_in_between() -> None:
    parameters = random_parameters(1)
    for level in range(8):
        np.testing.assert_array_equal(
            parameters.bias_at(256 * (level + 1)), parameters.layers[0].bias + parameters.level_bias[level]
        )
    low, middle, high = (parameters.bias_at(q) for q in (512, 640, 768))
    assert np.all((np.minimum(low, high) <= middle) & (middle <= np.maximum(low, high)))
