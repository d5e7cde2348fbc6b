"""Dtypes: under autocast as torch's layers, and those without kernels refused by name."""

import pytest
import torch

from tests.fused_conv import BACKENDS

from .families import on, over
from .test_gradients import is_convolution, leaves_of


@pytest.mark.parametrize("backend", BACKENDS)
@over(is_convolution)
def test_autocast_casts_as_torch_does(example, backend):
    # fp16, which the interpreter computes rightly.
    leaves = leaves_of(example.tensors())
    first = next(iter(leaves))
    expected = example.reference(leaves, "silu")[0]
    with torch.autocast("cpu", torch.float16), on(backend, example):
        y = example.run(leaves, "silu")[0]
        mixed = example.run(leaves | {first: leaves[first].detach().half()}, "silu")[0]
        gradients = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert y.dtype == mixed.dtype == torch.float16
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for result in (y, mixed):
        size = expected.abs().max().item()
        torch.testing.assert_close(result.float(), expected, atol=5e-3 * (1 + size), rtol=0)
    with torch.autocast("cpu", enabled=False), on(backend, example):
        assert example.run(leaves)[0].dtype == torch.float32


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bfloat16], ids=str)
@over(is_convolution)
def test_a_dtype_without_kernels_is_refused_by_name(example, dtype):
    tensors = {name: t.to(dtype) for name, t in example.least(example.tensors()).items()}
    name = f"{example.name.partition(' ')[0]}: .*{str(dtype).removeprefix('torch.')}"
    with on("triton", example), pytest.raises(NotImplementedError, match=name):
        example.run(tensors)
