"""Bad arguments of the depthwise and separable functionals: the type torch raises, the argument named."""

import pytest
import torch

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from tests.fused_conv import BACKENDS


def _x(*shape, **options):
    return torch.ones(shape or (1, 4, 5, 5), **options)


def _w(*shape, **options):
    return torch.ones(shape or (4, 1, 3, 3), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"activation": "swish"}, ValueError, "'relu', .*'swish'"),
        ({"scale": torch.ones(3)}, RuntimeError, "scale"),
        ({"shift": torch.ones(4, 1)}, RuntimeError, "shift"),
        ({"scale": torch.ones(1)}, RuntimeError, "scale"),
    ],
)
def test_bad_epilogues_are_named(options, error, word, backend):
    with segfast.backend(backend):
        with pytest.raises(error, match=word):
            depthwise_conv2d(_x(), _w(), **options)
        with pytest.raises(error, match=word):
            depthwise_conv2d(_x(), _w(), **options, return_statistics=True)
        depthwise_options = {f"depthwise_{name}": value for name, value in options.items()}
        with pytest.raises(error, match=word):
            separable_conv2d(_x(), _w(), torch.ones(4, 4, 1, 1), **depthwise_options)
        with pytest.raises(error, match=word):
            separable_conv2d(_x(), _w(), torch.ones(4, 4, 1, 1), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pointwise", "options", "word"),
    [
        (torch.ones(2, 3, 1, 1), {}, r"pointwise_weight must be \[C_out, 4, 1, 1\], got \[2, 3, 1, 1\]"),
        (torch.ones(2, 4, 3, 3), {}, "pointwise_weight"),
        (torch.ones(2, 4), {}, "pointwise_weight"),
        (torch.ones(2, 4, 1, 1).double(), {}, "pointwise_weight.*dtype"),
        (torch.ones(2, 4, 1, 1, device="meta"), {}, "pointwise_weight.*device"),
        (torch.ones(2, 4, 1, 1), {"bias": torch.ones(4)}, "bias"),
        (torch.ones(2, 4, 1, 1), {"bias": torch.ones(2).double()}, "bias.*dtype"),
        (torch.ones(2, 4, 1, 1), {"depthwise_bias": torch.ones(2)}, "bias|\\[2\\]"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(1, 2, 5, 5)}, r"residual .*\[1, 2, 3, 3\]"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(2, 3, 3)}, "residual"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(1, 1, 3, 3)}, "residual"),
    ],
)
def test_bad_pointwise_operands_are_named(pointwise, options, word, backend):
    with segfast.backend(backend), pytest.raises(RuntimeError, match=word):
        separable_conv2d(_x(), _w(), pointwise, **options)
