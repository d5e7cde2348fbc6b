"""Logits and gradients that are infinite or NaN reach the pixels that they reach in torch, and no others."""

import pytest
import torch

from segfast.functional import upsample_argmax, upsample_cross_entropy, upsample_dice
from segfast.ops.segmentation_head import chunked
from tests.segmentation_head.reference import (
    GEOMETRIES,
    IGNORED,
    NOT_FINITE,
    assert_same,
    cross_entropy,
    dice,
    head,
    interpolate,
    spoiled,
    value_and_gradient,
)


@pytest.fixture(autouse=True)
def tiles_for_all(monkeypatch):
    """Tiles on a CPU, however little there is to compute."""
    monkeypatch.setattr(chunked, "worth_tiling", lambda *call: True)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_losses_labels_and_gradients_are_torchs(name, value):
    def ours(logits, target, **options):
        return upsample_cross_entropy(logits, target, ignore_index=IGNORED, **options)

    def our_dice(logits, target, **options):
        return upsample_dice(logits, target, ignore_index=IGNORED, **options)

    every, targets, geometry = spoiled(name, 3 * [value])
    for image, target in zip(every, targets[:, None].expand(-1, 2, -1, -1), strict=True):
        logits = torch.stack([image, image.nan_to_num(0.0, 0.0, 0.0)])  # the other image is spared
        for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"}):
            expected = value_and_gradient(cross_entropy, logits, target, **options, **geometry)
            same(value_and_gradient(ours, logits, target, **options, **geometry), expected)
        expected = value_and_gradient(dice, logits, target, **geometry)
        same(value_and_gradient(our_dice, logits, target, **geometry), expected)
        z = interpolate(logits, **geometry)
        labels, confidence = upsample_argmax(logits, return_confidence=True, **geometry)
        assert torch.equal(labels, z.argmax(1))
        same([confidence], [z.softmax(1).amax(1)])


def test_a_masked_class_stays_where_it_is():
    x = torch.zeros(1, 4, 16, 16)
    x[:, 0] = 1
    x[0, 1, 2, 2] = float("-inf")
    assert (upsample_argmax(x, scale_factor=8) == 0).all()


def test_a_gradient_that_is_nan_spreads_as_in_torch():
    shape, geometry = GEOMETRIES["x4"]
    logits, target = head(shape, geometry)
    grad = torch.ones(target.shape)
    counted = (target[0] != IGNORED).nonzero()[7]
    grad[0, counted[0], counted[1]] = float("nan")
    gradients = []
    for function, options in ((upsample_cross_entropy, {"ignore_index": IGNORED}), (cross_entropy, {})):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, target, reduction="none", **options, **geometry)
        gradients.append(torch.autograd.grad(losses, leaf, grad)[0])
    same(*[[g] for g in gradients])
    assert gradients[0].isnan().any() and not gradients[0][1:].isnan().any()


@pytest.mark.parametrize("factor", [1.1, (1.15, 2.3)], ids=str)
def test_an_axis_that_keeps_its_size_is_copied_as_torch_does(factor):
    logits = torch.randn(1, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = interpolate(logits, scale_factor=factor)
    target = torch.zeros(1, *expected.shape[2:], dtype=torch.int64)
    losses = upsample_cross_entropy(logits, target, scale_factor=factor, reduction="none")
    same([losses], [cross_entropy(logits, target, scale_factor=factor, reduction="none")])
