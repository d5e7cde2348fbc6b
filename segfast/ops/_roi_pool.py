"""Pooling of regions of interest, in PyTorch's operations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The largest value of each channel in each cell of each box: torchvision's `roi_pool`, without it.

    A box is rounded to whole pixels of the input, its corners included, and divided into cells that cover it
    and may share a row or column. A cell without a pixel of the image is 0. Boxes are read by the CPU.
    Cells are exact; torchvision's, divided in float32, may end a pixel late: the last of 7 in 57 pixels does.

    Args:
        input: [N, C, H, W], floating point.
        boxes: [K, 5], the image's number, then left, top, right and bottom; or for each image [K_i, 4].
        output_size: rows and columns of cells, or one number for both.
        spatial_scale: pixels of the input to one of the units that boxes are in; 1/16 for boxes in pixels of
            an image of whose features at stride 16 the input is.

    Shapes: [K, C, rows, columns].

    Raises:
        ValueError: an input or boxes of another shape, an image's number that there is not, a coordinate that
            is not finite, an output size below 1, a scale that is not positive.

    Source: Girshick, "Fast R-CNN" (2015), section 2.1.

    Example:
        >>> import torch
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> roi_pool(image, torch.tensor([[0, 0, 0, 3.0, 1.0]]), (1, 2)).flatten().tolist()
        [5.0, 7.0]
    """
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input must be floating point [N, C, H, W], got {input.dtype} {list(input.shape)}")
    sides = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"output_size must be one or two numbers of 1 or more, got {output_size}")
    if not (spatial_scale > 0 and math.isfinite(spatial_scale)):
        raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")
    pooled = [_pool(input, box, sides, spatial_scale) for box in _rows(boxes, len(input))]
    return torch.stack(pooled) if pooled else input.new_zeros(0, input.shape[1], *sides)


def _rows(boxes: Tensor | Sequence[Tensor], images: int) -> list[list[float]]:
    """Image, left, top, right and bottom of every box."""
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"boxes must be [K, 5], or a list of [K, 4], got shape {list(boxes.shape)}")
        rows = boxes.tolist()
    else:
        if len(boxes) != images or any(part.dim() != 2 or part.shape[1] != 4 for part in boxes):
            shapes = [list(part.shape) for part in boxes]
            raise ValueError(f"boxes must be [K, 4] for each of {images} images, got {shapes}")
        rows = [[image, *box] for image, part in enumerate(boxes) for box in part.tolist()]
    for row in rows:
        if not all(map(math.isfinite, row)):
            raise ValueError(f"boxes must be finite, got {row}")
        if not (0 <= row[0] < images and row[0] == int(row[0])):
            raise ValueError(f"boxes must name an image from 0 to {images - 1}, got {row[0]:g}")
    return rows


def _pool(input: Tensor, box: Sequence[float], sides: tuple[int, int], scale: float) -> Tensor:
    image, left, top, right, bottom = box
    x = input[int(image)]
    for dim, count, first, last in ((1, sides[0], top, bottom), (2, sides[1], left, right)):
        cells = [
            x.narrow(dim, start, stop - start).max(dim).values
            if start < stop
            else torch.zeros_like(x.sum(dim))
            for start, stop in _cells(first * scale, last * scale, count, input.shape[dim + 1])
        ]
        x = torch.stack(cells, dim)
    return x


def _cells(first: float, last: float, count: int, length: int) -> list[tuple[int, int]]:
    """Where each cell begins and ends, within the image."""
    start, end = (int(math.copysign(abs(at) + 0.5, at)) for at in (first, last))  # to the nearest
    pixels = max(1, end - start + 1)
    edges = [(start + cell * pixels // count, start - -(cell + 1) * pixels // count) for cell in range(count)]
    return [(min(max(low, 0), length), min(max(high, 0), length)) for low, high in edges]
