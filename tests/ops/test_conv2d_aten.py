"""The convolution on ATen: what is written in place must be what fewer liberties give."""

import pytest
import torch
import torch.nn.functional as F

from segfast.ops._conv2d_aten import conv2d_aten
from segfast.ops._epilogue import apply_epilogue


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [None, "dense", "expanded"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_as_norm_and_sum_round(dtype, affine, residual, activation):
    """Bit for bit what the epilogue widened to float32 rounds to, before the residual and after it."""
    torch.manual_seed(0)
    x, w, bias = (torch.randn(shape).to(dtype) for shape in ((2, 6, 9, 10), (8, 6, 3, 3), (8,)))
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 8) if affine else (None, None)
    if residual is not None:
        residual = torch.randn((2, 8, 9, 10) if residual == "dense" else (2, 8, 1, 1)).to(dtype)
        residual = residual.expand(2, 8, 9, 10)
    ending = (scale, shift, residual, activation, 0.01)
    with torch.no_grad():
        conv = F.conv2d(x, w, bias, 1, 1)
        if activation in (None, "relu", "relu6"):
            normed = apply_epilogue(conv, scale, shift, None, None, 0.0)
            expected = apply_epilogue(normed, None, None, residual, activation, 0.0)
        else:
            expected = apply_epilogue(conv, *ending)
        kept = None if residual is None else residual.clone()
        found = conv2d_aten(x, w, bias, (1, 1), (1, 1), (1, 1), 1, *ending)
    assert found.dtype is dtype and torch.equal(found, expected) and found.stride() == expected.stride()
    assert kept is None or torch.equal(kept, residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_mode(dtype):
    x, w, scale = (torch.randn(shape).to(dtype) for shape in ((1, 3, 5, 5), (4, 3, 3, 3), (4,)))

    def run(x):
        return conv2d_aten(
            x, w, None, (1, 1), (1, 1), (1, 1), 1, scale.float(), scale.float(), None, "relu", 0.0
        )

    tangent = torch.randn_like(x)
    value, slope = torch.func.jvp(run, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(run(dual))
    torch.testing.assert_close(found.primal, value)
    torch.testing.assert_close(found.tangent, slope)
