"""Packed pooling and unpooling by torch's functions, whose int64 indices exist only meanwhile."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SHIFTS = (0, 2, 4, 6)


def pool(input: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """The largest of each 2x2, and where it is: uint8 `[N, ceil(C / 4), OH, OW]`."""
    values, indices = F.max_pool2d(input, 2, ceil_mode=ceil_mode, return_indices=True)
    width = input.shape[3]
    offset = indices - _corners(indices, width)
    # 0, 1, width or width + 1 becomes 0 to 3; in an image one pixel wide the second row begins at 1.
    place = offset - (offset >= width) * (width - 2)
    missing = -place.shape[1] % 4
    fours = F.pad(place, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, 4))
    packed = sum(fours[:, :, i] * 2**shift for i, shift in enumerate(_SHIFTS))
    return values, packed.to(torch.uint8)


def unpool(input: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """`input` at its places in an image of `size`, zero elsewhere."""
    return torch.ops.aten.max_unpool2d(input, _indices(places, input.shape[1], size[1]), size)


def unpool_backward(grad: Tensor, places: Tensor) -> Tensor:
    """The pixels of `grad` at the places."""
    indices = _indices(places, grad.shape[1], grad.shape[3])
    return grad.flatten(2).gather(2, indices.flatten(2)).unflatten(2, indices.shape[2:])


def _corners(like: Tensor, width: int) -> Tensor:
    """The indices of the windows' first pixels."""
    # Of `like` itself: what is measured is first tried on meta tensors, where a simulated GPU has no arange.
    rows, columns = (2 * (like.new_ones(n, dtype=torch.int64).cumsum(0) - 1) for n in like.shape[2:])
    return rows[:, None] * width + columns


def _indices(places: Tensor, channels: int, width: int) -> Tensor:
    """int64 `[N, channels, OH, OW]` into images of that width, as torch keeps them."""
    wide = places.to(torch.int64)
    place = torch.stack([wide // 2**shift % 4 for shift in _SHIFTS], 2).flatten(1, 2)[:, :channels]
    return _corners(places, width) + place // 2 * width + place % 2
