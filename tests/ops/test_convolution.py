"""The convolutions' remembered launch where it is easily wrong: what it writes is not what is returned."""

import pytest
import torch
import torch.nn.functional as F

import segfast.functional as sf
from segfast import backend

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
