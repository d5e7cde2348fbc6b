"""`segfast.functional.depthwise_conv2d` and `separable_conv2d` against torch's convolutions.

torch's own samples, memory formats, gradients, grad modes, the ATen path.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.kernels import Tile, override_tile
from tests.fused_conv import BACKENDS, draw, precisions_of
from tests.separable_conv2d.reference import check_depthwise, in_form, separable_operands

pytestmark = pytest.mark.usefixtures("small_tiles")


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def samples(dtype):
    """torch's own samples of conv2d that are depthwise; the others' geometry on a depthwise weight."""
    # The import freezes torch.backends' flags; undone on leaving, for the benchmarks that follow set them.
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv2d"]
    result = []
    for sample in info.sample_inputs("cpu", dtype):
        (weight, bias), kwargs = sample.args, dict(sample.kwargs)
        channels, groups = sample.input.shape[-3], kwargs.pop("groups", 1)
        if groups != channels:
            weight = weight.reshape(-1, 1, *weight.shape[2:])
            weight = weight[: weight.shape[0] // channels * channels]
            bias = None if bias is None else bias[:1].expand(weight.shape[0]).clone()
        if kwargs.get("padding") == "valid" or weight.shape[0] >= channels:
            result.append((sample.input, weight, bias, kwargs))
    return result


def test_torchs_samples_are_of_many_kinds():
    found = samples(torch.float32)
    assert len(found) >= 24
    assert {"same", "valid"} <= {kwargs.get("padding") for *_, kwargs in found if "padding" in kwargs}
    assert any(weight.shape[0] > x.shape[-3] for x, weight, *_ in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples_on_aten(dtype):
    # The same ATen calls: equal to the last bit, gradients included.
    for x, w, b, kwargs in samples(dtype):
        leaves = [[t.clone().requires_grad_() for t in (x, w, b) if t is not None] for _ in range(2)]
        with segfast.backend("aten"):
            actual = depthwise_conv2d(*leaves[0], **kwargs)
        expected = F.conv2d(*leaves[1], **kwargs, groups=x.shape[-3])
        grad = torch.ones_like(expected)
        gradients = [torch.autograd.grad(y, t, grad) for y, t in ((actual, leaves[0]), (expected, leaves[1]))]
        torch.testing.assert_close((actual, gradients[0]), (expected, gradients[1]), rtol=0, atol=0)
        assert actual.stride() == expected.stride()


@pytest.mark.interpreter
def test_torchs_samples_on_our_kernels(poisoned_empty):
    dtype = torch.float32
    found = {
        f"{tuple(x.shape)} {tuple(w.shape)} {kwargs}": (x, w, b, kwargs) for x, w, b, kwargs in samples(dtype)
    }
    for x, w, b, kwargs in found.values():
        if isinstance(kwargs.get("padding"), str) or x.dim() == 3:
            with segfast.backend("triton"):
                actual = depthwise_conv2d(x, w, b, **kwargs)
            expected = F.conv2d(x, w, b, **kwargs, groups=x.shape[-3])
            eps = 40 * torch.finfo(dtype).eps
            torch.testing.assert_close(actual, expected, atol=eps * (1 + expected.abs().max()), rtol=eps)
        else:
            tensors = {"input": x, "weight": w} | ({} if b is None else {"bias": b})
            check_depthwise({name: t.detach() for name, t in tensors.items()}, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 3), (2, 2), (4, 3), (2, 5)], ids=str)
def test_padding_by_name_is_torchs(kernel, backend):
    x, w, b = draw(1, 3, 4, 6), draw(6, 1, *kernel), draw(6)
    for padding, dilation in itertools.product(("same", "valid"), (1, (1, 2))):
        if padding == "valid" and kernel[1] == 5 and dilation != 1:
            continue
        expected = F.conv2d(x, w, b, padding=padding, dilation=dilation, groups=3)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with segfast.backend(backend):
            actual = depthwise_conv2d(*leaves, padding=padding, dilation=dilation)
            both = separable_conv2d(
                x, w, torch.eye(6)[..., None, None], depthwise_bias=b, padding=padding, dilation=dilation
            )
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
        theirs = [t.clone().requires_grad_() for t in (x, w, b)]
        expected = F.conv2d(*theirs, padding=padding, dilation=dilation, groups=3)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), theirs),
            atol=1e-3,
            rtol=1e-4,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_a_batch(backend):
    x, w, p, residual = draw(3, 4, 5), draw(6, 1, 3, 3), draw(2, 6, 1, 1), draw(2, 4, 5)
    with segfast.backend(backend):
        y, total, squares = depthwise_conv2d(x, w, padding=1, activation="relu", return_statistics=True)
        z = separable_conv2d(x, w, p, padding=1, residual=residual)
        alone = depthwise_conv2d(x, w, padding=1, activation="relu")
    expected = F.relu(F.conv2d(x, w, padding=1, groups=3))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        (total, squares), (y.sum((1, 2)), y.square().sum((1, 2))), atol=1e-4, rtol=1e-5
    )
    pointwise = F.conv2d(F.conv2d(x, w, padding=1, groups=3), p) + residual
    torch.testing.assert_close(z, pointwise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    x, w, b = draw(0, 3, 5, 4).requires_grad_(), draw(6, 1, 3, 3).requires_grad_(), draw(6).requires_grad_()
    p, residual = draw(2, 6, 1, 1).requires_grad_(), draw(0, 2, 3, 2).requires_grad_()
    with segfast.backend(backend):
        y = depthwise_conv2d(x, w, b, 2, 1, activation="silu")
        z, total, squares = depthwise_conv2d(x, w, b, 2, 1, return_statistics=True)
        both = separable_conv2d(x, w, p, b, None, 2, 1, residual=residual, activation="relu")
        (y.sum() + z.sum() + total.sum() + squares.sum() + both.sum()).backward()
    assert y.shape == z.shape == (0, 6, 3, 2) and both.shape == (0, 2, 3, 2)
    assert total.shape == squares.shape == (0, 6) and x.grad.shape == x.shape
    for t in (w, b, p):
        assert t.grad.shape == t.shape and not t.grad.any()


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["fused", "two kernels"])
def test_upstream_of_a_chosen_form(form):
    # The form is the forward's affair: the gradients are those of either.
    tensors = separable_operands((1, 5, 3, 4), 4, residual_shape=(1, 4, 3, 4))
    results = []
    for choice in (form, "fused"):
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        tile = Tile(16, 16, 16, 4, 1, form=choice)
        with segfast.backend("triton"), override_tile("separable_conv2d_forward", tile):
            separable_conv2d(**leaves, padding=1, activation="relu").sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
def test_two_kernels_do_not_forget_the_precision_either():
    x, w = draw(1, 8, 3, 3, channels_last=True), draw(3, 3, 1, 8).permute(3, 2, 0, 1)
    with in_form("two kernels"):
        found = precisions_of(lambda: separable_conv2d(x, w, draw(8, 8, 1, 1)))
    assert found == [{"tf32x3"}, {"tf32"}, {"tf32x3"}]
