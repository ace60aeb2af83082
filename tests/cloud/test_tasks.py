"""Task models: every family behind one interface, frozen, and the bundled networks on real photographs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model, get_model_weights, mobilenet_v2
from torchvision.ops import box_area, box_iou, roi_align

from cloud.tasks import Detections, TaskKind, available_tasks, load_task
from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import state_hash
from cloud.tasks.loading import BUNDLED, WEIGHTS
from cloud.tasks.roi_align import Reordered, pool_regions, region_means, separable_roi_align
from cloud.tasks.roi_heads import overlap_with_ignored
from cloud.tasks.torchvision_models import UNKNOWN, TorchvisionDetector, TorchvisionSegmenter, painted_classes
from cloud.tasks.trunk import IMAGE_MEAN, IMAGE_STD, MobileNetPyramid, folded_state
from shared.errors import InvalidBundle, InvalidImage, InvalidInput, Unavailable, UnknownModel

PHOTOGRAPHS = {"astronaut": "person", "coffee": "cup", "chelsea": "cat", "motorcycle": "motorcycle"}
SHOWN_SCORE = 0.3

FAMILIES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": TaskKind.DETECTION,
    "maskrcnn_resnet50_fpn": TaskKind.INSTANCE_SEGMENTATION,
    "retinanet_resnet50_fpn": TaskKind.DETECTION,
    "fcos_resnet50_fpn": TaskKind.DETECTION,
    "ssdlite320_mobilenet_v3_large": TaskKind.DETECTION,
    "keypointrcnn_resnet50_fpn": TaskKind.KEYPOINTS,
    "deeplabv3_mobilenet_v3_large": TaskKind.SEMANTIC_SEGMENTATION,
    "fcn_resnet50": TaskKind.SEMANTIC_SEGMENTATION,
    "lraspp_mobilenet_v3_large": TaskKind.SEMANTIC_SEGMENTATION,
}


def photograph(name: str) -> Tensor:
    """uint8 [3, H, W], RGB."""
    pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@pytest.fixture(scope="session", params=BUNDLED)
def bundled(request: pytest.FixtureRequest) -> Any:
    return load_task(request.param)


def person_target(masks: bool = False) -> dict[str, Tensor]:
    target = {"boxes": torch.tensor([[10.0, 5.0, 60.0, 90.0]]), "labels": torch.tensor([1])}
    target["keypoints"] = torch.cat([torch.rand(1, 17, 2) * 50 + 10, torch.ones(1, 17, 1)], 2)
    if masks:
        target["masks"] = torch.zeros(1, 96, 96, dtype=torch.uint8)
        target["masks"][0, 5:90, 10:60] = 1
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_predicts_gives_losses_to_its_input_and_stays_frozen(name: str) -> None:
    torch.manual_seed(0)
    task: Any = load_task(name, weights="random")
    assert task.kind is FAMILIES[name]
    if isinstance(task, TorchvisionDetector) and "320" not in name:
        task.model.transform.min_size = (96,)  # its 800 pixels would only cost time
    if isinstance(task, TorchvisionSegmenter):
        task.SHORT_SIDE = 96
    before = state_hash(task.model)
    image = photograph("astronaut")[:, ::5, ::5][:, :96, :96]
    [found] = task.predict([image])
    assert found.boxes.shape == (len(found), 4)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert all(0 <= s <= 1 for s in found.scores.tolist())
    if task.kind is TaskKind.SEMANTIC_SEGMENTATION:
        assert found.masks is not None
        assert found.masks.shape == (len(found), 96, 96)

    x_hat = (image[None].float() / 255).requires_grad_()
    losses = task.training_losses(x_hat, [person_target(masks=True)])
    torch.stack([v for v in losses.values()]).sum().backward()
    assert x_hat.grad is not None
    assert float(x_hat.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in task.model.parameters())
    assert state_hash(task.model) == before == task.model_id
    assert not any(m.training for m in task.model.modules())
    features = task.features(x_hat)
    assert features
    assert all(f.requires_grad for f in features)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_bundled_networks_find_what_is_in_ordinary_photographs(bundled: Any, name: str) -> None:
    [found] = bundled.predict([photograph(name)], SHOWN_SCORE)
    assert PHOTOGRAPHS[name] in found.labels
    _, height, width = photograph(name).shape
    boxes = found.boxes[[label == PHOTOGRAPHS[name] for label in found.labels]]
    assert float(box_area(boxes).max()) > 0.1 * height * width
    assert (found.scores >= SHOWN_SCORE).all()


def test_the_bundled_networks_stay_frozen_and_give_gradients_to_the_picture(bundled: Any) -> None:
    before = state_hash(bundled.model)
    x_hat = (photograph("astronaut")[None, :, ::4, ::4].float() / 255).requires_grad_()
    target = {
        "boxes": torch.tensor([[5.0, 0.0, 108.0, 128.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 128, 128, dtype=torch.uint8),
        "has_mask": torch.tensor([True]),
        "ignore": torch.tensor([[100.0, 0.0, 128.0, 40.0]]),
    }
    losses = bundled.training_losses(x_hat, [target])
    assert ("loss_mask" in losses) == (bundled.kind is TaskKind.INSTANCE_SEGMENTATION)
    torch.stack(list(losses.values())).sum().backward()
    assert x_hat.grad is not None
    assert float(x_hat.grad.abs().sum()) > 0
    assert state_hash(bundled.model) == before == bundled.model_id
    assert all(p.grad is None for p in bundled.model.parameters())


def test_the_mask_networks_masks_lie_in_their_boxes() -> None:
    task = load_task("mask-rcnn-mobilenetv2")
    [found] = task.predict([photograph("chelsea")], SHOWN_SCORE)
    assert found.masks is not None
    assert found.masks.shape == (len(found), 300, 451)
    for mask, box in zip(found.masks, found.boxes.tolist(), strict=True):
        outside = mask.clone()
        outside[int(box[1]) : int(box[3]) + 2, int(box[0]) : int(box[2]) + 2] = False
        assert mask.any()
        assert int(outside.sum()) < 0.02 * int(mask.sum()) + 8


def test_what_is_found_in_a_picture_does_not_depend_on_those_beside_it(bundled: Any) -> None:
    pictures = [photograph("astronaut"), photograph("chelsea"), photograph("astronaut")[:, :480]]
    alone = [bundled.predict([picture])[0] for picture in pictures]
    for one, other in zip(bundled.predict(pictures), alone, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)


def test_a_least_score_leaves_out_what_is_below_it_and_changes_nothing_else(bundled: Any) -> None:
    [every] = bundled.predict([photograph("astronaut")])
    for score in (0.1, float(every.scores[3]), 0.0):
        [some] = bundled.predict([photograph("astronaut")], score)
        expected = every.at_least(score)
        assert len(some) > 3
        assert torch.equal(some.boxes, expected.boxes)
        assert torch.equal(some.scores, expected.scores)
        if expected.masks is not None:
            assert some.masks is not None
            assert torch.equal(some.masks, expected.masks)


def test_the_mask_network_finds_the_boxes_that_the_box_network_finds() -> None:
    boxes, masks = (load_task(name).predict([photograph("astronaut")])[0] for name in BUNDLED)
    torch.testing.assert_close(boxes.boxes, masks.boxes)
    torch.testing.assert_close(boxes.scores, masks.scores)


def test_pictures_of_any_size_and_float_pictures_are_taken(bundled: Any) -> None:
    image = photograph("coffee")
    from_bytes, from_floats = (bundled.predict([x])[0] for x in (image, image.float() / 255))
    torch.testing.assert_close(from_bytes.boxes, from_floats.boxes)
    sizes = [(1, 1), (1, 300), (31, 33), (400, 600)]
    found = bundled.predict([image[:, :h, :w] for h, w in sizes])
    for one, (height, width) in zip(found, sizes, strict=True):
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, 2] <= width).all()
        assert (one.boxes[:, 3] <= height).all()
    assert bundled.predict([]) == []


@pytest.mark.parametrize(
    "image",
    [torch.zeros(1, 8, 8), torch.zeros(3, 8), torch.zeros(3, 0, 8), torch.zeros(3, 8, 8, dtype=torch.int32)],
)
def test_what_is_no_picture_is_refused(image: Tensor) -> None:
    with pytest.raises(InvalidImage, match="a task model takes"):
        load_task(BUNDLED[0]).predict([image])


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    for name in ("yolov99", str(tmp_path)):
        with pytest.raises(UnknownModel, match=r"faster-rcnn-mobilenetv2.*retinanet_resnet50_fpn.*deeplabv3"):
            load_task(name)
    assert set(FAMILIES) < set(available_tasks())


def test_a_bundle_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(WEIGHTS / BUNDLED[0], folder)
    good = (folder / "manifest.json").read_text()
    load_task(str(folder))
    for change, sentence in (
        ({"model_id": "0" * 64}, "expected weights with SHA-256 0000"),
        ({"architecture": "mask-rcnn-mobilenetv2-fpn"}, "another architecture: lacks roi_heads.mask"),
        ({"architecture": "perceptron"}, "'architecture' is 'perceptron', expected one of faster-rcnn"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(InvalidBundle, match=sentence):
            load_task(str(folder))
    for broken in ("{", "[]", '{"architecture": "faster-rcnn-mobilenetv2-fpn"}'):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(InvalidBundle, match="expected 'architecture' and 'model_id'"):
            load_task(str(folder))
    (folder / "manifest.json").write_text(good)
    (folder / "weights.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(InvalidBundle, match="expected a readable checkpoint"):
        load_task(str(folder))


def test_a_local_checkpoint_of_torchvision_is_used_and_another_one_says_what_differs(tmp_path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(3)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    torch.save({"model": network.state_dict()}, tmp_path / "mine.pth")  # as torchvision's reference scripts do
    assert load_task(name, weights=tmp_path / "mine.pth").model_id == state_hash(network)
    with pytest.raises(InvalidBundle, match=r"mine\.pth: checkpoint of another architecture: lacks .* and \d+ more"):
        load_task("fcn_resnet50", weights=tmp_path / "mine.pth")
    with pytest.raises(InvalidBundle, match=r"none\.pth: expected a readable checkpoint"):
        load_task(name, weights=tmp_path / "none.pth")


def test_published_weights_are_those_that_torchvision_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    published = get_model_weights(name).DEFAULT
    torch.manual_seed(4)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    kept = tmp_path / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    torch.save(network.state_dict(), kept / Path(published.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_task(name).model_id == state_hash(network)


def test_published_weights_that_cannot_be_downloaded_are_said_to_be_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(Unavailable, match="torchvision could not download its weights"):
        load_task("ssdlite320_mobilenet_v3_large")


def test_a_keypoint_network_asks_for_keypoints() -> None:
    task: Any = load_task("keypointrcnn_resnet50_fpn", weights="random")
    target = {k: v for k, v in person_target().items() if k != "keypoints"}
    with pytest.raises(InvalidInput, match="its losses need 'keypoints'"):
        task.training_losses(torch.rand(1, 3, 96, 96), [target])


def test_truth_for_segmentation_paints_small_over_large_and_what_is_not_known() -> None:
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[0, 4:8, 4:8] = 1  # a cat on
    masks[1, 2:18, 2:18] = 1  # a sofa, and
    target = {
        "masks": masks,
        "labels": torch.tensor([17, 63, 1]),
        "boxes": torch.tensor([[4.0, 4, 8, 8], [2, 2, 18, 18], [0, 0, 2, 2]]),
        "has_mask": torch.tensor([True, True, False]),  # a person without a mask
        "ignore": torch.tensor([[18.0, 18, 20, 20]]),
    }
    truth = painted_classes(target, (20, 20))
    assert truth[5, 5] == 8  # Pascal VOC's cat
    assert truth[10, 10] == 18  # and sofa
    assert truth[0, 0] == truth[19, 19] == UNKNOWN
    assert truth[19, 0] == 0
    with pytest.raises(InvalidInput, match="need 'masks'"):
        painted_classes({k: v for k, v in target.items() if k != "masks"}, (20, 20))


class Constant(nn.Module):
    """Says that the left half is a cat with 0.9, the rest background."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = torch.full((len(x), 21, 65, 65), -20.0)
        logits[:, 8, :, :32] = 0.0
        logits[:, 0, :, 32:] = 0.0
        return {"out": logits}


