"""The segmentation head's kernels in Triton's interpreter, against fp64 and torch's separate functions."""

import pytest
import torch

import segfast
from segfast.functional import upsample_argmax, upsample_cross_entropy, upsample_dice
from segfast.kernels import Tile, override_tile
from segfast.kernels.segmentation_head import _cells, dice_sums, forward, grad_logits
from tests.segmentation_head.reference import (
    GEOMETRIES,
    IGNORED,
    ROUNDED,
    SPOILS,
    assert_same,
    check,
    check_kernels_spread_as_torch,
    check_labels,
    cross_entropy,
    dice,
    head,
    interpolate,
    value_and_gradient,
)

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def kernels():
    with segfast.backend("triton"):
        yield


def ours(logits, target, **options):
    return upsample_cross_entropy(logits, target, ignore_index=IGNORED, **options)


def our_dice(logits, target, **options):
    return upsample_dice(logits, target, ignore_index=IGNORED, **options)


def weights(classes):
    return torch.linspace(0.5, 1.5, classes)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_cross_entropy_is_torchs(name, poisoned_empty):
    shape, geometry = GEOMETRIES[name]
    logits, target = head(shape, geometry, channels_last=len(name) % 2 == 0)
    options = {"reduction": "none"}
    if list(GEOMETRIES).index(name) % 2:
        options = {"weight": weights(shape[1]), "label_smoothing": 0.1, "reduction": "sum"}
    check(ours, cross_entropy, logits, target, **options, **geometry)


@pytest.mark.parametrize("name", ["x4", "x2.3", "corners", "smaller", "nearest by size"])
def test_dice_is_the_definition(name, poisoned_empty):
    shape, geometry = GEOMETRIES[name]
    logits, target = head(shape, geometry)
    check(our_dice, dice, logits, target, smooth=0.5, **geometry)


@pytest.mark.compat
@pytest.mark.parametrize("name", ["x2", "corners x(2, 8)", "nearest x4"])
def test_half_precision_computes_in_fp32(name, poisoned_empty):
    shape, geometry = GEOMETRIES[name]
    logits, target = head(shape, geometry, torch.float16)
    check(ours, cross_entropy, logits, target, label_smoothing=0.2, **geometry)
    check(our_dice, dice, logits, target, **geometry)


@pytest.mark.compat
@pytest.mark.parametrize("name", GEOMETRIES)
def test_labels_and_their_probability(name):
    shape, geometry = GEOMETRIES[name]
    dtype = torch.float16 if list(GEOMETRIES).index(name) % 3 == 0 else torch.float32
    logits, _ = head(shape, geometry, dtype, channels_last=len(name) % 2 == 1)
    labels, confidence = upsample_argmax(logits, return_confidence=True, **geometry)
    expected = interpolate(logits.double(), **geometry)
    best = expected.softmax(1).amax(1)
    assert confidence.dtype == torch.float32
    check_labels(labels, expected)
    torch.testing.assert_close(confidence.double(), best, atol=1e-5, rtol=1e-5)
    assert torch.equal(upsample_argmax(logits, **geometry), labels)


def test_of_equal_logits_the_first_class_is_taken():
    logits = torch.zeros(1, 11, 2, 3)
    logits[:, [6, 9]] = 1.0  # in different blocks of classes
    assert (upsample_argmax(logits, scale_factor=4) == 6).all()


TILES = [Tile(16, 2, 1, 4, 1, 1), Tile(32, 4, 1, 4, 1, 2), Tile(64, 16, 1, 4, 1, 3)]


@pytest.mark.parametrize("tile", TILES, ids=lambda c: f"{c.block_m}x{c.block_n}")
def test_every_tile_size_gives_the_same(tile, poisoned_empty):
    # split_k is the rows of a strip of the gradient: one, two, and more than divide the height.
    geometry = {"size": (9, 11)}
    shape = (2, 5, 5, 3)
    logits, target = head(shape, geometry)
    operations = segfast.ops.segmentation_head.OPERATIONS
    with override_tile(operations[0], tile), override_tile(operations[1], tile):
        check(ours, cross_entropy, logits, target, weight=weights(shape[1]), **geometry)
        with override_tile(operations[3], tile), override_tile(operations[4], tile):
            check(our_dice, dice, logits, target, **geometry)
    with override_tile(operations[2], tile):
        check_labels(upsample_argmax(logits, **geometry), interpolate(logits, **geometry))


def test_dice_sums_over_several_steps_of_a_program(monkeypatch, poisoned_empty):
    monkeypatch.setattr(dice_sums, "PROGRAMS", 2)
    shape, geometry = GEOMETRIES["x2"]
    logits, target = head(shape, geometry)
    with override_tile("upsample_dice_sums", Tile(16, 2, 1, 4, 1)):
        check(our_dice, dice, logits, target, **geometry)


def test_wide_offsets_compute_the_same(monkeypatch, poisoned_empty):
    shape, geometry = GEOMETRIES["x2"]
    logits, target = head(shape, geometry)

    def results():
        losses = [value_and_gradient(f, logits, target, **geometry) for f in (ours, our_dice)]
        return [t for loss in losses for t in loss] + [upsample_argmax(logits, **geometry)]

    expected = results()
    for module in (forward, grad_logits, dice_sums, segfast.kernels.segmentation_head.argmax):
        monkeypatch.setattr(module, "needs_wide_index", lambda *tensors: True)
    segfast.kernels._launch.forget_launches()
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    segfast.kernels._launch.forget_launches()


