"""The losses: their values, parts that add up to the whole, and scores that are upsampled on the way."""

import math

import pytest
import torch
import torch.nn.functional as F

from segfast import functional
from segfast.models import UNet, create
from segfast.train import Options, Trainer, class_loss, fit, regression_loss
from segfast.train._losses import CLASS_LOSSES, REGRESSION_LOSSES


def draw(n=4, k=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, k, size, size, generator=generator)
    targets = torch.randint(k, (n, size, size), generator=generator)
    targets[0, :5], targets[2, 1] = 255, 255
    return scores, targets


def dice(scores, target):
    """Of one image, by hand."""
    known = target != 255
    p = scores.softmax(0)[:, known]
    t = F.one_hot(target[known], len(scores)).T.float()
    each = 1 - 2 * (p * t).sum(1) / (p + t).sum(1)
    return torch.where(t.sum(1) > 0, each, 0.0).mean()


def test_values_by_hand():
    scores, targets = draw()
    weight = torch.tensor([1.0, 0.5, 3.0])
    entropy = F.cross_entropy(scores, targets, weight, ignore_index=255)
    torch.testing.assert_close(class_loss(scores, targets, weight=weight), entropy)
    of_images = torch.stack([dice(*pair) for pair in zip(scores, targets, strict=True)]).mean()
    torch.testing.assert_close(class_loss(scores, targets, "dice"), of_images)
    torch.testing.assert_close(class_loss(scores, targets, "both", weight), entropy + of_images)
    with pytest.raises(ValueError, match=r"loss must be one of .*'both'.*, got 'jaccard'"):
        class_loss(scores, targets, "jaccard")


def test_a_batch_of_which_nothing_is_scored_costs_nothing():
    scores, targets = draw()
    for loss in CLASS_LOSSES:
        assert class_loss(scores.requires_grad_(), torch.full_like(targets, 255), loss) == 0


@pytest.mark.parametrize("name", [*CLASS_LOSSES, *REGRESSION_LOSSES])
def test_parts_add_up_to_the_whole(name):
    """Also where they count differently, as most of one is ignored; and so do their gradients."""
    scores, targets = draw()
    weight = torch.tensor([1.0, 0.5, 3.0])
    if name in REGRESSION_LOSSES:
        targets = scores.roll(1, 0).masked_fill(targets[:, None] == 255, math.nan)

    def loss(scores, part, **options):
        if name in REGRESSION_LOSSES:
            return regression_loss(scores, part, name, **options)
        return class_loss(scores, part, name, weight, **options)

    scores.requires_grad_()
    whole = loss(scores, targets)
    [expected] = torch.autograd.grad(whole, scores)
    parts = sum(loss(scores[i : i + 2], targets[i : i + 2], whole=targets) for i in (0, 2))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, scores)[0], expected)


def test_coarse_scores_are_upsampled_in_the_loss(monkeypatch):
    coarse = draw(size=4)[0]
    targets = draw(size=13)[1]
    full = F.interpolate(coarse, (13, 13), mode="bilinear", align_corners=False)
    for loss in CLASS_LOSSES:
        found, expected = class_loss(coarse, targets, loss, coarse=True), class_loss(full, targets, loss)
        torch.testing.assert_close(found, expected)
    # A trainer asks networks for such scores where they have them.
    torch.manual_seed(0)
    model = create("lraspp_mobilenet_v3_large", in_channels=1, num_classes=3, width_mult=0.25)
    images = torch.rand(4, 1, 13, 13)
    expected = class_loss(model.train()(images), targets, "both").item()
    seen = []
    original = functional.upsample_cross_entropy
    monkeypatch.setattr(
        "segfast.train._losses.upsample_cross_entropy",
        lambda scores, *a, **k: seen.append(scores.shape) or original(scores, *a, **k),
    )
    loss = Trainer(model, Options(steps=1, loss="both")).train_step(images, targets)
    assert loss == pytest.approx(expected, rel=1e-5) and [shape[2:] for shape in seen] == [(2, 2)]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_the_whole_batch_s(accumulate):
    torch.manual_seed(0)
    images, targets = torch.rand(4, 1, 8, 8), draw()[1]
    weights = []
    for parts in (1, accumulate):
        torch.manual_seed(1)
        model = UNet(1, 3, width=2, depth=1)
        options = Options(steps=3, optimizer="sgd", lr=0.1, loss="both", accumulate=parts)
        losses = fit(model, lambda: (images, targets), options)
        weights.append((losses, [p.detach() for p in model.parameters()]))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    torch.testing.assert_close(weights[0][1], weights[1][1])


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model = UNet(1, 3, width=2, depth=1)
    trainer = Trainer(model, Options(steps=3, optimizer="sgd", lr=0.1, schedule="poly", ema=0.75))
    images, targets = torch.rand(4, 1, 8, 8), draw()[1]
    expected = None
    for _ in range(3):
        trainer.train_step(images, targets)
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        expected = now.clone() if expected is None else 0.75 * expected + 0.25 * now
    found = torch.cat([trainer.weights()[name].flatten() for name, _ in model.named_parameters()])
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, now)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_it_and_keeps_the_weights(precision):
    torch.manual_seed(0)
    model = UNet(1, 3, width=2, depth=1)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    options = Options(steps=8, optimizer="sgd", lr=0.2, precision=precision)
    images, targets = torch.rand(4, 1, 8, 8), draw()[1]
    losses = fit(model, lambda: (images, targets), options)
    assert set(seen) == {getattr(torch, precision)} and losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_unknown_options():
    for name, value in (("schedule", "step"), ("precision", "float8"), ("loss", "l3")):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            fit(UNet(1, 3, width=2, depth=1), draw, Options(steps=1, **{name: value}))
