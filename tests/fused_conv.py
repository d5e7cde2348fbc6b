"""Holds a fused convolution, values and gradients, to the error rule.

Shared by the tests of every convolution family.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segfast

from .tolerances import assert_close_to_reference

# For tests of both backends: each runs in the session that can run it.
INTERPRETING_ONLY = pytest.mark.interpreter
BACKENDS = ["aten", pytest.param("triton", marks=INTERPRETING_ONLY)]
REFERENCE_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, channels_last: bool = False
) -> Tensor:
    """Normal numbers that are exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    result = torch.randn(shape, generator=generator).to(dtype)
    return result.contiguous(memory_format=torch.channels_last) if channels_last else result


def fused(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The definition, `act(scale * (conv + bias) + shift + residual)`, in the operands' own dtype."""

    def run(
        input, weight, bias=None, *geometry, scale=None, shift=None, residual=None, activation=None, **options
    ):
        z = conv(input, weight, bias, *geometry, **options)
        if scale is not None:
            z = z * scale[:, None, None]
        if shift is not None:
            z = z + shift[:, None, None]
        if residual is not None:
            z = z + residual
        return REFERENCE_ACTIVATIONS[activation](z)

    return run


def values_and_gradients(function, tensors: dict[str, Tensor], grad: Callable[[Tensor], Tensor], **options):
    """{"output": ..., name: gradient}: every tensor a leaf of its own, in its own layout."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in tensors.items()
    }
    output = function(**leaves, **options)
    output.backward(grad(output))
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check_layer(
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    depth: dict[str, int],
    *,
    activations: dict[str, str | None] | None = None,
    seed: int = 1,
    **geometry,
) -> dict[str, Tensor]:
    """`function(**tensors, **activations, **geometry)` against `definition`, in fp64 and the tensors' dtype.

    `depth` is the number of terms in the sums behind "output" and behind each tensor's gradient; where it has
    none, all pixels of the output. The scale of canceling terms is taken from the same layer on absolute
    values, without its activations (whose slope is about one at most). Returns what `function` gave.
    """
    dtype, activations = tensors["input"].dtype, activations or {}

    def grad(output):
        return draw(*output.shape, dtype=dtype, seed=seed).to(output.dtype)

    slope = {"negative_slope": 0.2} if "leaky_relu" in activations.values() else {}
    wide = {name: t.double() for name, t in tensors.items()}
    reference = values_and_gradients(definition, wide, grad, **activations, **geometry)
    aten = values_and_gradients(definition, tensors, grad, **activations, **geometry)
    sizes = values_and_gradients(
        definition, {name: t.abs() for name, t in wide.items()}, lambda y: grad(y).abs(), **geometry
    )
    actual = values_and_gradients(function, tensors, grad, **activations, **slope, **geometry)
    pixels = reference["output"][:, 0].numel()
    for name, result in actual.items():
        assert_close_to_reference(
            result, reference[name], aten[name], sizes[name], depth.get(name, pixels), what=name
        )
    return actual


def check_fused(
    function: Callable[..., Tensor],
    conv: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    *,
    activation: str | None = None,
    depthwise: bool = False,
    **geometry,
) -> dict[str, Tensor]:
    """A convolution with its epilogue against `fused(conv)`: see `check_layer`.

    `conv` is transposed, its weight [C_in, C_out, ...]; or `depthwise`, its weight [C * multiplier, 1, ...].
    """
    input, weight = tensors["input"], tensors["weight"]
    pixels = input.numel() // input.shape[1]
    depth = {"output": weight[:, 0].numel(), "input": weight[0].numel(), "weight": pixels, "residual": 1}
    if depthwise:
        depth["output"] = weight[0].numel()
        depth["input"] = weight.numel() // input.shape[1]
    return check_layer(
        function, fused(conv), tensors, depth, activations={"activation": activation}, **geometry
    )


def precisions_of(run: Callable[[], object]) -> list[set[str]]:
    """In which precisions products of fp32 are launched by `run`, under cuDNN's "ieee", "tf32" and "ieee"."""
    conv, found = torch.backends.cudnn.conv, []
    before = conv.fp32_precision
    try:
        with segfast.backend("triton"), segfast.kernels.record_launches() as launches:
            for precision in ("ieee", "tf32", "ieee"):
                conv.fp32_precision = precision
                launches.clear()
                run()
                found.append({launch.constants.get("PRECISION") for launch, _ in launches} - {None})
    finally:
        conv.fp32_precision = before
    return found
