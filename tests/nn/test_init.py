"""`segfast.nn.init`: bilinear interpolation as FCN has it, and weights without a checkerboard."""

import pytest
import torch
import torch.nn.functional as F

from segfast.nn.init import bilinear_, bilinear_kernel, icnr_
from tests.fused_conv import draw


def fcn_filter(size):
    """`get_upsampling_weight` of FCN's own code, entry by entry."""
    factor = (size + 1) // 2
    center = factor - 1 if size % 2 == 1 else factor - 0.5
    hat = [1 - abs(i - center) / factor for i in range(size)]
    return torch.tensor([[a * b for b in hat] for a in hat], dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        (1, [1]),
        (2, [0.5, 0.5]),
        (3, [0.5, 1, 0.5]),
        (4, [0.25, 0.75, 0.75, 0.25]),
        (5, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
    ],
)
def test_the_kernel_by_hand(size, kernel):
    assert torch.allclose(bilinear_kernel(size), torch.tensor(kernel, dtype=torch.float32), rtol=1e-6)
    assert bilinear_kernel(size, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 31, 64])
def test_bilinear_is_fcns_filter_on_the_diagonal(size, dtype):
    weight = torch.full((3, 3, size, size), 7.0, dtype=dtype, requires_grad=True)
    assert bilinear_(weight) is weight and weight.requires_grad
    for i in range(3):
        for j in range(3):
            expected = fcn_filter(size) if i == j else torch.zeros(size, size)
            assert torch.equal(weight[i, j], expected.to(dtype)), (i, j)


def test_bilinear_of_a_kernel_that_is_not_square():
    weight = bilinear_(torch.empty(2, 2, 3, 4))
    rows, columns = bilinear_kernel(3), bilinear_kernel(4)
    assert torch.equal(weight[1, 1], rows[:, None] * columns) and not weight[0, 1].any()


def test_bilinear_with_one_filter_a_channel():
    weight = bilinear_(torch.empty(5, 1, 4, 4))
    assert torch.equal(weight, fcn_filter(4).float().expand(5, 1, 4, 4))
    x = draw(2, 5, 3, 4)
    dense = F.conv_transpose2d(x, bilinear_(torch.empty(5, 5, 4, 4)), stride=2, padding=1)
    torch.testing.assert_close(F.conv_transpose2d(x, weight, stride=2, padding=1, groups=5), dense)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_an_even_kernel_interpolates(stride):
    x = draw(1, 2, 5, 6, dtype=torch.float64)
    weight = bilinear_(torch.empty(2, 2, 2 * stride, 2 * stride, dtype=torch.float64))
    y = F.conv_transpose2d(x, weight, stride=stride, padding=stride // 2)
    expected = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)
    # At the border interpolate repeats the last pixel, where a transposed convolution sees zeros.
    inner = (..., slice(stride // 2, -(stride // 2)), slice(stride // 2, -(stride // 2)))
    torch.testing.assert_close(y[inner], expected[inner])


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_an_odd_kernel_interpolates_between_the_pixels(stride):
    # With its center on a pixel: the corners stay where they are.
    x = draw(1, 2, 4, 5, dtype=torch.float64)
    weight = bilinear_(torch.empty(2, 2, 2 * stride - 1, 2 * stride - 1, dtype=torch.float64))
    y = F.conv_transpose2d(x, weight, stride=stride, padding=stride - 1)
    size = [stride * (n - 1) + 1 for n in x.shape[2:]]
    torch.testing.assert_close(y, F.interpolate(x, size, mode="bilinear", align_corners=True))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 2, 4, 4), (2, 2, 4), (1, 2, 2, 4, 4)], ids=str)
def test_bilinear_refuses_other_shapes(shape):
    weight = torch.ones(shape)
    with pytest.raises(ValueError, match="weight must be") as error:
        bilinear_(weight)
    assert str(list(shape)) in str(error.value) and weight.min() == 1


@pytest.mark.parametrize("stride", [2, 3])
def test_icnr_makes_nearest_upsampling_of_a_1x1_convolution(stride):
    weight = icnr_(torch.empty(3, 5, stride, stride), stride)
    x, small = draw(2, 3, 4, 3), weight[:, :, 0, 0]
    assert weight.unique().numel() == small.numel()
    y = F.conv_transpose2d(x, weight, stride=stride)
    expected = F.interpolate(F.conv2d(x, small.t()[..., None, None]), scale_factor=stride, mode="nearest")
    torch.testing.assert_close(y, expected)
    blocks = y.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))


@pytest.mark.parametrize(("size", "stride"), [((4, 4), 2), ((6, 6), 2), ((6, 3), 3), ((2, 3), 1)])
def test_icnr_of_a_larger_kernel_is_nearest_upsampling_too(size, stride):
    weight = icnr_(torch.empty(3, 2, *size), stride)
    small = weight[:, :, ::stride, ::stride]
    assert weight.unique().numel() == small.numel() > 1
    x = draw(2, 3, 4, 3)
    expected = F.interpolate(F.conv_transpose2d(x, small), scale_factor=stride, mode="nearest")
    torch.testing.assert_close(F.conv_transpose2d(x, weight, stride=stride), expected)


def test_icnr_fills_in_place_with_the_initialization_given():
    shapes = []

    def count(small):
        shapes.append(tuple(small.shape))
        return small.copy_(torch.arange(small.numel()).view(small.shape))

    weight = torch.nn.Parameter(torch.empty(1, 2, 4, 4, dtype=torch.float64))
    assert icnr_(weight, 2, init=count) is weight and weight.requires_grad
    assert shapes == [(1, 2, 2, 2)]
    assert weight[0, 1].tolist() == [[4, 4, 5, 5]] * 2 + [[6, 6, 7, 7]] * 2


def test_icnr_draws_from_he_by_default():
    torch.manual_seed(0)
    weight = icnr_(torch.empty(4, 3, 2, 2), 2)
    torch.manual_seed(0)
    assert torch.equal(weight[:, :, :1, :1], torch.nn.init.kaiming_normal_(torch.empty(4, 3, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 3, 3, 4), 2), ((2, 3, 4, 3), 2), ((2, 3, 4), 2), ((2, 3, 4, 4), 0), ((2, 3, 4, 4), -2)],
)
def test_icnr_refuses_other_kernels(shape, stride):
    with pytest.raises(ValueError, match=f"multiples of stride {stride}, got"):
        icnr_(torch.empty(shape), stride)
