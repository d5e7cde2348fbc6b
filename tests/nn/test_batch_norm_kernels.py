"""The kernels of batch norm in training, in Triton's interpreter, against ATen in float64."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.kernels import Tile, _batch_norm, override_tile
from segfast.nn import ConvBNAct
from segfast.nn._fused import training
from segfast.ops._batch_norm import Norm, batch_norm_act
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw
from tests.tolerances import assert_close_to_reference

pytestmark = pytest.mark.interpreter

ACTIVATIONS = tuple(REFERENCE_ACTIVATIONS)
SHAPES = [(2, 5, 7, 3), (3, 16, 4, 5), (1, 1, 9, 8), (2, 70, 1, 3), (130, 3, 1, 1)]


@pytest.fixture(autouse=True)
def kernels():
    with segfast.backend("triton"):
        yield


def operands(shape, dtype, residual=True, affine=True, last=True):
    """Image, residual, weight, bias and the gradient of the result, in float64 but rounded to `dtype`."""
    image, added, grad = (draw(*shape, dtype=dtype, seed=i, channels_last=last).double() for i in range(3))
    weight, bias = (draw(shape[1], seed=i).double() for i in (4, 5)) if affine else (None, None)
    return image * 3 + 2, added if residual else None, weight, bias, grad


def ours(image, residual, weight, bias, grad, dtype, activation):
    """Result, running statistics and gradients."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (image, residual)]
    leaves += [None if t is None else t.float().requires_grad_() for t in (weight, bias)]
    mean, var = torch.zeros(image.shape[1]), torch.ones(image.shape[1])
    norm = Norm(*leaves[2:], mean, var, 0.3, 1e-3)
    y = batch_norm_act(leaves[0], norm, leaves[1], activation, 0.2)
    return finished(y, mean, var, leaves, grad.to(dtype))


def by_aten(image, residual, weight, bias, grad, dtype, activation):
    """The same by torch's own functions; parameters of 16-bit images are float32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (image, residual)]
    leaves += [None if t is None else t.to(wide).requires_grad_() for t in (weight, bias)]
    mean, var = (f(image.shape[1], dtype=wide) for f in (torch.zeros, torch.ones))
    y = F.batch_norm(leaves[0], mean, var, *leaves[2:], True, 0.3, 1e-3)
    y = REFERENCE_ACTIVATIONS[activation](y if residual is None else y + leaves[1])
    return finished(y, mean, var, leaves, grad.to(dtype))


def finished(y, mean, var, leaves, grad):
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return [y.detach(), mean, var, *gradients]


def check(given, dtype, activation):
    rounded = [None if t is None else t.to(dtype).double() for t in given[:2]]
    given = (*rounded, *given[2:])
    found = ours(*given, dtype, activation)
    exact, aten = (by_aten(*given, each, activation) for each in (torch.float64, dtype))
    for index, (a, b, c) in enumerate(zip(found, exact, aten, strict=True)):
        # The terms of the sums are no larger than these.
        size = torch.full_like(b, 10 * max(1.0, b.abs().max().item()))
        assert_close_to_reference(a, b, c, size, given[0].numel() // given[0].shape[1], f"result {index}")
    assert found[0].is_contiguous(memory_format=torch.channels_last) or found[0].is_contiguous()
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, poisoned_empty):
    told = activation in (None, "relu", "leaky_relu", "relu6", "sigmoid")
    check(operands((2, 5, 7, 3), torch.float32, residual=told), torch.float32, activation)


@pytest.mark.compat
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shapes(shape, dtype, poisoned_empty):
    check(operands(shape, dtype), dtype, "relu")


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_without_parameters_in_either_layout(last, poisoned_empty):
    found = check(operands((2, 5, 4, 3), torch.float32, False, False, last), torch.float32, "silu")
    layout = torch.channels_last if last else torch.contiguous_format
    assert all(found[i].is_contiguous(memory_format=layout) for i in (0, 3))


def test_programs_share_out_the_pixels(monkeypatch, poisoned_empty):
    """Several blocks a program, the last one's short, and several rounds of programs to merge."""
    monkeypatch.setattr(_batch_norm, "PROGRAMS", 40)
    with override_tile("batch_norm_statistics", Tile(4, 4, 1, 4, 1)), \
         override_tile("batch_norm_grad_sums", Tile(4, 4, 1, 4, 1)):  # fmt: skip
        check(operands((1, 3, 23, 17), torch.float32), torch.float32, "leaky_relu")


def test_means_far_from_zero(poisoned_empty):
    """The variance is as exact as the values: what float32 has of 1e4 and noise."""
    image = (1e4 + draw(4, 3, 16, 16, channels_last=True).double()).float()
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm_act(image, Norm(None, None, mean, var, 1.0, 1e-5))
    expected = image.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.double(), expected.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), expected.var(1), rtol=1e-6, atol=0)


def test_a_block_that_trains_runs_them(monkeypatch):
    """Its second derivatives are ATen's."""
    begun, count = training._begun, []
    monkeypatch.setattr(training, "_begun", lambda norm: count.append(norm) or begun(norm))
    torch.manual_seed(0)
    block, x = ConvBNAct(3, 4, 1, activation="silu"), draw(2, 3, 4, 5).requires_grad_()
    with segfast.backend("aten"):
        expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    with segfast.kernels.record_launches() as launches:
        block(x)
    names = [launch.kernel.__name__ for launch, _ in launches]
    assert "_batch_norm_statistics_kernel" in names and "_batch_norm_apply_kernel" in names
    found = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(count) == 3


def test_float64_has_none():
    with pytest.raises(NotImplementedError, match="no kernels for float64"):
        batch_norm_act(draw(2, 3, 4, 5).double(), Norm(None, None, None, None, 0.1, 1e-5))
