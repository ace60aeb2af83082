"""Training a codec end to end, on a handful of photographs and a tiny architecture."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import save_file

from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import state_hash
from shared.codec.bitstream import from_bytes, to_bytes
from shared.codec.bundle import SCALE_TENSOR, load_bundle
from shared.codec.codec import Codec
from shared.codec.eight_bit import ranges
from shared.codec.transforms import Architecture
from shared.codec.types import Frame
from shared.errors import InvalidBundle, InvalidImage, InvalidInput, InvalidSettings, NumericalError, Unavailable
from tests.trainer.conftest import PHOTOGRAPHS, TINY
from trainer.checkpoints import read_checkpoint, require_room
from trainer.crops import (
    CodedSizes,
    CropNumbers,
    Crops,
    collate,
    crop_targets,
    list_pictures,
    resized_to,
    whole_pictures,
)
from trainer.data import load_coco
from trainer.model import TrainableCodec
from trainer.quantise import LOG_STEP
from trainer.schedule import Schedule
from trainer.settings import TrainSettings, from_toml, to_toml
from trainer.train import CodecTraining, train_codec


@pytest.fixture
def settings(tmp_path: Path, photograph_set: Path, imagenet_weights: Path) -> TrainSettings:
    return TrainSettings(
        out=tmp_path / "run",
        images=photograph_set / "images",
        network_weights=imagenet_weights,
        steps=8,
        crop=64,
        batch=4,
        rate=2e-3,
        balance_every=3,
        accelerator="cpu",
        bf16=False,
        threads=1,  # as few as tiny layers can use
        harvest_pictures=2,
        architecture=TINY,
        schedule=Schedule(warmup_steps=2),
    )


def test_a_run_from_nothing_lowers_its_loss_and_ends_in_a_bundle_that_codes_pictures(settings: TrainSettings):
    settings = replace(settings, crop=128)
    hardly = replace(settings, out=settings.out / "hardly", steps=1)
    train_codec(hardly)
    (first,) = read_checkpoint(hardly.out / "last.pt")["curves"]
    settings = replace(settings, steps=100, harvest_minutes=0.2, bf16=None, name="tiny")
    folder = train_codec(settings)
    state = read_checkpoint(settings.out / "last.pt")
    last = state["curves"][-1]
    assert last["step"] == 100
    assert sum(last["distance"]) < 0.5 * sum(first["distance"])
    assert 0 < len(list(settings.out.glob("harvest-*.pt"))) <= settings.harvest_keep

    codec = Codec.load(folder)
    frame = Frame(skimage.data.coffee()[:200, :300])
    small, large = (codec.encode(frame, quality) for quality in (1.0, 8.0))
    decoded = codec.decode(from_bytes(to_bytes(large), {codec.model_id}))
    assert len(to_bytes(small)) < len(to_bytes(large))
    error = np.square(np.asarray(decoded.rgb, np.float64) - frame.rgb).mean()
    assert error < 0.5 * np.square(frame.rgb - frame.rgb.mean((0, 1))).mean()

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provenance"]["steps"] == 100
    assert manifest["provenance"]["data"]["count"] == len(PHOTOGRAPHS)
    assert manifest["tuning_curve"]["step"] in [c["step"] for c in state["curves"]]
    assert codec.model_id in (folder / "README.md").read_text()
    assert from_toml(settings.out / "settings.toml") == settings
    assert (settings.out / "schedule.png").exists()
    assert list((settings.out / "tensorboard").iterdir())


def test_a_run_goes_on_from_a_bundle(settings: TrainSettings, tmp_path: Path):
    folder = train_codec(settings)
    trained = read_checkpoint(settings.out / "last.pt")["net"]
    again = replace(
        settings, out=tmp_path / "again", start_from=str(folder), steps=1, rate=1e-9, architecture=None, balance_every=0
    )
    train_codec(again)
    went_on = read_checkpoint(again.out / "last.pt")["net"]
    for name, value in went_on.items():
        if not name.startswith("h_s."):
            torch.testing.assert_close(value, trained[name], rtol=2e-3, atol=2e-3, msg=name)  # as float16
    before, after = TrainableCodec(TINY), TrainableCodec(TINY)
    before.load_state_dict(trained)
    after.load_state_dict(went_on)
    z_hat = torch.randint(-3, 4, (2, TINY.z, 3, 2), generator=torch.Generator().manual_seed(1)).float()
    steps = torch.tensor([300, 1900])
    with torch.no_grad():  # h_s travels as the integers that it became: to a step of a mean and of a scale's index
        one, two = (codec.coding(torch.zeros(2, TINY.m, 12, 8), z_hat, steps) for codec in (before, after))
    for step, first, second in zip((1 / 16, LOG_STEP), one, two, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=step)


@pytest.mark.parametrize("as_coded", [False, True])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_coded: bool
):
    settings = replace(settings, ema=0.9, as_coded=as_coded, frame_scale=1.5, scales=(4, 5, 6, 8, 10, 12, 16, 16))
    train_codec(settings)
    stopped = replace(settings, out=tmp_path / "stopped")
    step = CodecTraining.training_step

    def interrupted(self: CodecTraining, batch: Any, index: int) -> None:
        if self.steps_done == 5:
            raise KeyboardInterrupt
        step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(CodecTraining, "training_step", interrupted)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - Lightning turns the interrupt into an exit
            train_codec(stopped)
    assert read_checkpoint(stopped.out / "last.pt")["step"] == 5
    train_codec(replace(stopped, resume=stopped.out / "last.pt"))
    whole, resumed = (read_checkpoint(s.out / "last.pt") for s in (settings, stopped))
    assert resumed["step"] == whole["step"] == 8
    assert resumed["balance"] == whole["balance"]
    assert resumed["curves"][-1] == whole["curves"][-1]
    for part in ("net", "average"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), name


def test_equal_settings_give_equal_bundles_and_another_seed_another(settings: TrainSettings, tmp_path: Path):
    settings = replace(settings, steps=3)
    ids = [
        Codec.load(train_codec(replace(settings, out=tmp_path / name, seed=seed))).model_id
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.slow  # two more processes import the trainer: over a minute on two cores
def test_two_processes_train_as_one_does_with_the_same_global_batch(settings: TrainSettings, tmp_path: Path):
    alone = replace(settings, steps=6, architecture=TINY)
    train_codec(alone)
    run_in_two_processes(replace(alone, out=tmp_path / "two", devices=2), tmp_path)
    one, two = (read_checkpoint(folder / "last.pt") for folder in (alone.out, tmp_path / "two"))
    assert two["step"] == one["step"]
    for key, norm in one["balance"].items():
        assert two["balance"][key] == pytest.approx(norm, rel=0.25), key  # a share's norms, averaged
    for name in ("bpp", "mse", "distance"):
        np.testing.assert_allclose(two["curves"][-1][name], one["curves"][-1][name], rtol=2e-3, err_msg=name)


@pytest.mark.slow  # as above
def test_two_processes_end_at_one_step_though_one_waited_for_measurements(settings: TrainSettings, tmp_path: Path):
    settings = replace(settings, steps=None, hours=12 / 3600, harvest_minutes=0.5 / 60, harvest_pictures=8, devices=2)
    run_in_two_processes(settings, tmp_path)
    assert (settings.out / "bundle" / "manifest.json").exists()


def run_in_two_processes(settings: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(to_toml(settings))
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from trainer.settings import from_toml\nfrom trainer.train import train_codec\n"
        "if __name__ == '__main__':\n    train_codec(from_toml(Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "settings.toml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("kind", "masks"), [("ground-truth", True), ("self-labels", False)])
def test_a_detectors_own_loss_trains_the_codec(
    settings: TrainSettings, photograph_set: Path, tmp_path: Path, kind: str, masks: bool
):
    torch.manual_seed(0)
    model = BundledRCNN(masks=masks)
    (tmp_path / "network").mkdir()
    save_file(model.state_dict(), tmp_path / "network" / "weights.safetensors")
    manifest = {"architecture": f"{'mask' if masks else 'faster'}-rcnn-mobilenetv2-fpn", "model_id": state_hash(model)}
    (tmp_path / "network" / "manifest.json").write_text(json.dumps(manifest))
    settings = replace(
        settings,
        annotations=photograph_set / "annotations.json",
        network=str(tmp_path / "network"),
        network_weights=None,
        task_loss=kind,
        steps=3,
        balance_every=2,
        schedule=Schedule(distortion_until=0.0, task_at=0.1, warmup_steps=1),
    )
    train_codec(settings)
    state = read_checkpoint(settings.out / "last.pt")
    assert state["balance"]["task"] > 0
    assert all(torch.isfinite(v).all() for v in state["net"].values() if v.is_floating_point())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(settings: TrainSettings):
    with pytest.raises(NumericalError, match=r"at step \d+.*(astronaut|coffee|chelsea|rocket)\.png") as caught:
        train_codec(replace(settings, rate=1e30, clip=1e30, steps=20))
    (path,) = settings.out.glob("step-*-not-finite.pt")
    assert str(path) in str(caught.value)
    assert read_checkpoint(path)["step"] < 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected COCO annotations"),
        ("{", "expected COCO annotations"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"images": [], "annotations": [], "categories": []}', "no images"),
        ('{"images": [], "annotations": [], "categories": [{"id": 700}]}', "outside the label space"),
    ],
)
def test_bad_annotations_are_told_before_the_first_step(settings: TrainSettings, tmp_path, content, message):
    path = tmp_path / "annotations.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        train_codec(replace(settings, annotations=path))
    assert not settings.out.exists()


def test_a_folder_without_pictures_and_a_broken_picture_are_told(settings: TrainSettings, tmp_path: Path):
    with pytest.raises(InvalidInput, match="expected a folder"):
        train_codec(replace(settings, images=tmp_path / "nowhere"))
    (tmp_path / "some").mkdir()
    with pytest.raises(InvalidInput, match="no pictures"):
        train_codec(replace(settings, images=tmp_path / "some"))
    (tmp_path / "some" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(InvalidImage, match=r"broken\.png"):
        train_codec(replace(settings, images=tmp_path / "some"))


def test_weights_of_another_architecture_are_told_apart(settings: TrainSettings, tmp_path: Path):
    torch.save({"net": TrainableCodec(TINY).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(InvalidBundle, match=r"another architecture.*expected"):
        train_codec(replace(settings, start_from=str(tmp_path / "other.pt"), architecture=Architecture(m=32)))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InvalidBundle, match=r"junk\.pt"):
        train_codec(replace(settings, start_from=str(tmp_path / "junk.pt")))


def test_a_disk_without_room_for_checkpoints_is_told(tmp_path: Path):
    with pytest.raises(Unavailable, match="MiB free"):
        require_room(tmp_path, TrainableCodec(TINY), 1 << 40)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": None},
        {"hours": 1.0},
        {"crop": 100},
        {"quality": 9},
        {"batch": 3, "devices": 2},
        {"task_loss": "ground-truth"},
        {"network": "imagenet", "network_weights": None},
        {"ema": 1.0},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: TrainSettings, wrong: dict[str, Any]):
    with pytest.raises(InvalidSettings):
        train_codec(replace(settings, **wrong))


def test_settings_survive_toml_and_unknown_ones_are_named(settings: TrainSettings, tmp_path: Path):
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings))
    assert from_toml(path) == settings
    path.write_text("colour = 'red'\n" + to_toml(settings))
    with pytest.raises(InvalidSettings, match="colour"):
        from_toml(path)


def test_rates_and_decodes_of_the_rounding_phase_are_those_of_evaluation():
    torch.manual_seed(0)
    codec = TrainableCodec(TINY)
    with torch.no_grad():
        codec.log_gain += 3.0  # symbols beyond zero
    x, steps = torch.rand(2, 3, 128, 128), torch.tensor([256, 2048])
    trained = codec.train()(x, steps, rounded=1.0)
    with torch.no_grad():
        evaluated = codec.eval()(x, steps)
    torch.testing.assert_close(trained.bits_y, evaluated.bits_y)
    torch.testing.assert_close(trained.x_hat, evaluated.x_hat)
    assert float(evaluated.bits_y.min()) > 100
    (gradient,) = torch.autograd.grad(trained.bits_y.sum(), trained.y)
    assert float(gradient.abs().max()) > 0


def test_crops_are_a_function_of_seed_and_number(photograph_set: Path):
    pictures = list_pictures(photograph_set / "images", None)
    one, again = (Crops(pictures, crop=64, seed=3, cache_bytes=room) for room in (1 << 30, 0))
    for number in (0, 5, 123456):
        a, b = one[number], again[number]
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert (a.quality_steps, a.name) == (b.quality_steps, b.name)
    assert not np.array_equal(one[0].pixels, Crops(pictures, crop=64, seed=4)[0].pixels)


def test_every_picture_is_seen_once_an_epoch_whatever_the_number_of_processes(photograph_set: Path):
    pictures = list_pictures(photograph_set / "images", None)
    crops = Crops(pictures, crop=64, seed=0)
    names = sorted(crops[n].name for n in range(len(pictures)))
    assert names == sorted(p.path.name for p in pictures)
    whole = next(iter(CropNumbers(7, 4)))
    shares = [next(iter(CropNumbers(7, 4, rank=rank, processes=2))) for rank in (0, 1)]
    assert whole == [*shares[0], *shares[1]] == [28, 29, 30, 31]


def test_crops_are_as_large_as_pictures_are_coded_at_their_quality(photograph_set: Path):
    pictures = list_pictures(photograph_set / "images", None)
    sizes = CodedSizes((4, 5, 6, 8, 10, 12, 16, 16), frame_scale=2.0, short_side=800)
    crops = Crops(pictures, crop=128, seed=3, sizes=sizes, batch=4)
    seen = set()
    for step in range(40):
        quality, zoom = sizes.of_step(3, step)
        expected = min(1.0, np.interp(quality, np.arange(1, 9), sizes.scales) / 16 * 2)
        assert 0.79 * expected <= zoom <= min(1.0, 1.26 * expected)
        batch = collate([crops[4 * step + i] for i in range(4)])
        side = batch.crops.shape[-1]
        assert side in (64, 128)
        assert abs(side - min(128, 400 * zoom)) <= 32  # no larger than the pictures become
        assert batch.originals is not None
        assert batch.originals.shape == (4, 3, round(side / zoom), round(side / zoom))
        assert all(abs(steps / 256 - quality) <= 1.51 for steps in batch.quality_steps.tolist())
        again = resized_to(batch.originals[0].permute(1, 2, 0).numpy(), (side, side))
        np.testing.assert_array_equal(batch.crops[0].permute(1, 2, 0).numpy(), again)
        seen |= set(batch.quality_steps.tolist())
    assert {256, 2048} <= seen


def test_a_run_of_crops_as_coded_measures_and_writes_each_quality_at_its_size(settings: TrainSettings):
    settings = replace(settings, crop=128, steps=4, as_coded=True, frame_scale=1.5, scales=(4, 5, 6, 8, 10, 12, 16, 16))
    folder = train_codec(settings)
    assert load_bundle(folder).arrays[SCALE_TENSOR].tolist() == list(settings.scales or ())
    assert from_toml(settings.out / "settings.toml") == settings
    (curve,) = read_checkpoint(settings.out / "last.pt")["curves"]
    small, large = (4 / 16) ** 2, (1 / 1.5) ** 2  # of a frame's pixels; pictures are not enlarged
    assert curve["bpp"][0] < 2 * small / large * curve["bpp"][7]


def test_a_bundles_ranges_are_of_whole_pictures(settings: TrainSettings):
    settings = replace(
        settings, steps=1, crop=128, frame_scale=1.0, as_coded=True, scales=(8, 9, 10, 11, 12, 14, 16, 16)
    )
    made = load_bundle(train_codec(settings))
    pictures = list_pictures(settings.images, None)
    sizes = [scale / 16 for scale in settings.scales or ()]
    seen = list(whole_pictures(pictures, len(pictures), sizes))
    for picture, size, tensor in zip(pictures, sizes, seen, strict=False):
        height, width = (round(side * size) for side in picture.read().shape[:2])
        assert tensor.shape == (3, -(-height // 16) * 16, -(-width // 16) * 16)
        assert tensor[:, height - 1, width - 1].equal(tensor[:, -1, -1]), "its border is repeated"
    own = ranges(Codec(made, dtype=torch.float32).g_a, [tensor[None] for tensor in seen])
    assert all(a <= 1.001 * b for a, b in zip(own, made.info["ranges"]["g_a"], strict=True)), "weights are in float16"


def test_levels_begin_as_what_others_were(settings: TrainSettings, tmp_path: Path):
    folder = train_codec(settings)
    moved = replace(
        settings,
        out=tmp_path / "moved",
        start_from=str(folder),
        architecture=None,
        steps=1,
        rate=1e-12,
        start_levels=(3, 3.5, 4, 5, 6, 7, 8, 8),
    )
    train_codec(moved)
    old, new = (read_checkpoint(s.out / "last.pt")["net"] for s in (settings, moved))
    for name in ("log_gain", "log_inverse_gain"):
        torch.testing.assert_close(new[name][[0, 2, 6, 7]], old[name][[2, 3, 7, 7]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new[name][1], old[name][2:4].mean(0), rtol=1e-4, atol=1e-4)


def test_small_pictures_are_padded_to_the_crop(photograph_set: Path):
    crops = Crops(list_pictures(photograph_set / "images", None), crop=512, seed=0)
    assert collate([crops[0]]).crops.shape == (1, 3, 512, 512)


def test_targets_follow_their_crop(photograph_set: Path):
    examples = load_coco(photograph_set / "images", photograph_set / "annotations.json")
    example = next(e for e in examples if e.path.stem == "coffee")
    size = (example.height, example.width)
    plain = crop_targets(example, size, (50, 10, 128), False)
    mirrored = crop_targets(example, size, (50, 10, 128), True)
    assert plain["boxes"].tolist() == [[10.0, 10.0, 128.0, 128.0]]
    assert mirrored["boxes"].tolist() == [[0.0, 10.0, 118.0, 128.0]]
    corner = crop_targets(example, size, (0, 0, 70), False)
    assert corner["boxes"].shape == (0, 4)
    assert corner["ignore"].tolist() == [[60.0, 20.0, 70.0, 70.0]]  # hardly to be seen: neither object nor background
