"""Nothing to compute: every backend, "triton" by name too, gives the empty result and zero gradients."""

import pytest
import torch

import segfast
import segfast.functional as sf
from segfast.ops import OPERATORS
from tests.operators import check_fake


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


NO_LABELS = torch.empty(0, 8, 8, dtype=torch.int64)
# The shape of the result, a function, and its inputs, of which the first holds nothing.
CALLS = {
    "conv2d": ((0, 4, 5, 5), sf.conv2d, (0, 8, 5, 5), (4, 8, 1, 1), (4,)),
    "conv2d of images": (
        (0, 4, 5, 5),
        lambda a, b, w: sf.conv2d([a, b], w),
        (0, 8, 5, 5),
        (0, 2, 5, 5),
        (4, 10, 1, 1),
    ),
    "parallel_conv2d": (
        (0, 8, 5, 5),
        lambda x, *w: sf.parallel_conv2d(x, list(w), [1, 2]),
        (0, 8, 5, 5),
        (4, 8, 1, 1),
        (4, 8, 3, 3),
    ),
    "conv_transpose2d": (
        (0, 4, 6, 6),
        lambda x, w, b: sf.conv_transpose2d(x, w, b, stride=2),
        (0, 8, 3, 3),
        (8, 4, 2, 2),
        (4,),
    ),
    "up_concat": ((0, 7, 6, 6), sf.up_concat, (0, 8, 3, 3), (0, 3, 6, 6), (8, 4, 2, 2)),
    "depthwise_conv2d": ((0, 8, 3, 3), sf.depthwise_conv2d, (0, 8, 5, 5), (8, 1, 3, 3), (8,)),
    "separable_conv2d": ((0, 4, 3, 3), sf.separable_conv2d, (0, 8, 5, 5), (8, 1, 3, 3), (4, 8, 1, 1)),
    "packed_max_pool2d": ((0, 3, 2, 3), lambda x: sf.packed_max_pool2d(x, True)[0], (0, 3, 4, 5)),
    "packed_max_unpool2d": (
        (0, 3, 4, 5),
        lambda x: sf.packed_max_unpool2d(x, torch.zeros(0, 1, 2, 3, dtype=torch.uint8), (4, 5)),
        (0, 3, 2, 3),
    ),
    "upsample_cross_entropy": (
        (0, 8, 8),
        lambda x: sf.upsample_cross_entropy(x, NO_LABELS, reduction="none"),
        (0, 3, 2, 2),
    ),
    "upsample_dice": ((), lambda x: sf.upsample_dice(x, NO_LABELS), (0, 3, 2, 2)),
    "upsample_argmax": ((0, 4, 4), lambda x: sf.upsample_argmax(x, scale_factor=2), (0, 3, 2, 2)),
    "gaussian_filter": ((0, 2, 30), sf.gaussian_filter, (0, 2, 30), (0, 3, 30)),
    "mean_field": ((0, 3, 4, 5), lambda u, i: sf.mean_field(u, i, iterations=1), (0, 3, 4, 5), (0, 3, 4, 5)),
    "mean_field of no pixels": ((1, 3, 0, 5), lambda u: sf.mean_field(u, None, iterations=1), (1, 3, 0, 5)),
}


def check(name, backend):
    shape, function, *shapes = CALLS[name]
    inputs = [draw(*each) for each in shapes]
    with segfast.backend(backend):
        result = function(*inputs)
    assert result.shape == shape
    if result.requires_grad:
        gradients = torch.autograd.grad(result, inputs, torch.ones_like(result), allow_unused=True)
        for gradient, tensor in zip(gradients, inputs, strict=True):
            assert gradient is None or (gradient.shape == tensor.shape and not gradient.any())


@pytest.mark.parametrize("name", CALLS)
def test_on_aten(name):
    check(name, "aten")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_by_the_kernels_name(name):
    check(name, "triton")


ONE, NONE = [1, 1], [0, 0]
OPERATOR_CALLS = {
    "conv2d": ((0, 8, 5, 5), (4, 8, 3, 3), *[None] * 4, ONE, NONE, ONE, 1, None, 0.0),
    "conv2d_grad_input": ((0, 4, 3, 3), (4, 8, 3, 3), 5, 5, ONE, NONE, ONE, 1),
    "conv2d_grad_weight": ((0, 4, 3, 3), (0, 8, 5, 5), (4, 8, 3, 3), ONE, NONE, ONE, 1),
    "conv_transpose2d": ((0, 8, 3, 3), (8, 4, 2, 2), *[None] * 4, ONE, NONE, NONE, 1, ONE, None, 0.0),
    "conv_transpose2d_grad_input": ((0, 4, 4, 4), (8, 4, 2, 2), 3, 3, ONE, NONE, 1, ONE),
    "conv_transpose2d_grad_weight": ((0, 4, 4, 4), (0, 8, 3, 3), (8, 4, 2, 2), ONE, NONE, 1, ONE),
    "depthwise_conv2d": ((0, 8, 5, 5), (8, 1, 3, 3), *[None] * 3, ONE, NONE, ONE, None, 0.0),
    "depthwise_conv2d_grad_input": ((0, 8, 3, 3), (8, 1, 3, 3), 8, 5, 5, ONE, NONE, ONE),
    "depthwise_conv2d_grad_weight": ((0, 8, 3, 3), (0, 8, 5, 5), (8, 1, 3, 3), ONE, NONE, ONE),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_an_operator_of_nothing_is_what_its_fake_says(name, poisoned_empty):
    args = [torch.randn(arg) if isinstance(arg, tuple) else arg for arg in OPERATOR_CALLS[name]]
    check_fake(OPERATORS[name].overload, args)
    assert not OPERATORS[name].overload(*args).any()
