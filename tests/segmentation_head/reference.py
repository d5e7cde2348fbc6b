"""Holds the segmentation head, values and gradients, to torch's separate functions by the error rule.

Shared by the tests of its kernels and of its operators.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import segfast
from segfast.functional import upsample_argmax, upsample_cross_entropy, upsample_dice

from ..fused_conv import draw
from ..tolerances import assert_close_to_reference

IGNORED = 255
NOT_FINITE = [float("-inf"), float("inf"), float("nan")]
# Logits [N, C, H, W], and arguments of torch.nn.functional.interpolate. Odd sizes, no block full.
GEOMETRIES = {
    "x4": ((2, 5, 3, 4), {"scale_factor": 4}),
    "x2": ((1, 3, 4, 3), {"scale_factor": 2}),
    "x(2, 8)": ((1, 9, 2, 3), {"scale_factor": (2.0, 8.0)}),
    "x(8, 1)": ((1, 3, 2, 3), {"scale_factor": (8.0, 1.0)}),
    "x(1, 32)": ((1, 3, 2, 2), {"scale_factor": (1.0, 32.0)}),
    "x3, sources on the cells' edges": ((1, 4, 5, 7), {"scale_factor": 3}),
    "x2.3": ((1, 6, 5, 4), {"scale_factor": 2.3}),
    "x(1.5, 4)": ((1, 4, 3, 5), {"scale_factor": (1.5, 4.0)}),
    "by size": ((2, 19, 4, 3), {"size": (13, 11)}),
    "by size, one axis kept": ((1, 4, 4, 5), {"size": (4, 17)}),
    "corners": ((1, 7, 5, 4), {"size": (11, 18), "align_corners": True}),
    "corners x(2, 8)": ((1, 3, 3, 5), {"size": (5, 33), "align_corners": True}),
    "corners to one pixel": ((2, 3, 3, 4), {"size": 1, "align_corners": True}),
    "smaller": ((1, 6, 9, 8), {"size": (4, 5)}),
    "smaller, corners": ((1, 6, 9, 8), {"size": (4, 5), "align_corners": True}),
    "x(1.1, 2), one axis kept": ((1, 5, 4, 3), {"scale_factor": (1.1, 2.0)}),
    "x0.6": ((1, 4, 7, 9), {"scale_factor": 0.6}),
    "same size": ((1, 4, 3, 5), {"size": (3, 5)}),
    "one pixel": ((1, 2, 1, 1), {"size": (5, 6)}),
    "nearest x4": ((2, 6, 3, 4), {"scale_factor": 4, "mode": "nearest"}),
    "nearest by size": ((1, 4, 5, 7), {"size": (3, 20), "mode": "nearest"}),
    "nearest x2.3": ((1, 5, 4, 3), {"scale_factor": 2.3, "mode": "nearest"}),
}


def interpolate(logits: Tensor, mode: str = "bilinear", align_corners: bool = False, **size) -> Tensor:
    corners = {} if mode == "nearest" else {"align_corners": align_corners}
    return F.interpolate(logits, mode=mode, **corners, **size)


def head(shape, geometry, dtype=torch.float32, channels_last=False) -> tuple[Tensor, Tensor]:
    """Logits of some size and a target with a few ignored pixels."""
    logits = (3 * draw(*shape, channels_last=channels_last)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    size = interpolate(logits[:, :1].float(), **geometry).shape[2:]
    target = torch.randint(shape[1], (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.15] = IGNORED
    return logits, target


def spoiled(name: str, values) -> tuple[Tensor, Tensor, dict]:
    """A geometry's logits and target, thrice: one logit is not finite, in a corner, on a border and inside.

    Each of another class, and of the value in its place.
    """
    shape, geometry = GEOMETRIES[name]
    logits, target = (t[:1].repeat(3, *(t.dim() - 1) * [1]) for t in head(shape, geometry))
    places = ((0, 0), (shape[2] - 1, shape[3] // 2), (shape[2] // 2, shape[3] // 2))
    for i, ((row, column), value) in enumerate(zip(places, values, strict=True)):
        logits[i, i % shape[1], row, column] = value
    return logits, target, geometry


# Here whether an output lies on a pixel, or a rounding beside it, hangs on fused multiply-adds.
ROUNDED = ("x3, sources on the cells' edges", "by size", "x0.6", "one pixel")
# Of `spoiled`: a class masked out, and a mixture.
SPOILS = [("-inf", "-inf", "-inf"), ("inf", "nan", "inf"), ("nan", "inf", "-inf")]


def check_kernels_spread_as_torch(name: str, spoils, device: torch.device) -> None:
    """Losses, labels and gradients by our kernels have their infinities and NaN where torch has them.

    But for one place in gradients: the second pixel of an axis, which outputs before the first one reach with
    a weight of zero. Zero times NaN is NaN in torch.
    """
    logits, target, geometry = spoiled(name, [float(spoil) for spoil in spoils])

    def ours(leaf, target, loss=upsample_cross_entropy, **options):
        with segfast.backend("triton"):
            return loss(leaf.to(device), target.to(device), ignore_index=IGNORED, **options)

    def compare(actual, expected):
        assert_same(actual[0].cpu(), expected[0])
        gradient, wanted = actual[1], expected[1].clone()
        spared = wanted.isnan() & ~gradient.isnan()
        second = torch.zeros_like(spared)
        second[:, :, 1:2] = second[:, :, :, 1:2] = True
        assert not (spared & ~second).any()
        wanted[spared] = gradient[spared]
        assert_same(gradient, wanted)

    options = {"reduction": "none", "label_smoothing": 0.1 * (len(name) % 2)}
    expected = value_and_gradient(cross_entropy, logits, target, **options, **geometry)
    compare(value_and_gradient(ours, logits, target, **options, **geometry), expected)
    image, labels = logits[:1], target[:1]  # a dice loss is of all images
    expected = value_and_gradient(dice, image, labels, **geometry)
    actual = value_and_gradient(ours, image, labels, loss=upsample_dice, **geometry)
    if expected[0].isnan():  # in torch all gradients are NaN then, of ignored pixels too
        assert actual[0].isnan() and actual[1].isnan().any()
    else:
        compare(actual, expected)
    z = interpolate(logits, **geometry)
    with segfast.backend("triton"):
        labels, confidence = upsample_argmax(logits.to(device), return_confidence=True, **geometry)
        alone = upsample_argmax(logits.to(device), **geometry)
    assert torch.equal(labels.cpu(), z.argmax(1)) and torch.equal(labels, alone)
    assert_same(confidence.cpu(), z.softmax(1).amax(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same infinities and NaN, and the same numbers to fp32's roundings."""
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=1e-5, rtol=1e-4)


