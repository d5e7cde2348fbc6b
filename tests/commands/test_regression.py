"""Segmentation networks that regress: the sampler's targets, losses, metrics, training."""

import math

import pytest
import torch
import torch.nn.functional as F

from segfast.data import Sample
from segfast.models import UNet, create
from segfast.train import (
    Options,
    PatchSampler,
    evaluate_regression,
    fit,
    predict_scores,
    regression_loss,
    regression_scores,
)
from segfast.train._augment import AUGMENTATIONS

LOSSES = ("l1", "l2", "huber")


def field(height=48, width=56) -> Sample:
    """A smooth image, and as target what a 3x3 mean and a square make of it."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 1, 6, 7, generator=generator)
    image = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return Sample(image[0], 3 * F.avg_pool2d(image, 3, 1, 1).square()[0, 0])


def test_patches_of_real_values_are_read_with_the_image():
    """Bilinearly, under the same augmentation, in as many planes as the target has."""
    image = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0))
    moves = [name for name in AUGMENTATIONS if name != "color"]
    for target in (image[0], image):
        sampler = PatchSampler([Sample(image, target)], 24, 3, seed=1, augment=moves)
        images, targets = sampler()
        assert targets.dtype is torch.float32
        assert torch.equal(targets, images[:, 0] if target.dim() == 2 else images)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_hand(name):
    output = torch.tensor([[[[0.0, 2.0], [5.0, 9.0]]]], requires_grad=True)
    targets = torch.tensor([[[0.5, -1.0], [5.0, math.nan]]])
    loss = regression_loss(output, targets, name)
    errors = {"l1": 0.5 + 3, "l2": 0.25 + 9, "huber": 0.125 + 2.5}
    assert loss.item() == pytest.approx(errors[name] / 3)
    loss.backward()
    assert output.grad.isfinite().all() and output.grad[0, 0, 1, 1] == 0
    assert regression_loss({"out": output}, targets[:, None], name) == loss
    # A smaller output is that of the middle.
    framed = F.pad(targets, (1, 1, 1, 1), value=7.0)
    assert regression_loss(output, framed, name) == loss


def test_metrics_by_hand():
    target = torch.tensor([[1.0, 2.0], [6.0, math.nan]])
    prediction = torch.tensor([[2.0, 2.0], [4.0, 50.0]])
    found = regression_scores(prediction, target)
    assert found.rmse == pytest.approx(math.sqrt(5 / 3)) and found.r2 == pytest.approx(1 - 5 / 14)
    assert regression_scores(target, target) == (0.0, 1.0)
    assert regression_scores(torch.full((2, 2), 3.0), target).r2 == 0
    assert math.isnan(regression_scores(prediction, torch.ones(2, 2)).r2)
    # Where values are large and differ little.
    far = target.double() + 1e6
    assert regression_scores(prediction.double() + 1e6, far).r2 == pytest.approx(1 - 5 / 14)


@pytest.mark.parametrize("up", ["transposed", "upsample"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_unet_learns_real_values(loss, up):
    torch.manual_seed(0)
    model = UNet(1, 1, width=8, depth=2, norm="batch", up=up)
    sample = field()
    before = evaluate_regression(model, [sample])
    losses = fit(model, PatchSampler([sample], 32, 4, augment=False), Options(steps=60, lr=0.01, loss=loss))
    after = evaluate_regression(model, [sample, sample])
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert after.rmse < before.rmse and after.r2 > 0.5 > before.r2
    expected = regression_scores(predict_scores(model, sample.image)[0], sample.target)
    assert after.rmse == pytest.approx(expected.rmse) and after.r2 == pytest.approx(expected.r2)


def test_networks_that_return_a_dictionary_regress_too():
    torch.manual_seed(0)
    model = create("lraspp_mobilenet_v3_large", in_channels=1, num_classes=2, width_mult=0.25)
    target = field().target
    sample = Sample(field().image, torch.stack((target, -target)))
    fit(model, PatchSampler([sample], 32, 2), Options(steps=2, loss="huber"))
    assert math.isfinite(evaluate_regression(model, [sample]).rmse)


def test_bad_input():
    output, model = torch.zeros(1, 2, 4, 4), UNet(1, 2, width=2, depth=1)
    for targets in (torch.zeros(1, 4, 4), torch.zeros(1, 2, 4, 4).long(), torch.zeros(1, 3, 4, 4)):
        with pytest.raises(
            ValueError, match=r"targets must be real values for an output of shape \[1, 2, 4, 4\]"
        ):
            regression_loss(output, targets)
    with pytest.raises(ValueError, match=r"loss must be one of .*'huber'.*, got 'l3'"):
        regression_loss(output, output, "l3")
    sampler = PatchSampler([field()], 16, 1)
    with pytest.raises(ValueError, match=r"loss must be one of .*'both', 'l1'.*, got 'l3'"):
        fit(model, sampler, Options(loss="l3"))
    with pytest.raises(ValueError, match="class_weights are for cross_entropy, got loss='l1'"):
        fit(model, sampler, Options(loss="l1", class_weights=(1.0, 1.0)))
    with pytest.raises(ValueError, match=r"must have one shape, got \[2\] and \[3\]"):
        regression_scores(torch.zeros(2), torch.zeros(3))
