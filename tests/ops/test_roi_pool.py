"""Pooling of regions: by hand, pixel by pixel as in Fast R-CNN's definition, gradients, bad input."""

import math

import pytest
import torch

from segfast.functional import roi_pool


def by_pixels(input, boxes, size, scale):
    """Fast R-CNN's loops: the largest pixel of each cell, 0 where there is none."""
    result = input.new_zeros(len(boxes), input.shape[1], *size)
    for k, (image, *box) in enumerate(boxes.tolist()):
        left, top, right, bottom = (int(math.copysign(abs(scale * x) + 0.5, x)) for x in box)
        height, width = max(bottom - top + 1, 1), max(right - left + 1, 1)
        for row in range(size[0]):
            for column in range(size[1]):
                pixels = [
                    input[int(image), :, y, x]
                    for y in range(
                        top + row * height // size[0], top + math.ceil((row + 1) * height / size[0])
                    )
                    for x in range(
                        left + column * width // size[1], left + math.ceil((column + 1) * width / size[1])
                    )
                    if 0 <= y < input.shape[2] and 0 <= x < input.shape[3]
                ]
                if pixels:
                    result[k, :, row, column] = torch.stack(pixels).amax(0)
    return result


def draw(count=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 12, 15, generator=generator, dtype=dtype)
    # In units of which a pixel has four; some beyond the image, some with their corners exchanged.
    boxes = torch.rand(count, 5, generator=generator) * torch.tensor([2, 80, 70, 80, 70]) - 8
    boxes[:, 0] = torch.arange(count) % 2
    return input, boxes


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)])
def test_is_the_loops_over_pixels(size):
    input, boxes = draw()
    found = roi_pool(input, boxes, size, spatial_scale=0.25)
    assert torch.equal(found, by_pixels(input, boxes, size, 0.25))
    assert (found == 0).any() and (found != 0).any()
    # Image by image.
    order = torch.cat((boxes[::2], boxes[1::2]))
    by_image = roi_pool(input, [boxes[::2, 1:], boxes[1::2, 1:]], size, 0.25)
    assert torch.equal(by_image, roi_pool(input, order, size, 0.25))


def test_by_hand():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    box = torch.tensor([[0, 0.0, 0, 2, 2]])  # three pixels a side: the middle ones are in both halves
    assert roi_pool(image, box, 2)[0, 0].tolist() == [[5, 6], [9, 10]]
    assert roi_pool(image, box, (1, 3))[0, 0].tolist() == [[8, 9, 10]]
    assert roi_pool(-image - 1, torch.tensor([[0, 2.0, 3, 5, 3]]), (1, 2))[0, 0].tolist() == [[-15, 0]]


def test_gradients():
    input, boxes = draw(6)
    input.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, boxes, 3, 0.25), input)


def test_layouts_and_no_boxes():
    input, boxes = draw(dtype=torch.float32)
    before = input.clone()
    found = roi_pool(input.contiguous(memory_format=torch.channels_last), boxes, 2, 0.25)
    assert torch.equal(found, roi_pool(input, boxes, 2, 0.25)) and torch.equal(input, before)
    assert roi_pool(input, torch.zeros(0, 5), (2, 3)).shape == (0, 3, 2, 3)
    assert roi_pool(input, [torch.zeros(0, 4)] * 2, 2).shape == (0, 3, 2, 2)


def test_is_torchvisions_where_its_operators_fit_this_torch():
    operators = pytest.importorskip("torchvision.ops", exc_type=Exception)
    if getattr(torch.ops.torchvision, "roi_pool", None) is None:
        pytest.skip("torchvision's operators are for another build of torch")
    input, boxes = draw(dtype=torch.float32)
    torch.testing.assert_close(roi_pool(input, boxes, 4, 0.25), operators.roi_pool(input, boxes, 4, 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(3, 4, 4)}, r"input must be floating point \[N, C, H, W\], got .*\[3, 4, 4\]"),
        ({"input": torch.zeros(1, 3, 4, 4).long()}, r"input must be floating point .*, got torch.int64"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must be \[K, 5\], or a list of \[K, 4\], got shape \[2, 4\]"),
        ({"boxes": [torch.zeros(2, 4)] * 3}, r"boxes must be \[K, 4\] for each of 2 images"),
        ({"boxes": torch.tensor([[2, 0.0, 0, 1, 1]])}, "boxes must name an image from 0 to 1, got 2"),
        ({"boxes": torch.tensor([[0.5, 0.0, 0, 1, 1]])}, r"boxes must name an image from 0 to 1, got 0\.5"),
        ({"boxes": torch.tensor([[0, 0.0, 0, math.nan, 1]])}, "boxes must be finite"),
        ({"output_size": 0}, "output_size must be one or two numbers of 1 or more, got 0"),
        ({"output_size": (1, 2, 3)}, "output_size must be one or two numbers of 1 or more"),
        ({"spatial_scale": 0}, "spatial_scale must be positive and finite, got 0"),
    ],
)
def test_bad_input(change, message):
    given = {"input": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        roi_pool(**{**given, **change})