def cross_entropy(logits, target, weight=None, label_smoothing=0.0, reduction="mean", **geometry) -> Tensor:
    """The definition."""
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(interpolate(logits, **geometry), target, weight, ignore_index=IGNORED,
                           label_smoothing=label_smoothing, reduction=reduction)  # fmt: skip


def dice(logits, target, smooth=0.0, eps=1e-7, **geometry) -> Tensor:
    """The definition, as segmentation_models_pytorch's DiceLoss("multiclass") has it."""
    p = interpolate(logits, **geometry).log_softmax(1).exp()
    mask = (target != IGNORED)[:, None]
    p = p * mask
    t = (F.one_hot(target * mask[:, 0], p.shape[1]).movedim(-1, 1) * mask).to(p.dtype)
    dims = (0, 2, 3)
    score = (2 * (p * t).sum(dims) + smooth) / ((p + t).sum(dims) + smooth).clamp_min(eps)
    return ((1 - score) * (t.sum(dims) > 0)).mean()


def value_and_gradient(function, logits: Tensor, *args, absolute=False, **options) -> tuple[Tensor, Tensor]:
    """A loss, and the logits' gradient for a random one of the loss, or for its absolute value."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf, *args, **options)
    grad = draw(*loss.shape, seed=2).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, grad.abs() if absolute else grad)[0]


def _terms(
    logits, target, weight=None, label_smoothing=0.0, reduction="mean", smooth=0.0, eps=0.0, **geometry
):
    """A loss whose gradient is the sum of the absolute terms that cancel in a cross-entropy's gradient."""
    z = interpolate(logits, **geometry)
    p, counted = z.detach().softmax(1), (target != IGNORED)[:, None]
    label = torch.where(counted, target[:, None], 0)
    largest = 1.0 if weight is None else weight.max().item()
    terms = largest * counted * ((p * z).sum(1, keepdim=True) + z.gather(1, label) + z.mean(1, keepdim=True))
    if reduction == "none":
        return terms[:, 0]
    return terms.sum() / (largest * counted.sum() if reduction == "mean" else 1)


def check(function, definition, logits: Tensor, target: Tensor, **options) -> None:
    """`function` against the definition in fp64, allowed twice the definition's error in the logits' dtype.

    What rounding costs beyond that is judged by the size of the logits: a loss is a difference of them.
    """
    reference, reference_grad = value_and_gradient(definition, logits.double(), target, **options)
    aten, aten_grad = value_and_gradient(definition, logits, target, **options)
    actual, actual_grad = value_and_gradient(function, logits, target, **options)
    classes, size = logits.shape[1], 1 + logits.abs().max().double()
    assert_close_to_reference(actual, reference, aten, 2 * size, classes, "loss")
    outputs = max(1, target.numel() // max(1, logits[:, 0].numel())) * 4
    _, terms = value_and_gradient(_terms, logits.double(), target, absolute=True, **options)
    assert_close_to_reference(actual_grad, reference_grad, aten_grad, size * terms, outputs, "gradient")
    assert actual_grad.stride() == logits.stride()


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Each label's score is the largest: of scores [N, C, H, W] that rounding makes equal, any will do.

    In fp32 a place between two pixels is off by a rounding of its coordinate, a score by as much of itself.
    """
    scores = scores.double()
    allowed = torch.finfo(torch.float32).eps * max(scores.shape[-2:]) * scores.abs().amax()
    missing = scores.amax(1) - scores.gather(1, labels[:, None])[:, 0]
    assert labels.dtype == torch.int64 and (missing <= allowed).all()
