"""The three loss terms, and that the frozen network stays frozen."""

import math

import pytest
import torch

from cloud.tasks.bundled import BundledRCNN
from cloud.tasks.checkpoints import state_hash
from cloud.tasks.loading import load_task
from cloud.tasks.torchvision_models import TorchvisionDetector
from trainer.frozen import FrozenNetwork
from trainer.losses import TaskLoss, clamp_straight_through, codec_terms, gradient_norms
from trainer.schedule import GradientBalance, Schedule, Weights

SCALE = 1.0


@pytest.fixture(scope="module")
def network() -> FrozenNetwork:
    torch.manual_seed(0)
    task = TorchvisionDetector(BundledRCNN(), "test")
    return FrozenNetwork("test", task.model.backbone, 320, task)


@pytest.fixture(scope="module")
def network_with_norms() -> FrozenNetwork:
    torch.manual_seed(0)
    task = load_task("fasterrcnn_mobilenet_v3_large_320_fpn", weights="random")
    assert isinstance(task, TorchvisionDetector)
    return FrozenNetwork("test", task.model.backbone, 320, task)


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 64, 64, generator=generator)
    return x, x + 0.2 * torch.randn(2, 3, 64, 64, generator=generator)


def targets() -> list[dict[str, torch.Tensor]]:
    box = torch.tensor([[8.0, 8.0, 48.0, 56.0]])
    return [{"boxes": box, "labels": torch.tensor([1])}, {"boxes": box / 2, "labels": torch.tensor([3])}]


def test_a_clamped_picture_keeps_the_gradient_of_what_lies_outside():
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    clamped = clamp_straight_through(x)
    clamped.sum().backward()
    assert clamped.tolist() == [0.0, 0.5, 1.0]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["features", "ground-truth", "self-labels"])
def test_the_task_loss_moves_the_picture_and_never_the_network(network_with_norms, pictures, kind: str):
    x, x_hat = pictures
    network = network_with_norms
    before = state_hash(network.module)
    task = TaskLoss(network, kind)
    task.calibrate(x, SCALE)
    x_hat.requires_grad_()
    weighted, values = task(x, x_hat, torch.tensor([1.0, 1.0]), targets(), SCALE)
    weighted.backward()
    assert x_hat.grad is not None
    assert float(x_hat.grad.abs().max()) > 0
    assert values.shape == (2,)
    assert all(p.grad is None for p in network.module.parameters())
    assert state_hash(network.module) == before


def test_features_of_the_picture_itself_are_at_distance_zero_and_worse_pictures_farther(network, pictures):
    x, x_hat = pictures
    task = TaskLoss(network, "features")
    task.calibrate(x, SCALE)
    worse = x + 2 * (x_hat - x)
    assert float(task.distances(x, x, SCALE).max()) < 1e-6
    assert torch.all(task.distances(x, worse, SCALE) > task.distances(x, x_hat, SCALE))


def test_what_resizing_loses_counts_where_the_original_is_given(network, pictures):
    x, _ = pictures
    task = TaskLoss(network, "features")
    task.calibrate(x, SCALE)
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    weights = Weights(*(torch.ones(2) for _ in range(3)))
    lost, of_itself = (
        codec_terms(small, small, torch.zeros(2), weights, task, None, 2 * SCALE, original).task
        for original in (x, None)
    )
    assert of_itself is not None
    assert lost is not None
    assert float(of_itself.max()) == 0
    assert float(lost.min()) > 0
    enlarged = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(lost, task.distances(x, enlarged, SCALE))  # it is seen as large as the original was


@pytest.mark.parametrize("kind", ["features", "ground-truth"])
def test_a_picture_without_weight_gets_no_gradient(network: FrozenNetwork, pictures, kind: str):
    x, x_hat = pictures
    task = TaskLoss(network, kind)
    task.calibrate(x, SCALE)
    x_hat.requires_grad_()
    task(x, x_hat, torch.tensor([1.0, 0.0]), targets(), SCALE)[0].backward()
    assert x_hat.grad is not None
    assert float(x_hat.grad[0].abs().max()) > 0
    assert float(x_hat.grad[1].abs().max()) == 0


def test_a_detector_sees_crops_at_the_asked_scale_and_keeps_its_own_resize_afterwards(network, pictures):
    x, _ = pictures
    own = (network.module.transform.min_size, network.module.transform.max_size)
    sides = []
    hook = network.trunk.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    network.training_loss(x, targets(), 2.0)
    network.features(x, 1.5)
    hook.remove()
    assert sides == [128, 96]
    assert (network.module.transform.min_size, network.module.transform.max_size) == own


def test_terms_are_bits_per_pixel_and_squared_error_and_weigh_what_the_weights_say(pictures):
    x, x_hat = pictures
    weights = Weights(rate=torch.tensor([2.0, 2.0]), mse=torch.tensor([10.0, 0.0]), task=torch.zeros(2))
    terms = codec_terms(x, x_hat, torch.tensor([4096.0, 2048.0]), weights, None, None, SCALE)
    assert terms.rate.tolist() == [1.0, 0.5]
    assert terms.task is None
    expected = 2 * 0.75 + 10 * float((x_hat - x)[0].square().mean()) / 2
    assert float(terms.total(GradientBalance())) == pytest.approx(expected, rel=1e-5)


def test_gradient_norms_are_those_of_the_weighted_terms(pictures):
    x, _ = pictures
    y = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    x_hat = x + y.mean(dim=(1, 2, 3), keepdim=True)
    bits = 4096 * y.flatten(1).mean(1)
    weights = Schedule().weights(1.0, torch.tensor([3.5, 3.5]))
    norms = gradient_norms(codec_terms(x, x_hat, bits, weights, None, None, SCALE), y)
    assert set(norms) == {"rate", "mse"}
    assert norms["rate"] == pytest.approx(1.0 / 2 / 16 * math.sqrt(32), rel=1e-5)
    assert norms["mse"] == pytest.approx(150.0 * 2 * 0.5 / 2 / 16 * math.sqrt(32), rel=1e-5)


def test_own_detections_of_a_mask_network_are_labels_with_masks(pictures):
    torch.manual_seed(0)
    model = BundledRCNN(masks=True)
    model.roi_heads.score_thresh = 0.0  # random weights are sure of nothing
    task = TorchvisionDetector(model, "test")
    network = FrozenNetwork("test", task.model.backbone, 320, task)
    x, _ = pictures
    labels = network.detections(x, SCALE, min_score=0.0)
    assert sum(len(label["boxes"]) for label in labels) > 0
    assert all(label["masks"].shape[1:] == (64, 64) for label in labels)
    assert math.isfinite(float(network.training_loss(x, labels, SCALE)))
