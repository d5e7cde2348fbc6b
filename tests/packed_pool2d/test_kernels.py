"""The kernels of packed pooling in Triton's interpreter, to the last bit against torch."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import packed_max_pool2d, packed_max_unpool2d
from segfast.kernels import Tile, override_tile
from segfast.ops.packed_pool2d import OPERATIONS
from tests.packed_pool2d.reference import SHAPES_AND_MODES, assert_same_bits, check, image, torchs

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def kernels():
    with segfast.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "ceil_mode"), SHAPES_AND_MODES, ids=str)
def test_values_places_and_gradients_are_torchs(shape, ceil_mode, dtype, poisoned_empty, checked_hints):
    for channels_last in {True, dtype == torch.float16}:
        check(image(shape, dtype, channels_last), ceil_mode)


@pytest.mark.parametrize("block", [(1, 4), (4, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_of_every_tile_they_are_the_same(operation, block, poisoned_empty):
    with override_tile(operation, Tile(*block, 1, 4, 1)):
        check(image((2, 13, 5, 6), channels_last=True), True)


def test_against_fp64(poisoned_empty):
    x = torch.randn(2, 7, 9, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wide = x.detach().double().requires_grad_()
    values, places = packed_max_pool2d(x, ceil_mode=True)
    expected, indices = F.max_pool2d(wide, 2, ceil_mode=True, return_indices=True)
    found = packed_max_unpool2d(values.square(), places, (9, 8))
    unpooled = F.max_unpool2d(expected.square(), indices, 2, output_size=(9, 8))
    torch.testing.assert_close(found.double(), unpooled, atol=1e-6, rtol=1e-6)
    for loss, t, what in ((found, x, "ours"), (unpooled, wide, "theirs")):
        (first,) = torch.autograd.grad((loss**3).sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), t)
        results = (first.detach().double(), second.double())
        if what == "ours":
            ours = results
    torch.testing.assert_close(ours, results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("view", ["rows apart", "channels of more", "NCHW"])
def test_images_in_other_strides(view, poisoned_empty, checked_hints):
    wide = image((2, 20, 10, 6), channels_last=view != "NCHW")
    x = {"rows apart": wide[:, :, ::2], "channels of more": wide[:, 3:12], "NCHW": wide[:, ::2]}[view]
    values, places = packed_max_pool2d(x, ceil_mode=True)
    expected, _, unpooled = torchs(x, True)
    assert_same_bits(values, expected)
    # Of the places a part, which is dense in no format.
    more = torch.cat([places, places], 1)[:, : places.shape[1]]
    assert_same_bits(packed_max_unpool2d(values, more, x.shape[2:]), unpooled)


def test_places_of_a_full_byte_reach_no_pixel_outside(poisoned_empty):
    """Places of windows cut off by the border that none of our poolings gives: nothing is written past it."""
    places = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    x = torch.ones(1, 4, 2, 2, requires_grad=True)
    y = packed_max_unpool2d(x, places, (3, 3))
    expected = torch.zeros(1, 4, 3, 3)
    expected[:, :, 1, 1] = 1
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.sum() == 4 and torch.equal(x.grad[:, :, 0, 0], torch.ones(1, 4))
