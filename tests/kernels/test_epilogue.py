"""The fused epilogue in the kernels: act(scale * (conv + bias) + shift + residual)."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from triton.backends.compiler import GPUTarget

import segfast
from segfast import kernels
from segfast.functional import conv_transpose2d
from segfast.ops._epilogue import ACTIVATIONS
from tests.fused_conv import REFERENCE_ACTIVATIONS, check_fused, draw

# NumPy, below the interpreter, remarks on exp(90).
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# One geometry for each forward kernel: exact, wide and phase.
GEOMETRIES = {
    "exact": (2, {"stride": 2}),
    "wide": (4, {"stride": 2, "padding": 1}),
    "phase": (3, {"stride": 2, "padding": 1, "output_padding": 1}),
}
OPERANDS = ("bias", "scale", "shift", "residual")
SPECIAL = [
    float("nan"),
    float("inf"),
    float("-inf"),
    0.0,
    -0.0,
    3.0,
    -3.0,
    6.0,
    -6.0,
    1e30,
    -1e30,
    1e-30,
    -1e-30,
    0.5,
    -0.5,
    90.0,
    -90.0,
]


def check(form, names, dtype=torch.float32, activation=None, groups=1):
    kernel, geometry = GEOMETRIES[form]
    shapes = {
        "input": (2, 6, 3, 2),
        "weight": (6, 5, kernel, kernel),
        "bias": (5,),
        "scale": (5,),
        "shift": (5,),
        "residual": (2, 5, 6, 4),
    }
    tensors = {
        name: draw(*shapes[name], dtype=dtype, seed=i)
        for i, name in enumerate(shapes)
        if name in ("input", "weight", *names)
    }
    with segfast.backend("triton"):
        return check_fused(conv_transpose2d, F.conv_transpose2d, tensors, activation=activation, **geometry)


def test_every_activation_that_is_offered_is_tested_here():
    assert set(REFERENCE_ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [name for name in REFERENCE_ACTIVATIONS if name])
@pytest.mark.parametrize("form", GEOMETRIES)
def test_every_activation_with_a_full_epilogue(form, activation, poisoned_empty):
    check(form, OPERANDS, activation=activation)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [None, "relu", "silu", "sigmoid"])
def test_the_epilogue_is_rounded_once_in_half_precision(activation, poisoned_empty):
    check("wide", OPERANDS, torch.float16, activation)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "names", [c for n in range(4) for c in itertools.combinations(OPERANDS, n)], ids="+".join
)
def test_any_selection_of_operands(names, poisoned_empty):
    check("exact", names, activation="gelu")


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["exact", "phase"])
def test_epilogue_with_groups(form):
    kernel, geometry = GEOMETRIES[form]
    tensors = {
        "input": draw(2, 6, 3, 2),
        "weight": draw(6, 2, kernel, kernel),
        "bias": draw(6),
        "scale": draw(6, seed=1),
        "shift": draw(6, seed=2),
        "residual": draw(2, 6, 6, 4),
    }
    with segfast.backend("triton"):
        check_fused(conv_transpose2d, F.conv_transpose2d, tensors, activation="relu6", groups=3, **geometry)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
def test_nan_and_infinity_pass_as_torch_lets_them(activation, dtype):
    # The convolution adds zero: the values reach the activation through the residual.
    z = torch.tensor(SPECIAL).to(dtype)[None, None, None]
    zero = torch.zeros(1, 1, 1, 1, dtype=dtype)
    slope = 0.2 if activation == "leaky_relu" else 0.01
    with segfast.backend("triton"):
        y = conv_transpose2d(
            zero.expand(1, 1, 1, z.shape[-1]), zero, residual=z, activation=activation, negative_slope=slope
        )
    # In fp64: ATen's vectorised fp32 gelu turns infinity into NaN on some CPUs.
    expected = REFERENCE_ACTIVATIONS[activation](z.double()).to(dtype)
    torch.testing.assert_close(y, expected, equal_nan=True, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.interpreter
@pytest.mark.parametrize("slope", [0.3, 0.0, -0.5])
def test_leaky_relu_with_a_slope_that_hides_the_sign(slope, poisoned_empty):
    # From a slope of zero down the output no longer tells the input's sign: the gradient needs the input
    # again.
    x, w = draw(1, 3, 3, 4).requires_grad_(), draw(3, 2, 2, 2).requires_grad_()
    g = draw(1, 2, 6, 8)
    expected = torch.autograd.grad(F.leaky_relu(F.conv_transpose2d(x, w, stride=2), slope), (x, w), g)
    with segfast.backend("triton"):
        y = conv_transpose2d(x, w, stride=2, activation="leaky_relu", negative_slope=slope)
        actual = torch.autograd.grad(y, (x, w), g)
    torch.testing.assert_close(actual, expected)


@pytest.mark.interpreter
def test_scale_and_shift_of_another_dtype_keep_theirs():
    # A folded batch norm in fp32 around a convolution in fp16.
    x, w = draw(1, 4, 3, 3, dtype=torch.float16), draw(4, 3, 2, 2, dtype=torch.float16)
    scale, shift = draw(3).requires_grad_(), draw(3, seed=1).requires_grad_()
    with segfast.backend("triton"):
        y = conv_transpose2d(x, w, stride=2, scale=scale, shift=shift)
        y.sum().backward()
    z = F.conv_transpose2d(x.double(), w.double(), stride=2)
    reference = z * scale.detach().double()[:, None, None] + shift.detach().double()[:, None, None]
    assert y.dtype == torch.float16 and scale.grad.dtype == shift.grad.dtype == torch.float32
    # fp32 inside: four terms, scale and shift in any order; one rounding at the end. scale's gradient takes
    # the convolution rounded to fp16.
    terms = F.conv_transpose2d(x.double().abs(), w.double().abs(), stride=2)
    magnitude = terms * scale.detach().abs()[:, None, None] + shift.detach().abs()[:, None, None]
    allowed = 2**-11 * reference.abs() + 2**-25 + 6 * 2**-24 * magnitude
    assert ((y.double() - reference).abs() <= allowed).all()
    assert torch.equal(shift.grad, torch.full((3,), 36.0))
    torch.testing.assert_close(
        scale.grad.double(), z.sum((0, 2, 3)), atol=2**-11 * z.abs().sum().item(), rtol=0
    )


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "hardsigmoid"])
def test_no_activation_is_a_maximum_that_loses_a_nan(activation):
    # NumPy's maximum, in the interpreter, keeps a NaN; a GPU's instruction returns the other operand.
    meta = {"device": "meta", "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, w, y = (
        torch.empty(1, 64, 8, 8, **meta),
        torch.empty(64, 64, 2, 2, **meta),
        torch.empty(1, 64, 16, 16, **meta),
    )
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as launches:
        kernels.conv_transpose2d_forward(
            x, w, *[None] * 5, y, (2, 2), (0, 0), (1, 1), 1, (0, 0), activation, 0.0
        )
    ptx = kernels.compile_offline(*launches[0], GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert not re.findall(r"\b(?:max|min)\.(?!NaN|[us]\d)[\w.]*f\d+", ptx)
