"""`segfast.functional.conv_transpose2d` against torch's.

Its own samples, errors, memory formats, gradients.
"""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv_transpose2d
from tests.fused_conv import BACKENDS, check_fused, draw

DTYPES = {
    "aten": [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
    "triton": [torch.float32, torch.float16],
}


def samples(dtype, requires_grad=False):
    """torch's own samples of the operator; the same twelve for every dtype."""
    # The import freezes torch.backends' flags; undone on leaving, for the benchmarks that follow set them.
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv_transpose2d"]
    return list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def batched(sample):
    """The sample's operands by name, [1, C, H, W] where it has no batch."""
    weight, bias = sample.args
    input = sample.input if sample.input.dim() == 4 else sample.input[None]
    return {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})


@pytest.mark.parametrize("dtype", DTYPES["aten"], ids=str)
def test_torchs_samples_on_aten(dtype):
    # The same ATen calls: equal to the last bit, gradients included. Integers have no gradient.
    with segfast.backend("aten"):
        for ours, theirs in zip(samples(dtype, True), samples(dtype, True), strict=True):
            theirs.input.data, *rest = ours.input.data, *zip(theirs.args, ours.args, strict=True)
            for theirs_arg, ours_arg in rest:
                if ours_arg is not None:
                    theirs_arg.data = ours_arg.data
            leaves = [[s.input, *[a for a in s.args if a is not None]] for s in (ours, theirs)]
            results = [
                conv_transpose2d(ours.input, *ours.args, **ours.kwargs),
                F.conv_transpose2d(theirs.input, *theirs.args, **theirs.kwargs),
            ]
            grad = torch.ones_like(results[0])
            gradients = [torch.autograd.grad(y, x, grad) for y, x in zip(results, leaves, strict=True)]
            torch.testing.assert_close((results[0], gradients[0]), (results[1], gradients[1]), rtol=0, atol=0)
    assert torch.equal(
        conv_transpose2d(torch.ones(1, 2, 2, 2).long(), torch.ones(2, 2, 2, 2).long()),
        F.conv_transpose2d(torch.ones(1, 2, 2, 2).long(), torch.ones(2, 2, 2, 2).long()),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES["triton"], ids=str)
def test_torchs_samples_on_our_kernels(dtype, poisoned_empty):
    with segfast.backend("triton"):
        for sample in samples(dtype):
            tensors = {name: t.detach() for name, t in batched(sample).items()}
            result = check_fused(conv_transpose2d, F.conv_transpose2d, tensors, **sample.kwargs)["output"]
            if sample.input.dim() == 3:
                unbatched = conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
                assert torch.equal(unbatched, result[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 2), (2, 3, 2, 2), (3, 2, 2)], ids=["empty", "batch", "unbatched"]
)
def test_batch_sizes(shape, backend):
    x, w, bias = draw(*shape).requires_grad_(), draw(3, 4, 2, 2).requires_grad_(), draw(4).requires_grad_()
    residual = draw(*shape[:-3], 4, 4, 4) if shape[0] else None
    expected = F.conv_transpose2d(x, w, bias, 2)
    if residual is not None:
        expected = expected + residual
    options = {"stride": 2, "residual": residual, "activation": "relu"}
    with segfast.backend(backend):
        y = conv_transpose2d(x, w, bias, **options)
        y.sum().backward()
    torch.testing.assert_close(y, F.relu(expected))
    assert y.stride() == expected.stride() and x.grad.shape == x.shape and w.grad.shape == w.shape
    torch.testing.assert_close(
        bias.grad, (expected > 0).sum(tuple(i for i in range(y.dim()) if i != y.dim() - 3)).float()
    )
