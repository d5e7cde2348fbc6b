"""`upsample_cross_entropy`, `upsample_argmax` and `upsample_dice` against torch's separate functions."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import upsample_argmax, upsample_cross_entropy, upsample_dice
from segfast.ops.segmentation_head import (
    ARGMAX,
    CROSS_ENTROPY,
    CROSS_ENTROPY_BACKWARD,
    DICE_SUMS,
    DICE_SUMS_BACKWARD,
    chunked,
    formulas,
)
from tests.conformance.test_operators import operator_calls
from tests.fused_conv import BACKENDS, draw
from tests.segmentation_head.reference import (
    GEOMETRIES,
    IGNORED,
    check,
    check_labels,
    cross_entropy,
    dice,
    head,
    interpolate,
    value_and_gradient,
)

# Wide enough for several tiles of rows and of columns, on a CPU's way.
TILED = {
    "two tiles of rows": ((2, 40, 5, 6), {"scale_factor": 16}),
    "tiles of columns": ((1, 12, 3, 70), {"scale_factor": (5.0, 3.0)}),
    "tiles of columns, corners": ((1, 3, 4, 80), {"size": (9, 301), "align_corners": True}),
    "tiles of columns, nearest": ((1, 3, 4, 80), {"size": (9, 301), "mode": "nearest"}),
    "tiles of columns, smaller": ((1, 200, 9, 90), {"size": (7, 67)}),
}
OPTIONS = {
    "plain": {},
    "weighted": {"weight": torch.linspace(0.5, 1.5, 256)},
    "smoothed": {"label_smoothing": 0.2},
    "both": {"weight": torch.linspace(0.5, 1.5, 256), "label_smoothing": 1.0},
}


@pytest.fixture
def own_choice():
    """For tests that leave the choice between tiles and torch's two functions to the library."""


@pytest.fixture(autouse=True)
def tiles_for_all(request, monkeypatch):
    """Tiles on a CPU, however little there is to compute."""
    if "own_choice" not in request.fixturenames:
        monkeypatch.setattr(chunked, "worth_tiling", lambda *call: True)


def ours(logits, target, **options):
    return upsample_cross_entropy(logits, target, ignore_index=IGNORED, **options)


def our_dice(logits, target, **options):
    return upsample_dice(logits, target, ignore_index=IGNORED, **options)


def small(dtype=torch.float32, channels_last=False):
    geometry = {"size": (5, 7)}
    return (*head((2, 3, 3, 4), geometry, dtype, channels_last), geometry)


def cut(options, classes):
    return {name: value[:classes] if name == "weight" else value for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [*GEOMETRIES, *TILED])
def test_cross_entropy_is_torchs(name, options):
    shape, geometry = (GEOMETRIES | TILED)[name]
    logits, target = head(shape, geometry, channels_last=len(name) % 2 == 0)
    for reduction in ("mean", "sum", "none"):
        check(ours, cross_entropy, logits, target, reduction=reduction, **cut(options, shape[1]), **geometry)


@pytest.mark.parametrize("name", [*GEOMETRIES, *TILED])
def test_dice_is_the_definition(name):
    shape, geometry = (GEOMETRIES | TILED)[name]
    logits, target = head(shape, geometry)
    check(our_dice, dice, logits, target, **geometry)
    check(our_dice, dice, logits, target, smooth=1.0, eps=50.0, **geometry)


