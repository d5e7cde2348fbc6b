"""`segfast.functional.depthwise_conv2d` and `separable_conv2d`: batches, padding, forms."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.kernels import Tile, override_tile
from tests.fused_conv import BACKENDS, draw, precisions_of
from tests.separable_conv2d.reference import in_form, separable_operands

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(4, 3), (2, 5)], ids=str)
def test_padding_of_a_separable_convolution_by_name(kernel, backend):
    x, w, b = draw(1, 3, 4, 6), draw(6, 1, *kernel), draw(6)
    for padding in ("same", "valid"):
        expected = F.conv2d(x, w, b, padding=padding, groups=3)
        with segfast.backend(backend):
            y = separable_conv2d(x, w, torch.eye(6)[..., None, None], depthwise_bias=b, padding=padding)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


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
