"""Packed pooling by torch's own functions, and images with what a maximum may stumble over."""

import torch
import torch.nn.functional as F

from segfast.functional import packed_max_pool2d, packed_max_unpool2d

# Odd sides, channels that fill no byte, a pixel, a row, several programs.
SHAPES = [(2, 5, 7, 6), (1, 3, 1, 1), (2, 64, 5, 9), (1, 1, 2, 4), (1, 9, 4, 1), (3, 4, 2, 3), (1, 130, 6, 5)]
SHAPES_AND_MODES = [(shape, ceil) for shape in SHAPES for ceil in (False, True) if ceil or min(shape[2:]) > 1]


def image(shape, dtype=torch.float32, channels_last=False, seed=0):
    """Few different numbers, so that windows have equal ones; NaN, both zeros, and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf"), 2.5])
    likely = torch.tensor([4.0, 2.0, 2.0, 4.0, 2.0, 0.5, 6.0, 1.0])
    count = shape[0] * shape[1] * shape[2] * shape[3]
    drawn = torch.multinomial(likely, count, replacement=True, generator=generator)
    t = values[drawn].reshape(shape).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def torchs(x, ceil_mode=False):
    """Values, int64 indices, and the unpooled image."""
    values, indices = F.max_pool2d(x, 2, ceil_mode=ceil_mode, return_indices=True)
    return values, indices, F.max_unpool2d(values, indices, 2, output_size=x.shape[2:])


def packed(indices, width):
    """The bytes of such indices, by the definition, one at a time."""
    batch, channels, height, columns = indices.shape
    places = torch.zeros(batch, -(-channels // 4), height, columns, dtype=torch.uint8)
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, indices.shape)).tolist():
        row, column = divmod(int(indices[n, c, h, w]), width)
        places[n, c // 4, h, w] += (2 * (row - 2 * h) + column - 2 * w) << 2 * (c % 4)
    return places


def assert_same_bits(actual, expected, what=""):
    """Equal numbers at equal places, the sign of zero among them; NaN where NaN is."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert torch.equal(actual.isnan(), expected.isnan()), what
    actual, expected = actual.nan_to_num(7.0), expected.nan_to_num(7.0)
    assert torch.equal(actual, expected) and torch.equal(actual.signbit(), expected.signbit()), what


def check(x, ceil_mode, given=None):
    """Values, indices, the unpooled image and its gradient are torch's to the last bit.

    `given` are the same numbers, elsewhere or in other strides, for our functions.
    """
    given = x if given is None else given
    results = []
    for ours, leaf in ((False, x.detach().requires_grad_()), (True, given.detach().requires_grad_())):
        if ours:
            values, places = packed_max_pool2d(leaf, ceil_mode)
            unpooled = packed_max_unpool2d(values, places, x.shape[2:])
        else:
            values, indices, unpooled = torchs(leaf, ceil_mode)
            places = packed(indices, x.shape[3])
        # No zero, whose sign is lost where torch adds it to another.
        grad = torch.linspace(-2, -1, unpooled.numel()).view(unpooled.shape).to(x.dtype)
        (gradient,) = torch.autograd.grad(unpooled, leaf, grad.to(leaf.device))
        results.append((values.detach(), unpooled.detach(), gradient, places))
    (*theirs, expected_places), (*found, places) = results
    for name, a, b in zip(("values", "unpooled", "gradient"), found, theirs, strict=True):
        assert_same_bits(a.cpu(), b, name)
        assert name == "gradient" or given is not x or a.stride() == b.stride(), name
    assert torch.equal(places.cpu(), expected_places)
