"""Training task networks: the loop on small networks, and the way from files to a bundle on real ones."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import mobilenet_v2

from cloud.tasks import TaskKind, load_task
from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import load_strictly, state_hash
from cloud.tasks.loading import WEIGHTS
from cloud.tasks.torchvision_models import TorchvisionDetector
from cloud.tasks.trunk import EARLY_BLOCKS
from shared.errors import InvalidBundle, InvalidInput, InvalidSettings, NumericalError, Unavailable, UnknownModel
from tests.trainer.coco_set import ASTRONAUT, CHELSEA, COFFEE, MOTOR, write_tiny_coco
from trainer.data import Example, load_coco
from trainer.evaluation.coco import evaluate_task
from trainer.taskexport import averaged_network, export_task
from trainer.tasknet import CHECKPOINT, LOG, Run, TaskTraining, fit, require_room
from trainer.train_task import TrainTaskSettings, starting_network, train_task

QUICK = TaskTraining(steps=2, batch_size=2, warmup_steps=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_coco(tmp_path_factory.mktemp("coco") / "set")


@pytest.fixture(scope="session")
def examples(tiny: tuple[Path, Path]) -> list[Example]:
    return load_coco(*tiny)


def small(*, masks: bool = False, channels: int = 16) -> BundledRCNN:
    """The bundled design with narrow heads and random weights."""
    torch.manual_seed(1)
    return BundledRCNN(channels=channels, width=32, masks=masks)


def test_training_on_a_few_pictures_lowers_the_loss(examples: list[Example], tmp_path: Path) -> None:
    model = small()
    settings = TaskTraining(steps=24, batch_size=2, head_rate=3e-3, warmup_steps=2)
    first = Run(copy.deepcopy(model), settings)
    fit(model, examples, tmp_path, settings, progress_bar=False)
    last = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    assert last["step"] == 24
    before, after = (held_loss(m, examples) for m in (first.model, model))
    assert after < 0.8 * before


def held_loss(model: BundledRCNN, examples: list[Example]) -> float:
    """The training losses, summed, on the pictures as they are, with the same random choices each time."""
    torch.manual_seed(0)
    task = TorchvisionDetector(copy.deepcopy(model), "small")
    total = 0.0
    for example in examples:
        target = {"boxes": torch.from_numpy(example.boxes), "labels": torch.from_numpy(example.labels)}
        with torch.no_grad():
            losses = task.training_losses(example.read()[None].float() / 255, [target])
        total += float(torch.stack(list(losses.values())).sum())
    return total


def test_a_stopped_run_goes_on_from_its_checkpoint(examples: list[Example], tmp_path: Path) -> None:
    settings = replace(QUICK, steps=4)
    first = fit(small(), examples, tmp_path, replace(QUICK, steps=3), progress_bar=False)
    stopped = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert stopped["step"] == first.step == 3
    untouched = small()
    run = Run(untouched, settings)
    run.load(tmp_path / CHECKPOINT)
    assert state_hash(untouched) == state_hash(first.model)
    assert all(torch.equal(run.average[name], first.average[name]) for name in run.average)
    resumed = fit(small(), examples, tmp_path, settings, progress_bar=False)
    assert resumed.step == 4
    assert resumed.elapsed > first.elapsed
    moments = resumed.optimizer.state_dict()["state"]
    assert {int(m["step"]) for m in moments.values()} == {4}


def test_two_runs_with_one_seed_are_equal(examples: list[Example], tmp_path: Path) -> None:
    hashes = {state_hash(fit(small(), examples, tmp_path / n, QUICK, progress_bar=False).model) for n in "ab"}
    assert len(hashes) == 1


def test_the_first_blocks_stay_frozen_and_the_rest_learns(examples: list[Example], tmp_path: Path) -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    fit(model, examples, tmp_path, QUICK, progress_bar=False)
    after = model.state_dict()
    early = tuple(f"backbone.features.{i}." for i in range(EARLY_BLOCKS))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith(early)]


def test_with_only_nothing_else_moves(examples: list[Example], tmp_path: Path) -> None:
    model = small(masks=True)
    before = copy.deepcopy(model.state_dict())
    fit(model, examples, tmp_path, replace(QUICK, only="roi_heads.mask", head_rate=1e-2), progress_bar=False)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(before[n], v)}
    assert moved
    assert all(n.startswith("roi_heads.mask") for n in moved)
    with pytest.raises(InvalidSettings, match="no trainable parameter starts with"):
        fit(small(), examples, tmp_path / "other", replace(QUICK, only="roi_heads.mask"), progress_bar=False)


def test_objects_without_masks_train_the_boxes_and_leave_the_mask_head_alone(examples: list[Example]) -> None:
    astronaut = next(e for e in examples if e.image_id == ASTRONAUT)
    masks = torch.from_numpy(astronaut.masks())
    target = {"boxes": torch.from_numpy(astronaut.boxes), "labels": torch.from_numpy(astronaut.labels), "masks": masks}
    image = astronaut.read()[None].float() / 255
    task = TorchvisionDetector(small(masks=True), "small")

    def mask_loss(*has_mask: bool) -> float:
        torch.manual_seed(0)
        return float(task.training_losses(image, [{**target, "has_mask": torch.tensor(has_mask)}])["loss_mask"])

    assert mask_loss(False, False) == 0
    assert mask_loss(True, False) > 0
    without = task.training_losses(image, [{k: v for k, v in target.items() if k != "masks"}])
    assert float(without["loss_mask"]) == 0
    assert float(without["loss_classifier"]) > 0


def test_a_loss_that_is_not_finite_stops_with_the_step_saved_and_the_images_named(
    examples: list[Example], tmp_path: Path
) -> None:
    model = small()
    with torch.no_grad():
        model.roi_heads.box_predictor.scores.bias[5] = float("nan")
    with pytest.raises(NumericalError, match=r"not finite at step 0") as caught:
        fit(model, examples, tmp_path, QUICK, progress_bar=False)
    assert any(str(i) in str(caught.value) for i in (ASTRONAUT, COFFEE, CHELSEA, MOTOR))
    assert str(tmp_path / CHECKPOINT) in str(caught.value)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 0


def test_a_checkpoint_of_another_architecture_says_what_differs(examples: list[Example], tmp_path: Path) -> None:
    fit(small(), examples, tmp_path, replace(QUICK, steps=1), progress_bar=False)
    with pytest.raises(InvalidBundle, match=r"another architecture: .*lateral3.weight is \[16, 32, 1, 1\], expected"):
        fit(small(channels=24), examples, tmp_path, QUICK, progress_bar=False)
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(InvalidBundle, match="expected a checkpoint of this trainer"):
        fit(small(), examples, tmp_path, QUICK, progress_bar=False)


def test_a_disk_without_room_for_checkpoints_is_said_before_the_first_step(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(Unavailable, match=r"checkpoints need \d+ MiB, the disk has \d+ MiB free"):
        require_room(tmp_path, 1 << 60)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "exactly one of 'steps' and 'minutes'"),
        ({"steps": 1, "minutes": 1.0}, "exactly one of 'steps' and 'minutes'"),
        ({"steps": 1, "batch_size": 0}, "'batch_size' must be positive, got 0"),
        ({"steps": 0}, "'steps' must be positive, got 0"),
        ({"steps": 1, "ema_decay": 1.0}, "'ema_decay' must be in"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, float], sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        TaskTraining(**fields)  # type: ignore[arg-type]


def test_the_average_of_a_checkpoint_is_what_is_exported(examples: list[Example], tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = fit(BundledRCNN(), examples, tmp_path, replace(QUICK, steps=1), progress_bar=False)
    model, steps, _ = averaged_network(tmp_path / CHECKPOINT, masks=False)
    assert steps == 1
    assert state_hash(model) == state_hash(run.averaged())
    folder = export_task(
        model, tmp_path / "bundle", name="mine", architecture="faster-rcnn-mobilenetv2", provenance={}, measured={}
    )
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12e6
    loaded = load_task(str(folder))
    assert loaded.model_id == json.loads((folder / "manifest.json").read_text())["model_id"]


def test_a_user_trains_a_network_from_files_to_a_bundle_that_detects(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    images, annotations = tiny
    settings = TrainTaskSettings(
        out=tmp_path / "run",
        images=images,
        annotations=annotations,
        training=replace(QUICK, trunk_rate=1e-6, head_rate=1e-6),
        held_out=0.25,
        name="yard",
    )
    folder = train_task(settings, progress_bar=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["name"] == "yard"
    assert manifest["provenance"]["data"] == {"annotations": "annotations.json", "trained_on": 3, "held_out": 1}
    assert manifest["provenance"]["steps"] == 2
    assert manifest["measured"]["images"] == 1
    assert 'network = "faster-rcnn-mobilenetv2"' in (tmp_path / "run" / "settings.toml").read_text()
    task = load_task(str(folder))
    assert evaluate_task(task, images, annotations)["person_AP50"] > 0.5  # it started from the bundled network
    with pytest.raises(InvalidSettings, match="there from an earlier run"):
        train_task(settings, progress_bar=False)
    again = train_task(replace(settings, resume=True), progress_bar=False)
    assert load_task(str(again)).model_id == task.model_id  # it had taken all its steps


def test_a_mask_network_starts_from_a_box_network_and_becomes_a_bundle(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    settings = TrainTaskSettings(
        tmp_path / "run", *tiny, replace(QUICK, only="roi_heads.mask"), network="mask-rcnn-mobilenetv2",
        start_from="faster-rcnn-mobilenetv2", held_out=0.0,
    )  # fmt: skip
    folder = train_task(settings, progress_bar=False)
    task = load_task(str(folder))
    assert task.kind is TaskKind.INSTANCE_SEGMENTATION
    boxes = load_file(WEIGHTS / "faster-rcnn-mobilenetv2" / "weights.safetensors")
    stored = load_file(folder / "weights.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in boxes.items())
    assert json.loads((folder / "manifest.json").read_text())["measured"] == {}


def test_a_network_of_torchvision_becomes_a_bundle_too(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    settings = TrainTaskSettings(
        tmp_path / "run", *tiny, replace(QUICK, steps=1), network="ssdlite320_mobilenet_v3_large",
        start_from="random", held_out=0.0,
    )  # fmt: skip
    folder = train_task(settings, progress_bar=False)
    task = load_task(str(folder))
    [found] = task.predict([load_coco(*tiny)[0].read()])
    assert found.boxes.shape == (len(found), 4)
    assert json.loads((folder / "manifest.json").read_text())["architecture"] == "ssdlite320_mobilenet_v3_large"


def test_what_a_user_can_get_wrong_is_said_before_anything_is_written(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    images, annotations = tiny
    settings = TrainTaskSettings(tmp_path / "run", images, annotations, QUICK, start_from="random")
    document = json.loads(annotations.read_text())

    def with_annotations(file_name: str, **changes: object) -> TrainTaskSettings:
        path = tmp_path / file_name
        path.write_text(json.dumps({**document, **changes}))
        return replace(settings, annotations=path)

    without_masks = [{**a, "segmentation": []} for a in document["annotations"]]
    torch_file = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, torch_file)
    cases = [
        (replace(settings, annotations=tmp_path / "none.json"), InvalidInput, "none.json"),
        (replace(settings, images=tmp_path), InvalidInput, "no such file"),
        (
            with_annotations("empty.json", annotations=[]),
            InvalidInput,
            "none of the .* images to train on has an object",
        ),
        (
            replace(with_annotations("no-masks.json", annotations=without_masks), network="mask-rcnn-mobilenetv2"),
            InvalidInput,
            "no object has a 'segmentation'",
        ),
        (replace(settings, start_from=str(torch_file)), InvalidBundle, "another architecture: lacks"),
        (replace(settings, start_from="nowhere"), InvalidSettings, "expected a bundle or a file"),
        (replace(settings, resume=True), InvalidSettings, "there is no"),
    ]
    for case, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            train_task(case, progress_bar=False)
    assert not (tmp_path / "run").exists()
    for fields, sentence in (
        ({"network": "keypointrcnn_resnet50_fpn"}, "expected one of faster-rcnn-mobilenetv2"),
        ({"held_out": 1.0}, "'held_out' must be in"),
    ):
        with pytest.raises(InvalidSettings, match=sentence):
            replace(settings, **fields)  # type: ignore[arg-type]


def test_training_starts_from_imagenets_weights_when_given_their_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = mobilenet_v2(weights=None)
    path = tmp_path / "mobilenet_v2.safetensors"
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, path)
    model = starting_network("faster-rcnn-mobilenetv2", str(path))
    stem = model.get_parameter("backbone.features.0.0.weight")
    gain = classifier.features[0][1].weight / (classifier.features[0][1].running_var + 1e-5).sqrt()
    torch.testing.assert_close(stem, classifier.features[0][0].weight * gain.view(-1, 1, 1, 1))


def test_weights_with_values_that_are_not_finite_are_not_loaded_and_not_exported(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    name = "roi_heads.box_head.fc6.weight"
    with pytest.raises(InvalidBundle, match=f"{name} holds values that are not finite"):
        load_strictly(model, {**state, name: torch.full_like(state[name], float("nan"))}, Path("x"))
    model.get_parameter(name).data.fill_(1e6)
    with pytest.raises(NumericalError, match=f"{name} has values that are not finite in torch.float16"):
        export_task(model, tmp_path / "b", name="b", architecture="faster-rcnn-mobilenetv2", provenance={}, measured={})
    with pytest.raises(UnknownModel):
        load_task(str(tmp_path / "b"))
