"""The convolution on ATen: what is written in place must be what fewer liberties give."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


class Operators(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dilation", [1, 2, 6])
def test_a_depthwise_filter_that_torch_computes_fast_is_one_operator(
    dilation, dtype, activation, channels_last
):
    """A sum for the bias would be another pass over the images."""
    x, w, b = (torch.randn(shape).to(dtype) for shape in ((1, 8, 17, 19), (8, 1, 3, 3), (8,)))
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    geometry = (1, 1), (dilation, dilation), (dilation, dilation), 8
    with torch.no_grad(), Operators() as seen:
        found = conv2d_aten(x, w, b, *geometry, None, None, None, activation, 0.0)
    assert seen.names == ["convolution"] + ["relu_"] * (activation == "relu")
    expected = F.conv2d(x, w, b, *geometry)
    assert torch.equal(found, expected.relu() if activation else expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("size", [(17, 19), (5, 30), (2, 3)])
@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("kernel, padding", [(3, 12), (3, 14), (4, 18), (5, 24), (2, 6)])
def test_taps_in_padding_change_nothing(kernel, padding, stride, size, groups, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, *size, generator=generator)
    w = torch.randn(8, 8 // groups, kernel, kernel, generator=generator)
    b = torch.randn(8, generator=generator) if bias else None
    geometry = (stride, stride), (padding, padding), (12, 12), groups
    with torch.no_grad():
        found = conv2d_aten(x, w, b, *geometry, None, None, None, None, 0.0)
        wide = [None if t is None else t.double() for t in (x, w, b)]
        torch.testing.assert_close(found.double(), F.conv2d(*wide, *geometry), atol=1e-5, rtol=1e-5)