def test_a_segmentation_is_one_detection_a_class_with_its_extent() -> None:
    [found] = TorchvisionSegmenter(Constant(), "constant").predict([torch.zeros(3, 65, 65)])
    assert found.labels == ("cat",)
    assert found.category_ids.tolist() == [17]
    assert found.boxes.tolist() == [[0.0, 0.0, 32.0, 65.0]]
    assert found.masks is not None
    assert int(found.masks.sum()) == 32 * 65
    assert float(found.scores) > 0.99


def test_detections_hold_as_many_of_each_and_can_be_thinned() -> None:
    found = Detections(
        torch.arange(12.0).view(3, 4), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1, 2, 3]), ("a", "b", "c"),
        masks=torch.eye(3).bool()[:, None],
    )  # fmt: skip
    assert found.at_least(0.1) is found
    two = found.at_least(0.5)
    assert (len(two), two.labels, two.category_ids.tolist()) == (2, ("a", "b"), [1, 2])
    assert two.masks is not None
    assert len(two.masks) == 2
    with pytest.raises(ValueError, match="need as many boxes"):
        Detections(torch.zeros(2, 4), torch.zeros(3), torch.zeros(3), ("a", "b", "c"))
    with pytest.raises(ValueError, match="need as many masks"):
        Detections(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), ("a",), masks=torch.zeros(2, 1, 1))