@pytest.mark.parametrize("name", [*GEOMETRIES, *TILED])
def test_labels_are_torchs(name):
    shape, geometry = (GEOMETRIES | TILED)[name]
    logits, _ = head(shape, geometry, torch.float64)
    labels, confidence = upsample_argmax(logits, return_confidence=True, **geometry)
    best, expected = interpolate(logits, **geometry).softmax(1).max(1)
    assert torch.equal(labels, expected) and torch.equal(upsample_argmax(logits, **geometry), labels)
    torch.testing.assert_close(confidence, best.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    logits, target, geometry = small(dtype)
    check(ours, cross_entropy, logits, target, label_smoothing=0.1, **geometry)
    check(our_dice, dice, logits, target, **geometry)
    assert ours(logits, target, **geometry).dtype == our_dice(logits, target, **geometry).dtype == dtype
    if dtype != torch.float64:
        expected = upsample_argmax(logits.double(), return_confidence=True, **geometry)
        torch.testing.assert_close(upsample_argmax(logits, return_confidence=True, **geometry), expected)


@pytest.mark.parametrize("geometry", [{"size": (4, 5)}, {"size": (4, 5), "align_corners": True},
                                      {"size": (4, 5), "mode": "nearest"}, {"size": (2, 2)}])  # fmt: skip
def test_gradcheck_and_gradgradcheck(geometry):
    logits, target = head((2, 3, 2, 3), geometry, torch.float64)
    logits.requires_grad_()
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options = {"ignore_index": IGNORED, **geometry}
    for reduction, smoothing in (("mean", 0.1), ("none", 0.0), ("none", 0.3)):

        def loss(x, reduction=reduction, smoothing=smoothing):
            return upsample_cross_entropy(
                x, target, weight=weight, label_smoothing=smoothing, reduction=reduction, **options
            )

        assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)

    def dice_loss(x):
        return upsample_dice(x, target, smooth=0.5, **options)

    assert torch.autograd.gradcheck(dice_loss, logits) and torch.autograd.gradgradcheck(dice_loss, logits)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_targets_and_gradients_of_any_strides(layout, backend, poisoned_empty):
    logits, target, geometry = small()
    x = LAYOUTS[layout](logits)
    dense, strided = target.clone(), target.transpose(1, 2).contiguous().transpose(1, 2)
    grad_output = draw(7, 5, 2).permute(2, 1, 0)
    results = []
    for leaf, labels in ((x.double().contiguous(), dense), (x, strided)):
        leaf = leaf.detach().requires_grad_()
        with segfast.backend(backend):
            function = cross_entropy if leaf.dtype == torch.float64 else ours
            losses = function(leaf, labels, reduction="none", **geometry)
        gradients = [torch.autograd.grad(losses, leaf, g.to(losses.dtype), retain_graph=True)[0]
                     for g in (grad_output, grad_output[:, :1, :1].expand(2, 5, 7))]  # fmt: skip
        results.append([losses, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


TWINS = {
    CROSS_ENTROPY: (chunked.cross_entropy, formulas.cross_entropy),
    CROSS_ENTROPY_BACKWARD: (chunked.cross_entropy_gradient, formulas.cross_entropy_gradient),
    ARGMAX: (chunked.argmax, formulas.argmax),
    DICE_SUMS: (chunked.dice_sums, formulas.dice_sums),
    DICE_SUMS_BACKWARD: (chunked.dice_gradient, formulas.dice_gradient),
}


@pytest.mark.parametrize("operator", TWINS)
def test_tiles_and_definitions_agree(operator):
    # The definition is what a decomposition computes.
    tiled, plain = TWINS[operator]
    for args in operator_calls()[operator.name]:
        torch.testing.assert_close(tiled(*args), plain(*args))


def forward_pass(logits, target, weight):
    loss = upsample_cross_entropy(logits, target, weight=weight, label_smoothing=0.1, ignore_index=IGNORED)
    labels, confidence = upsample_argmax(logits, target.shape[1:], return_confidence=True)
    return loss + upsample_dice(logits, target, ignore_index=IGNORED), labels, confidence


def train_step(logits, target, weight):
    outputs = forward_pass(logits, target, weight)
    return *outputs, torch.autograd.grad(outputs[0], logits)[0]


@pytest.mark.compat
def test_compiles_for_labels_of_any_size():
    torch._dynamo.reset()
    with segfast.backend("aten"):
        compiled = torch.compile(forward_pass, backend="aot_eager", fullgraph=True, dynamic=True)
        for height, width in ((4, 6), (5, 7)):
            logits, target = head((2, 3, height, width), {"size": (2 * height + 1, 17)})
            weight = torch.rand(3)
            results = []
            for function in (forward_pass, compiled):
                leaf = logits.clone().requires_grad_()
                outputs = function(leaf, target, weight)
                results.append((*outputs, torch.autograd.grad(outputs[0], leaf)[0]))
            torch.testing.assert_close(results[1], results[0])


@pytest.mark.compat
def test_exports_and_decomposes():
    class Head(torch.nn.Module):
        def forward(self, logits, target):
            return forward_pass(logits, target, None)

    logits, target, _ = small()
    program = torch.export.export(Head(), (logits, target))
    operators = {str(node.target) for node in program.graph.nodes if "segfast" in str(node.target)}
    assert len(operators) == 3
    plain = program.run_decompositions(segfast.decompositions())
    assert not any("segfast" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(logits, target), Head()(logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    logits, target, _ = small()
    with segfast.backend(backend):
        for function in (ours, our_dice):
            leaf = logits.clone().requires_grad_()
            (expected,) = torch.autograd.grad(function(leaf, target), leaf)
            torch.testing.assert_close(grad(lambda x, f=function: f(x, target))(logits), expected)
            each = vmap(grad(lambda x, t, f=function: f(x[None], t[None])))(logits, target)
            for i in range(2):
                alone = grad(lambda x, f=function, i=i: f(x, target[i : i + 1]))(logits[i : i + 1])
                torch.testing.assert_close(each[i], alone[0])
        labels = vmap(lambda x: upsample_argmax(x[None], (5, 7))[0])(logits)
        assert torch.equal(labels, upsample_argmax(logits, (5, 7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_losses_in_fp32_as_torch_does(backend):
    logits, target, geometry = small(torch.float16)
    results = []
    for function, reference in ((ours, cross_entropy), (our_dice, dice)):
        with torch.autocast("cpu", torch.bfloat16), segfast.backend(backend):
            loss, gradient = value_and_gradient(function, logits, target, **geometry)
        expected, _ = value_and_gradient(reference, logits.double(), target, **geometry)
        assert loss.dtype == torch.float32 and gradient.dtype == torch.float16
        results.append((loss.double() - expected).abs() <= 1e-5)
    assert all(results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_repeats_to_the_last_bit(backend):
    logits, target, _ = small()
    with segfast.backend(backend):
        runs = [train_step(logits.clone().requires_grad_(), target, torch.ones(3)) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts_as_in_torch(backend):
    logits, _, geometry = small()
    target = torch.full((2, 5, 7), IGNORED)
    with segfast.backend(backend):
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.1):
                options = {"reduction": reduction, "label_smoothing": smoothing, **geometry}
                expected = value_and_gradient(cross_entropy, logits, target, **options)
                actual = value_and_gradient(ours, logits, target, **options)
                assert torch.equal(actual[0].isnan(), expected[0].isnan())
                assert (actual[1] == 0).all()
        loss, gradient = value_and_gradient(our_dice, logits, target, **geometry)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(1, 9, 8, 8), (1, 7, 64, 64)], ids=["few logits", "few classes"])
def test_where_little_is_saved_torchs_two_functions_run(shape, own_choice):
    logits, target = head(shape, {"scale_factor": 4})
    weight = torch.rand(shape[1])
    options = {"label_smoothing": 0.1, "scale_factor": 4}
    expected = value_and_gradient(cross_entropy, logits, target, weight=weight, **options)
    for labels, weights in ((target, weight), (target.int(), weight.double())):
        with FlopCounterMode(display=False) as counter:
            actual = value_and_gradient(ours, logits, labels, weight=weights, **options)
        assert counter.get_total_flops() == 0
        torch.testing.assert_close(actual, expected)


def test_where_much_is_saved_tiles_run(own_choice):
    logits, target = head((1, 16, 32, 32), {"scale_factor": 4})
    with FlopCounterMode(display=False) as counter:
        check(ours, cross_entropy, logits, target, scale_factor=4)
        upsample_argmax(logits, scale_factor=4)
    assert counter.get_total_flops() == 4 * 8 * 16 * 128 * 128


def test_a_few_pixels_are_labeled_as_many_are(own_choice):
    logits, target, geometry = small()
    labels, confidence = upsample_argmax(logits, return_confidence=True, **geometry)
    scores = interpolate(logits, **geometry)
    best = scores.softmax(1).amax(1)
    check_labels(labels, scores)
    assert torch.equal(upsample_argmax(logits, **geometry), labels)
    torch.testing.assert_close(confidence, best)
    check(our_dice, dice, logits, target, **geometry)


def test_an_empty_batch_is_torchs():
    logits, target = torch.zeros(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        expected = value_and_gradient(cross_entropy, logits, target, size=4, reduction=reduction)
        actual = value_and_gradient(ours, logits, target, size=4, reduction=reduction)
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert upsample_argmax(logits, 4).shape == (0, 4, 4)


def test_the_target_gives_the_size():
    logits, target, geometry = small()
    assert torch.equal(ours(logits, target), ours(logits, target, **geometry))
    assert torch.equal(our_dice(logits, target), our_dice(logits, target, **geometry))


def test_the_threads_that_compute_do_not_decide_the_result():
    logits, target = head((3, 40, 5, 6), {"scale_factor": 32})
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(train_step(logits.clone().requires_grad_(), target, torch.ones(40)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        # The labels and the low-resolution gradient to the last bit; the losses are torch's own sums.
        assert torch.equal(result[1], results[0][1]) and torch.equal(result[2], results[0][2])
        torch.testing.assert_close(result[0], results[0][0])
        torch.testing.assert_close(result[3], results[0][3])
