"""Spatial pyramid pooling: cells by hand, one length for every size, gradients, bad input."""

import math

import pytest
import torch

from segfast.nn import SpatialPyramidPooling


@pytest.mark.parametrize("mode", ["max", "average"])
def test_cells_by_hand(mode):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    found = SpatialPyramidPooling((3, 1), mode)(images)
    parts = []
    for level in (3, 1):
        for channel in range(3):
            for row in range(level):
                for column in range(level):
                    rows = slice(row * 7 // level, math.ceil((row + 1) * 7 / level))
                    columns = slice(column * 5 // level, math.ceil((column + 1) * 5 / level))
                    cell = images[:, channel, rows, columns]
                    parts.append(cell.amax((1, 2)) if mode == "max" else cell.mean((1, 2)))
    torch.testing.assert_close(found, torch.stack(parts, 1))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (13, 17), (64, 5)])
def test_one_length_for_every_size(size):
    pooling = SpatialPyramidPooling()
    images = torch.randn(2, 3, *size)
    assert pooling(images).shape == (2, 3 * 21)
    assert torch.equal(pooling(images.contiguous(memory_format=torch.channels_last)), pooling(images))
    assert pooling(images[:0]).shape == (0, 63)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_gradients(mode):
    torch.manual_seed(0)
    images = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SpatialPyramidPooling((2, 1), mode), images)


def test_its_repr_and_bad_input():
    assert repr(SpatialPyramidPooling((2, 1))) == "SpatialPyramidPooling(levels=(2, 1), mode='max')"
    for options, message in (
        ({"levels": ()}, r"levels must be numbers of cells of 1 or more, got \(\)"),
        ({"levels": (2, 0)}, r"levels must be numbers of cells of 1 or more, got \(2, 0\)"),
        ({"mode": "median"}, r"mode must be one of \('max', 'average'\), got 'median'"),
    ):
        with pytest.raises(ValueError, match=message):
            SpatialPyramidPooling(**options)
    for shape in ((3, 4, 4), (1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"input must be \[N, C, H, W\] of at least a pixel, got shape"):
            SpatialPyramidPooling()(torch.zeros(shape))