# --- the parts of the bundled networks ---


def random_boxes(count: int, size: int) -> Tensor:
    corners = torch.rand(count, 2, 2) * (size + 40) - 20  # some reach over the edge
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


@pytest.mark.parametrize("bins", [7, 14])
def test_pooling_by_matrix_products_equals_torchvisions_operator_and_so_does_its_gradient(bins: int) -> None:
    torch.manual_seed(0)
    feature = torch.randn(2, 5, 24, 32, dtype=torch.float64, requires_grad=True)
    boxes = [random_boxes(9, 200).double(), random_boxes(4, 200).double()]
    mine = separable_roi_align(feature, boxes, bins, 1 / 8).permute(0, 3, 1, 2)
    theirs = roi_align(feature, boxes, (bins, bins), 1 / 8, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(mine, theirs)
    weight = torch.randn_like(mine)
    gradients = [torch.autograd.grad((pooled * weight).sum(), feature)[0] for pooled in (mine, theirs)]
    torch.testing.assert_close(*gradients)


def test_pooling_gives_the_same_with_and_without_gradients_and_nothing_for_no_boxes() -> None:
    torch.manual_seed(1)
    feature = torch.randn(2, 3, 16, 16)
    boxes = [random_boxes(3, 120), torch.zeros(0, 4)]
    frozen = pool_regions(feature, boxes, 7, 1 / 8)
    trained = pool_regions(feature.requires_grad_(), boxes, 7, 1 / 8)
    torch.testing.assert_close(frozen, trained.detach())
    assert pool_regions(feature, [torch.zeros(0, 4)] * 2, 7, 1 / 8).shape == (0, 7, 7, 3)


def test_the_mean_under_a_box_is_that_of_pooling_it() -> None:
    torch.manual_seed(2)
    feature = torch.randn(1, 6, 10, 12)
    boxes = [random_boxes(8, 300)]
    expected = roi_align(feature, boxes, (4, 4), 1 / 32, sampling_ratio=2, aligned=True).mean((2, 3))
    torch.testing.assert_close(region_means(feature, boxes, 1 / 32), expected, rtol=1e-4, atol=1e-5)


def test_reordering_rows_sends_their_gradients_back() -> None:
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(Reordered.apply(rows, order), rows[order])
    assert torch.autograd.gradcheck(lambda x: Reordered.apply(x, order), rows)


def test_folding_the_norms_away_changes_nothing() -> None:
    torch.manual_seed(0)
    classifier = mobilenet_v2(weights=None).eval()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    trunk = MobileNetPyramid(16).eval()
    trunk.features.load_state_dict(folded_state(classifier.state_dict()))
    for module in classifier.features.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):  # TensorFlow's SAME, mid-grey at the very first
            module.padding = (0, 0)
            module.register_forward_pre_hook(same_padding)
    image = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    normalised = (image - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(trunk(normalised)["c5"], classifier.features(normalised), rtol=1e-3, atol=1e-4)


def same_padding(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    x = inputs[0]
    if x.shape[1] != 3:
        return functional.pad(x, (0, 1, 0, 1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (functional.pad(x * std + mean, (0, 1, 0, 1), value=0.5) - mean) / std


def test_under_autocast_the_best_box_stays_where_it_is() -> None:
    task: Any = load_task(BUNDLED[0])
    image = photograph("astronaut")
    [exact] = task.predict([image], SHOWN_SCORE)
    with torch.autocast("cpu", torch.bfloat16):
        [rough] = task.predict([image], SHOWN_SCORE)
        features = task.model.backbone(torch.randn(1, 3, 64, 64))
        scores, deltas = task.model.rpn.head([features["p3"], features["p5"]])
    assert rough.labels[0] == exact.labels[0] == "person"
    assert float(box_iou(rough.boxes[:1], exact.boxes[:1])) > 0.95
    assert features["p3"].dtype == torch.bfloat16
    assert {t.dtype for t in [*scores, *deltas]} == {torch.float32}


def test_the_share_in_an_ignored_region_is_of_the_boxs_own_area() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30]])
    share = overlap_with_ignored(boxes, torch.tensor([[0.0, 0, 10, 10], [14, 14, 15, 15]]))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.25, 0.0]))
    assert overlap_with_ignored(boxes, torch.zeros(0, 4)).tolist() == [0.0, 0.0, 0.0]