def test_every_output_is_in_one_cell_whatever_the_sizes(poisoned_empty):
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        width, out_width, kind = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 70, 4))
        geometry = {"size": (1, out_width), "align_corners": kind == 1}
        if kind == 2:
            geometry = {"scale_factor": (1.0, out_width / width)}
        elif kind == 3:
            geometry["mode"] = "nearest"
            del geometry["align_corners"]
        logits, target = head((1, 2, 1, width), geometry)
        check(ours, cross_entropy, logits, target, reduction="none", **geometry)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 100])
def test_stretches_hold_the_outputs_of_a_cell(most):
    parts, slots = _cells.stretch(most)
    assert parts * slots >= most > (parts - 1) * slots


def test_labels_of_other_integer_types():
    shape, geometry = GEOMETRIES["x4"]
    logits, target = head(shape, geometry)
    expected = value_and_gradient(ours, logits, target, **geometry)
    for dtype in (torch.int32, torch.uint8):
        actual = value_and_gradient(ours, logits, target.to(dtype), **geometry)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_label_that_is_no_class_is_seen_in_the_loss():
    shape, geometry = GEOMETRIES["x2"]
    logits, target = head(shape, geometry)
    target[0, 3, :4] = torch.tensor([3, -1, 2**40, -(2**40)])
    losses = ours(logits, target, reduction="none", **geometry)
    assert losses[0, 3, :4].isnan().all() and losses.isnan().sum() == 4
    for function in (ours, our_dice):
        loss, grad = value_and_gradient(function, logits, target, **geometry)
        assert loss.isnan() and grad.isnan().any()


def test_one_class_costs_nothing(poisoned_empty):
    logits, target = head((1, 1, 3, 3), {"scale_factor": 2})
    for function in (ours, our_dice):
        loss, grad = value_and_gradient(function, logits, target, scale_factor=2)
        assert loss.abs() < 1e-6 and grad.abs().max() < 1e-6
    assert (upsample_argmax(logits, scale_factor=2) == 0).all()


def test_as_many_classes_as_the_kernels_serve(poisoned_empty):
    geometry = {"size": (2, 3)}
    logits, target = head((1, 1024, 1, 2), geometry)
    losses = ours(logits, target, label_smoothing=0.1, reduction="none", **geometry)
    expected = cross_entropy(logits.double(), target, label_smoothing=0.1, reduction="none", **geometry)
    torch.testing.assert_close(losses, expected.float(), atol=2e-5, rtol=1e-6)


def test_large_logits_do_not_overflow():
    shape, geometry = GEOMETRIES["x4"]
    logits, target = head(shape, geometry)
    for scale in (1e3, 1e4):
        check(ours, cross_entropy, scale * logits, target, **geometry)


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ROUNDED])
def test_logits_that_are_not_finite_reach_what_they_reach_in_torch(name, poisoned_empty):
    spoils = SPOILS[list(GEOMETRIES).index(name) % len(SPOILS)]
    check_kernels_spread_as_torch(name, spoils, torch.device("cpu"))


def test_a_masked_class_stays_where_it_is():
    x = torch.zeros(1, 4, 16, 16)
    x[:, 0] = 1
    x[0, 1, 2, 2] = float("-inf")
    assert (upsample_argmax(x, scale_factor=8) == 0).all()
    x[:, 2:] = float("-inf")  # a class that no pixel may have
    x[0, 3, 0, 0] = 2.0
    z = interpolate(x, scale_factor=8)
    assert torch.equal(upsample_argmax(x, scale_factor=8), z.argmax(1))


def test_without_any_class_left_the_loss_is_nan():
    logits, target = head((1, 3, 4, 4), {"scale_factor": 2})
    logits[:, :, 2, 2] = float("-inf")
    losses = ours(logits, target, reduction="none", scale_factor=2)
    expected = cross_entropy(logits, target, reduction="none", scale_factor=2)
    assert expected.isnan().any() and torch.equal(losses.isnan(), expected.isnan())
    labels, confidence = upsample_argmax(logits, scale_factor=2, return_confidence=True)
    z = interpolate(logits, scale_factor=2)
    assert torch.equal(labels, z.argmax(1))
    assert torch.equal(confidence.isnan(), z.softmax(1).amax(1).isnan())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_reaches_its_pixels(value):
    shape, geometry = GEOMETRIES["x4"]
    logits, target = head(shape, geometry)
    grad = torch.ones(target.shape)
    grad[target == IGNORED] = float(value)  # counts for nothing
    inside = (target[0, 2:-2, 2:-2] != IGNORED).nonzero()[7] + 2
    grad[0, inside[0], inside[1]] = float(value)
    gradients = []
    for function in (ours, cross_entropy):
        leaf = logits.clone().requires_grad_()
        losses = function(leaf, target, reduction="none", **geometry)
        gradients.append(torch.autograd.grad(losses, leaf, grad)[0])
    assert_same(*gradients)
    assert not gradients[1].isfinite().all() and gradients[1][1:].isfinite().all()
