"""The entropy model on whole pictures: less rate for the same latents, in a bundle that any codec reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.codec.bitstream import from_bytes, to_bytes
from shared.codec.bundle import load_bundle
from shared.codec.codec import Codec
from shared.codec.types import Frame
from shared.errors import InvalidBundle, InvalidSettings
from tests.trainer.conftest import TINY
from trainer.crops import list_pictures
from trainer.entropy import EntropySettings, train_entropy, with_context
from trainer.export import export_bundle, trainable_from_bundle
from trainer.latents import start_from_blocks
from trainer.model import TrainableCodec


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, photograph_set: Path) -> Path:
    """A bundle of a block transform codec, whose entropy model knows nothing yet."""
    torch.manual_seed(0)
    read = [
        torch.from_numpy(p.read()).permute(2, 0, 1).float() / 255
        for p in list_pictures(photograph_set / "images", None)
    ]
    parts = [picture[:, :128, :192] for picture in read]
    codec = TrainableCodec(TINY)
    start_from_blocks(codec, parts)
    folder = tmp_path_factory.mktemp("plain")
    export_bundle(codec, parts, folder, name="plain", info={"task_network": "imagenet"}, scales=[8] + [16] * 7)
    return folder


@pytest.fixture
def settings(plain: Path, photograph_set: Path, imagenet_weights: Path, tmp_path: Path) -> EntropySettings:
    return EntropySettings(
        bundle=str(plain),
        images=photograph_set / "images",
        out=tmp_path / "run",
        network_weights=imagenet_weights,
        context=8,
        steps=60,
        batch=2,
        rate=2e-3,
        threads=1,
    )


def test_the_same_latents_take_fewer_bits_and_come_back(
    settings: EntropySettings, plain: Path, astronaut: Frame
) -> None:
    made = train_entropy(settings)
    before, after = Codec.load(plain), Codec.load(made)
    assert after.model_id != before.model_id
    assert after.bundle.architecture == replace(TINY, context=8)
    assert after.bundle.info["ranges"] == before.bundle.info["ranges"], "g_a is the same: its ranges are known better"
    for name, array in before.bundle.arrays.items():
        if name.startswith(("g_a.", "g_s.", "gain.", "level.")):
            np.testing.assert_array_equal(after.bundle.arrays[name], array)
    frame = Frame(np.ascontiguousarray(astronaut.rgb[:201, :310]))
    for quality in (1, 4, 8):
        data = to_bytes(after.encode(frame, quality))
        assert len(data) < 0.9 * len(to_bytes(before.encode(frame, quality)))
        symbols = after.unpack(from_bytes(data, [after.model_id]))
        np.testing.assert_array_equal(symbols.y_hat, after.analyse([frame], quality)[0].y_hat)
    about = load_bundle(made).info
    assert about["entropy_model"]["started_from"] == before.model_id
    assert about["entropy_model"]["rate_at_equal_distance"] < -0.05
    assert about["tuning_curve"]["step"] == settings.steps
    assert after.model_id in (made / "README.md").read_text()


def test_a_resumed_run_is_one_that_was_never_stopped(
    settings: EntropySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(settings, steps=6, checkpoint_minutes=0.0)
    whole = load_bundle(train_entropy(short))
    from trainer import entropy

    def killed(path: Path, state: dict[str, object], save=entropy.save_checkpoint) -> None:
        save(path, state)
        if state["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(entropy, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train_entropy(replace(short, out=settings.out / "again"))
    last = settings.out / "again" / "last.ckpt"
    assert (
        load_bundle(train_entropy(replace(short, out=settings.out / "again", resume=last))).model_id == whole.model_id
    )
    with pytest.raises(InvalidBundle, match="context"):
        train_entropy(replace(short, context=4, resume=last))


def test_a_context_model_adds_nothing_until_it_is_trained_and_one_that_is_there_is_kept(plain: Path) -> None:
    model = trainable_from_bundle(plain).eval()
    wide = with_context(model, 8).eval()
    assert with_context(wide, 4) is wide
    assert with_context(model, 0) is model
    x, steps = torch.rand(1, 3, 128, 128), torch.tensor([1000])
    with torch.no_grad():
        one, two = model(x, steps), wide(x, steps)
    for name in ("x_hat", "bits_y", "bits_z"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name))


def test_integers_go_back_to_the_floats_they_stand_for(
    settings: EntropySettings, tmp_path: Path, astronaut: Frame
) -> None:
    """A bundle is enough to go on from: what is exported again codes as it did, but for rounding twice."""
    made = train_entropy(settings)
    model = trainable_from_bundle(made)
    parts = [torch.from_numpy(astronaut.rgb[:128, :192].copy()).permute(2, 0, 1).float() / 255]
    export_bundle(model, parts, tmp_path / "again", name="again", info={}, scales=[8] + [16] * 7)
    sizes = [len(to_bytes(Codec.load(folder).encode(astronaut, 5))) for folder in (made, tmp_path / "again")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("change", [{"steps": 0}, {"rate": 0.0}, {"context": -1}, {"frame_scale": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: EntropySettings, change: dict[str, float]) -> None:
    with pytest.raises(InvalidSettings):
        replace(settings, **change)
