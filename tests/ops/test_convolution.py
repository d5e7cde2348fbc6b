"""The convolutions where layouts are easily wrong: what is written is not what is returned, or not dense."""

import pytest
import torch
import torch.nn.functional as F

import segfast.functional as sf
from segfast import backend
from segfast.ops import OPERATORS
from tests.operators import check_fake

pytestmark = pytest.mark.interpreter

# One pixel and filters of one tap are laid out in both formats at once; the result, of several pixels, is
# wanted in the one and written in the other.
CALLS = {
    "conv2d": (sf.conv2d, F.conv2d, (4, 8, 1, 1), {"padding": 1}),
    "conv_transpose2d": (
        sf.conv_transpose2d,
        F.conv_transpose2d,
        (8, 4, 1, 1),
        {"stride": 2, "output_padding": 1},
    ),
    "depthwise_conv2d": (
        sf.depthwise_conv2d,
        lambda x, w, padding: F.conv2d(x, w, None, 1, padding, 1, 8),
        (8, 1, 1, 1),
        {"padding": 1},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_whose_result_is_copied_is_right_the_second_time(name, poisoned_empty):
    ours, plain, filters, options = CALLS[name]
    for seed in range(3):
        torch.manual_seed(seed)
        x, weight = torch.randn(2, 8, 1, 1), torch.randn(filters)
        with backend("triton"):
            y = ours(x, weight, **options)
        torch.testing.assert_close(y, plain(x, weight, **options))
        assert y.is_contiguous()


def test_a_depthwise_gradient_is_laid_out_as_its_weight():
    # With the channels innermost, as `segfast.optimize` lays filters out on a GPU: that is neither format.
    weight = torch.randn(3, 3, 1, 8).permute(3, 2, 0, 1)
    args = (torch.randn(2, 8, 5, 4), torch.randn(2, 8, 7, 6), weight, [1, 1], [0, 0], [1, 1])
    operator = OPERATORS["depthwise_conv2d_grad_weight"].overload
    assert operator(*args).stride() == weight.stride()
    check_fake(operator, args)
