"""Class indices of every integer dtype, and labels to ignore that the dtype does not hold, on every path."""

import pytest
import torch

import segfast
from segfast.functional import upsample_cross_entropy, upsample_dice
from segfast.ops.segmentation_head import chunked
from tests.fused_conv import INTERPRETING_ONLY
from tests.segmentation_head.reference import head

# What computes: torch's functions one by one, tiles, kernels.
PATHS = ["separate", "tiles", pytest.param("kernels", marks=INTERPRETING_ONLY)]
# A label to ignore that is 3 when cut to the dtype's bits; 255 is -1 as int8.
WRAPPED = {torch.uint8: 256 + 3, torch.int8: 256 + 3, torch.int16: 2**16 + 3, torch.int32: 2**32 + 3}
GEOMETRY = {"size": (5, 7)}
LOSSES = {
    "mean": (upsample_cross_entropy, {}),
    "each pixel": (upsample_cross_entropy, {"reduction": "none"}),
    "smoothed": (upsample_cross_entropy, {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 1.5, 160)}),
    "dice": (upsample_dice, {}),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(chunked, "worth_tiling", lambda *call: request.param == "tiles")
    with segfast.backend("triton" if request.param == "kernels" else "aten"):
        yield request.param


def step(logits, target, function, options):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def loss_of(name, logits):
    """A loss and its options, a weight for each of the logits' classes."""
    function, options = LOSSES[name]
    return function, {n: v[: logits.shape[1]] if n == "weight" else v for n, v in options.items()}


def labels(dtype, path):
    """Labels as far as the dtype goes, some of them 255 or its nearest: 156 is -100 in uint8.

    The kernels, slow in the interpreter, get five classes.
    """
    classes = 5 if path == "kernels" else 160
    logits, target = head((1, classes, 2, 3), GEOMETRY)
    target = target.clamp_(max=torch.iinfo(dtype).max)
    target[0, 0, :4] = torch.tensor([3, 0, 1, min(156, classes - 1, torch.iinfo(dtype).max)])
    return logits, target


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_a_dtype_are_those_of_int64(dtype, loss, path):
    logits, target = labels(dtype, path)
    function, options = loss_of(loss, logits)
    ignored = int(target.max())  # 255 where the dtype holds it
    expected = step(logits, target, function, options | {"ignore_index": ignored})
    actual = step(logits, target.to(dtype), function, options | {"ignore_index": ignored})
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", WRAPPED, ids=str)
def test_a_label_to_ignore_that_the_dtype_does_not_hold_ignores_nothing(dtype, loss, path):
    logits, target = labels(dtype, path)
    function, options = loss_of(loss, logits)
    target = torch.where(target < logits.shape[1], target, 4)
    expected = step(logits, target, function, options)
    for ignored in (255, -100, WRAPPED[dtype]):
        actual = step(logits, target.to(dtype), function, options | {"ignore_index": ignored})
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_compiles_with_labels_of_a_dtype(dtype, path):
    torch._dynamo.reset()
    logits, target = labels(dtype, path)
    target = target.clamp(max=logits.shape[1] - 1).to(dtype)
    for name in LOSSES:
        function, options = loss_of(name, logits)
        for ignored in (255, -100):
            given = options | {"ignore_index": ignored, **GEOMETRY}

            def loss(x, t, function=function, given=given):
                return function(x, t, **given)

            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            expected, actual = (step(logits, target, f, {}) for f in (loss, compiled))
            torch.testing.assert_close(actual, expected)
