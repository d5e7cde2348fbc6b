"""Products of float32 in TF32: operands rounded to it, and what the error rule allows for that."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from segfast import kernels
from segfast.kernels._tf32 import _rounded
from segfast.ops._prove import error_and_allowance

LAST = {"device": "meta", "dtype": torch.float32, "memory_format": torch.channels_last}
DROPPED = 13  # bits of float32's fraction that TF32 has no room for


@triton.jit
def _rounded_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, _rounded(tl.load(x_ptr + i), True))


def truncated(x):
    """The part of float32 that the matrix units read."""
    return (x.float().view(torch.int32) >> DROPPED << DROPPED).view(torch.float32)


def nearest(x):
    """float64 `x` rounded to 11 significant bits, ties away from zero."""
    fraction, exponent = torch.frexp(x)
    scaled = fraction * 2**11
    return torch.ldexp(scaled.abs().add(0.5).floor().copysign(scaled), exponent - 11)


@pytest.mark.interpreter
def test_operands_are_rounded_to_the_nearest():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:8] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11, 2**-120])
    y = torch.empty_like(x)
    _rounded_kernel[(1,)](x, y, 1024)
    assert torch.equal(truncated(y), nearest(x.double()).float())


@pytest.mark.interpreter
def test_what_is_not_finite_stays_so():
    # The last two are the NaN that a GPU's own arithmetic makes, and its negative.
    bits = [0x7F800000, 0xFF800000 - 2**32, 0x7FC00000, 0x7FFFFFFF, -1]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(16)[:16].contiguous()
    y = torch.empty_like(x)
    _rounded_kernel[(1,)](x, y, 16)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 40, 25), (40, 72, 400)], ids=str)
def test_the_rule_allows_rounding_and_finds_a_missing_tap(shape):
    channels_in, channels_out, pixels = shape
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(pixels)
    x = torch.randn(2, channels_in, side, side, generator=generator)
    w = torch.randn(channels_out, channels_in, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    rest = (exact, exact, F.conv2d(x.double().abs(), w.double().abs(), padding=1), 9 * channels_in)

    rounded = F.conv2d(nearest(x.double()), nearest(w.double()), padding=1)
    error, allowed = error_and_allowance(rounded.float(), *rest, tf32=True)
    assert error <= allowed
    # Beside fp32's allowance it is wrong.
    error, allowed = error_and_allowance(rounded.float(), *rest)
    assert error > 5 * allowed

    w[..., 0, 0] = 0
    error, allowed = error_and_allowance(F.conv2d(x, w, padding=1), *rest, tf32=True)
    assert error > 10 * allowed


def conv2d():
    x, w, y = (torch.empty(shape, **LAST) for shape in ((1, 32, 9, 9), (32, 32, 3, 3), (1, 32, 9, 9)))
    options = ((1, 1), (1, 1), (1, 1), 1)
    kernels.conv2d_forward([x], w, None, None, None, None, y, *options, None, 0.0)
    kernels.conv2d_grad_input(y, w, x, *options)
    kernels.conv2d_grad_weight(x, y, torch.empty_like(w), *options)
    far = ((1, 1), (6, 6), (6, 6), 1)
    kernels.conv2d_forward([x], w, None, None, None, None, y, *far, None, 0.0)


def conv_transpose2d():
    for kernel, out in ((2, 18), (3, 19)):
        x, w, y = (
            torch.empty(shape, **LAST)
            for shape in ((1, 32, 9, 9), (32, 32, kernel, kernel), (1, 32, out, out))
        )
        kernels.conv_transpose2d_forward(
            x, w, None, None, None, None, None, y, (2, 2), (0, 0), (1, 1), 1, (0, 0), None, 0.0
        )


def separable_conv2d():
    x, first, second = (torch.empty(s, **LAST) for s in ((1, 32, 9, 9), (32, 1, 3, 3), (32, 32, 1, 1)))
    none, same = (None, None, None), ((1, 1), (1, 1), (1, 1))
    with kernels.override_tile("separable_conv2d_forward", kernels.Tile(16, 16, 16, 4, 1, form="fused")):
        kernels.separable_conv2d_forward(
            x, first, *none, second, *none, None, torch.empty_like(x), *same, None, None, 0.0
        )


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, request.param
    yield request.param
    conv.fp32_precision = before


@pytest.mark.parametrize("launcher", [conv2d, conv_transpose2d, separable_conv2d])
def test_every_kernel_that_multiplies_in_tf32_rounds_both_operands(launcher, precision):
    products = 0
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as recorded:
        launcher()
    for launch, pointers in {launch.kernel: (launch, pointers) for launch, pointers in recorded}.values():
        if "PRECISION" not in launch.constants:
            continue
        products += 1
        ir = kernels.compile_offline(launch, pointers, GPUTarget("cuda", 90, 32)).asm["ttir"]
        roundings = len(re.findall(r"arith\.select.*tensor<.*xf32>", ir))
        assert (roundings >= 2) is (precision == "tf32"), (launch.kernel.__name__, roundings)
    assert products
