"""The integer hyper-decoder is the same function on every machine, whatever the process around it has switched on."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from shared.codec.codec import Codec
from shared.codec.hyper import HyperSynthesis, IntegerHyperSynthesis
from shared.errors import InvalidBundle
from tests.shared.hyper_reference import reference_hyper_synthesis


def random_parameters(seed: int, z: int = 8, h: int = 8, m: int = 8) -> IntegerHyperSynthesis:
    """Small but nasty: weights to the ends of their range, so that clamps, signs and rounding all occur."""
    rng = np.random.default_rng(seed)
    shapes = ((4 * h, z), (4 * h, h), (2 * m, h))
    arrays: dict[str, np.ndarray] = {
        "h_s.act_max": np.array([255, 255]),
        "h_s.shift": np.array([22, 23, 25]),
        "h_s.level_bias": rng.integers(-5000, 5000, (8, 4 * h)),
    }
    for i, (out, inner) in enumerate(shapes, start=1):
        arrays[f"h_s.weight{i}"] = rng.integers(-127, 128, (out, inner, 3, 3)).astype(np.int8)
        arrays[f"h_s.bias{i}"] = rng.integers(-3000, 3000, out)
        arrays[f"h_s.multiplier{i}"] = rng.integers(1000, 20000, out)
    return IntegerHyperSynthesis.from_arrays(arrays)


def run(parameters: IntegerHyperSynthesis, z_hat: np.ndarray, quality: int, size: tuple[int, int]):
    means, indexes = HyperSynthesis(parameters)(torch.from_numpy(z_hat)[None], [quality], size)
    return means[0].numpy(), indexes[0].numpy()


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
def plainly() -> Iterator[None]:
    yield


@pytest.mark.parametrize("around", [plainly, autocast, tf32, bfloat16_math, one_thread])
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
    means, indexes = HyperSynthesis(parameters)(torch.from_numpy(z_hat), qualities, (36, 15))
    monkeypatch.setattr("shared.codec.hyper.BAND_BYTES", 1)
    for i, quality in enumerate(qualities):
        alone = run(parameters, z_hat[i], quality, (36, 15))
        np.testing.assert_array_equal(means[i].numpy(), alone[0])
        np.testing.assert_array_equal(indexes[i].numpy(), alone[1])


def test_parameters_that_could_leave_exact_integers_are_refused() -> None:
    good = random_parameters(0)
    arrays = {
        "h_s.act_max": np.array(good.act_max),
        "h_s.shift": np.array([layer.shift for layer in good.layers]),
        "h_s.level_bias": good.level_bias,
    }
    for i, layer in enumerate(good.layers, start=1):
        arrays |= {f"h_s.weight{i}": layer.weight, f"h_s.bias{i}": layer.bias, f"h_s.multiplier{i}": layer.multiplier}
    IntegerHyperSynthesis.from_arrays(arrays)
    with pytest.raises(InvalidBundle, match="would not be exact"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.bias2": np.full(32, 2**40)})
    with pytest.raises(InvalidBundle, match="multipliers"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.multiplier3": np.full(16, 2**21)})
    with pytest.raises(InvalidBundle, match="int8"):
        IntegerHyperSynthesis.from_arrays(arrays | {"h_s.weight1": good.layers[0].weight.astype(np.int16)})


def test_level_bias_is_the_table_at_whole_qualities_and_between_them_in_between() -> None:
    parameters = random_parameters(1)
    for level in range(8):
        np.testing.assert_array_equal(
            parameters.bias_at(256 * (level + 1)), parameters.layers[0].bias + parameters.level_bias[level]
        )
    low, middle, high = (parameters.bias_at(q) for q in (512, 640, 768))
    assert np.all((np.minimum(low, high) <= middle) & (middle <= np.maximum(low, high)))
