"""Enlarging images bilinearly on a CPU, one axis at a time, to contiguous ones.

ATen reads four pixels for each of a contiguous result's. Here the columns are enlarged while there are few
rows, and each row is then a sum of two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import get_backend
from ._operator import is_traced, needs_autograd

# Fewer rows to each of the image's, or fewer results, take ATen as long.
_LEAST_FACTOR, _LEAST_RESULTS = 4, 2**18


def interpolate(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.interpolate`; contiguous, and faster, where a whole factor enlarges `input`."""
    size = _enlarged_size(input, *args, **kwargs)
    return F.interpolate(input, *args, **kwargs) if size is None else enlarge(input, size)


def enlarge(input: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, h, w] to contiguous [N, C, H, W] with `align_corners=False`; H is a multiple of h."""
    rows, factor = input.shape[2], size[0] // input.shape[2]
    x = F.interpolate(input.contiguous(), (rows, size[1]), mode="bilinear", align_corners=False)
    y = x.new_empty(*x.shape[:2], *size)
    # The first result between two rows, and how far each is from the upper one.
    first, last = factor // 2, factor // 2 + factor * (rows - 1)
    lower = ((torch.arange(factor, dtype=x.dtype, device=x.device) + (factor % 2 == 0) / 2) / factor)[:, None]
    between = y[:, :, first:last].unflatten(2, (rows - 1, factor))
    torch.mul(x[:, :, :-1, None], 1 - lower, out=between)
    between.addcmul_(x[:, :, 1:, None], lower)
    y[:, :, :first] = x[:, :, :1]
    y[:, :, last:] = x[:, :, -1:]
    return y


def _enlarged_size(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[int, int] | None:
    """The size of the result if `enlarge` is to compute it; else None."""
    whole = type(scale_factor) in (int, float) and scale_factor % 1 == 0
    if whole and size is None and isinstance(input, Tensor):
        size = [n * int(scale_factor) for n in input.shape[2:]]
    elif scale_factor is not None:
        return None
    known = (
        mode == "bilinear"
        and not (align_corners or antialias or recompute_scale_factor)
        and isinstance(size, Sequence)
        and len(size) == 2
        and all([type(n) is int for n in size])
    )
    plain = type(input) is Tensor and input.is_cpu and input.dim() == 4 and input.dtype == torch.float32
    if not (known and plain) or needs_autograd(input) or is_traced() or get_backend() != "auto":
        return None
    batch, channels, rows, columns = input.shape
    height, width = size
    if rows < 2 or columns < 1 or height % rows or height < _LEAST_FACTOR * rows or width < columns:
        return None
    return (height, width) if batch * channels * height * width >= _LEAST_RESULTS else None