def test_a_crowd_is_no_background_in_training() -> None:
    torch.manual_seed(0)
    model = BundledRCNN(channels=16, width=32)
    anchors = [torch.tensor([[0.0, 0, 50, 50], [100.0, 100, 150, 150], [60.0, 0, 90, 30]])]
    target = {"boxes": torch.tensor([[0.0, 0, 50, 48]]), "ignore": torch.tensor([[55.0, 0, 95, 40]])}
    [labels], _ = model.rpn.assign_targets_to_anchors(anchors, [target])
    assert labels.tolist() == [1.0, 0.0, -1.0]


# --- ONNX ---


@pytest.fixture(scope="session")
def yolox(data_dir: Path | None) -> Path:
    pytest.importorskip("onnxruntime")
    path = Path() if data_dir is None else data_dir.parent / "models" / "yolox_nano.onnx"
    if not path.is_file():
        pytest.skip("needs yolox_nano.onnx beside the data, see SIGHTLINE_DATA")
    return path


def test_an_onnx_detector_finds_people_and_cats_where_they_are(yolox: Path) -> None:
    task = load_task(str(yolox), threads=1)
    assert task.kind is TaskKind.DETECTION
    astronaut, chelsea = task.predict([photograph("astronaut"), photograph("chelsea")], 0.3)
    assert astronaut.labels[0] == "person"
    assert chelsea.labels[0] == "cat"
    x0, _, x1, y1 = astronaut.boxes[0].tolist()
    assert x0 < 120
    assert y1 > 490
    assert x1 - x0 > 250
    with pytest.raises(InvalidImage):
        task.predict([torch.zeros(3, 0, 4)])


def test_files_that_are_no_such_detector_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    with pytest.raises(InvalidBundle, match="expected a readable ONNX file"):
        load_task(str(path))
    path.write_bytes(b"no model")
    with pytest.raises(InvalidBundle, match="expected an ONNX model"):
        load_task(str(path))
    path.write_bytes(identity_onnx([1, 1, 4, 4]))
    with pytest.raises(InvalidBundle, match=r"expected an input \[1, 3, side, side\], got \[1, 1, 4, 4\]"):
        load_task(str(path))
    path.write_bytes(identity_onnx([1, 3, 64, 64]))
    with pytest.raises(InvalidBundle, match=r"expected YOLOX's output \[1, 84, 85\], got \[1, 3, 64, 64\]"):
        load_task(str(path))


def identity_onnx(shape: list[int]) -> bytes:
    """An ONNX model of one Identity node, written field by field: onnx.proto's numbers, protobuf's wire format."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    dimensions = b"".join(field(1, field(1, side)) for side in shape)
    kind = field(2, field(1, field(1, 1) + field(2, dimensions)))  # a tensor of float32 with this shape
    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = field(1, node) + field(2, b"g") + field(11, field(1, b"x") + kind) + field(12, field(1, b"y") + kind)
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))
