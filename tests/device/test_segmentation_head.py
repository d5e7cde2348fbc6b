"""The segmentation head on a device: losses, labels and gradients, in every dtype, resampling and layout."""

import random

import pytest
import torch
import torch.nn.functional as F

import segfast
import segfast.functional as SF
from segfast.kernels._launch import _LAUNCHES

from ..segmentation_head.reference import IGNORED, SPOILS, check_kernels_spread_as_torch, head, interpolate
from .tester import DTYPES, compare, place

pytestmark = pytest.mark.device

# Logits, arguments of interpolate, the layout, and whether classes are weighted and labels smoothed.
CASES = {
    "x4": ((2, 21, 9, 7), {"scale_factor": 4}, "", False, 0.0),
    "x8, weighted, smoothed": ((1, 5, 5, 9), {"scale_factor": 8}, "", True, 0.1),
    "x2.3, NCHW": ((2, 19, 7, 8), {"scale_factor": 2.3}, "NCHW", True, 0.0),
    "corners, odd strides": ((1, 7, 6, 5), {"size": (11, 18), "align_corners": True}, "wide", False, 0.2),
    "smaller, off 16 bytes": ((1, 8, 9, 8), {"size": (4, 5)}, "off16", False, 0.0),
    "nearest, cropped": ((1, 33, 5, 7), {"size": (3, 20), "mode": "nearest"}, "crop", True, 0.1),
    "one pixel": ((3, 2, 1, 1), {"size": (5, 6)}, "", False, 0.0),
    "width 1, NCHW": ((1, 3, 19, 1), {"scale_factor": (2.0, 1.0)}, "NCHW", False, 0.0),
    "150 classes": ((1, 150, 5, 4), {"scale_factor": 4}, "", False, 0.0),
}


def random_case(rng: random.Random):
    """Any classes, sizes, resampling and layout."""
    height, width = rng.choice([1, 2, 5, 8]), rng.choice([1, 3, 4, 9])
    shape = (rng.choice([1, 1, 2]), rng.choice([2, 3, 8, 19, 40]), height, width)
    factor = (rng.choice([1.0, 1.7, 2.0, 3.0, 4.0]), rng.choice([1.0, 1.3, 2.0, 4.0, 8.0]))
    size = (rng.choice([1, 3, height, 2 * height, 13]), rng.choice([1, 4, width, 3 * width, 14]))
    geometry = {"scale_factor": factor} if rng.random() < 0.5 else {"size": size}
    geometry |= rng.choice([{}, {}, {"align_corners": True}, {"mode": "nearest"}])
    layout = rng.choice(["", "NCHW", "wide", "crop", "off16"])
    return shape, geometry, layout, rng.random() < 0.5, rng.choice([0.0, 0.0, 0.15])


CASES |= {f"random {seed}": random_case(random.Random(seed)) for seed in range(3)}
DTYPE = pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32"])


def drawn(name, arithmetic, device):
    shape, geometry, layout, weighted, smoothing = CASES[name]
    logits, target = head(shape, geometry, DTYPES[arithmetic])
    weight = torch.linspace(0.5, 1.5, shape[1]) if weighted else None
    given = place(logits.to(device), layout).requires_grad_()
    options = {"weight": weight, "label_smoothing": smoothing}
    return logits.double().requires_grad_(), given, target, options, geometry


def twice(function):
    """The second call's result; it launches what the first one's launches say."""
    function()
    launches = dict(_LAUNCHES)
    result = function()
    assert launches and launches == _LAUNCHES
    return result


def judge(what, actual, reference, size, arithmetic):
    """To one rounding, and a small share of `size`, that of the terms which were summed."""
    compare(what, actual, reference, torch.full_like(reference, float(size)), arithmetic)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@DTYPE
def test_cross_entropy(name, reduction, arithmetic, device):
    wide, given, target, options, geometry = drawn(name, arithmetic, device)
    weight = options["weight"]
    z = interpolate(wide, **geometry)
    expected = F.cross_entropy(
        z, target, None if weight is None else weight.double(), ignore_index=IGNORED,
        label_smoothing=options["label_smoothing"], reduction=reduction,
    )  # fmt: skip
    grad = torch.linspace(-1, 1, expected.numel()).view(expected.shape).to(DTYPES[arithmetic])
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())

    def run():
        on_device = None if weight is None else weight.to(device)
        loss = SF.upsample_cross_entropy(
            given, target.to(device), weight=on_device, ignore_index=IGNORED, reduction=reduction,
            label_smoothing=options["label_smoothing"], **geometry,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss, given, grad.to(loss))[0]

    with segfast.backend("triton"):
        loss, found = twice(run)
    largest = z.abs().amax().item()
    judge(
        "loss", loss.float(), expected.detach(), 4 * largest, arithmetic
    ) if arithmetic == "float32" else judge("loss", loss, expected.detach(), 4 * largest, arithmetic)
    # Of the outputs that a low-resolution pixel's gradient sums over, each with an error of its softmax.
    outputs = z[0, 0].numel() / wide[0, 0].numel() + 4
    share = grad.abs().max().item() / (1 if reduction == "none" else (target != IGNORED).sum().item())
    judge("gradient", found, expected_grad, 4 * outputs * share * (1 + largest), arithmetic)


@pytest.mark.parametrize("name", CASES)
@DTYPE
def test_labels_and_dice(name, arithmetic, device):
    wide, given, target, _, geometry = drawn(name, arithmetic, device)
    z = interpolate(wide, **geometry)
    p = z.softmax(1)

    def label():
        return SF.upsample_argmax(given, return_confidence=True, **geometry)

    def dice():
        loss = SF.upsample_dice(given, target.to(device), ignore_index=IGNORED, **geometry)
        return loss, torch.autograd.grad(loss, given, torch.ones_like(loss))[0]

    with segfast.backend("triton"):
        labels, confidence = twice(label)
        loss, found = twice(dice)
    best = p.amax(1).detach()
    # Where two classes are as good as equal either label is right: judged by its probability.
    chosen = p.gather(1, labels.cpu()[:, None])[:, 0]
    judge("probability of the label", chosen.detach().float(), best, 4 * z.abs().amax(), "float32")
    judge("confidence", confidence, best, 4 * z.abs().amax(), "float32")

    with segfast.backend("aten"):
        expected = SF.upsample_dice(wide, target, ignore_index=IGNORED, **geometry)
    (expected_grad,) = torch.autograd.grad(expected, wide)
    judge("dice", loss, expected.detach(), 1 + z.abs().amax(), arithmetic)
    judge("gradient of dice", found, expected_grad, 64 * expected_grad.abs().amax(), arithmetic)


@pytest.mark.parametrize("spoils", SPOILS, ids=" ".join)
@pytest.mark.parametrize("name", ["x4", "x2.3", "corners", "smaller", "x(8, 1)", "nearest by size"])
def test_logits_that_are_not_finite_reach_what_they_reach_in_torch(name, spoils, device):
    check_kernels_spread_as_torch(name, spoils, device)
