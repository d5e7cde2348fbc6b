"""Spatial pyramid pooling: a vector of one length for images of any size."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._scripting import Unscriptable

MODES: dict[str, Callable[..., Tensor]] = {"max": F.adaptive_max_pool2d, "average": F.adaptive_avg_pool2d}


class SpatialPyramidPooling(Unscriptable, torch.nn.Module):
    """Pools each channel of an image into 4x4, 2x2 and 1x1 cells, and returns all of them as a vector.

    Cells cover the image whatever its size, and overlap by a pixel where it does not divide: as
    `torch.nn.functional.adaptive_max_pool2d` has them.

    Args:
        levels: cells along a side, of each level of the pyramid.
        mode: "max" or "average".

    Shapes: [N, C, H, W] to [N, C * (16 + 4 + 1)], level by level, within a level channel by channel.

    Raises:
        ValueError: no levels, one below 1, another mode; an input that is not 4-D or has no pixel.

    Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual
    Recognition" (2014).

    Example:
        >>> import torch
        >>> SpatialPyramidPooling()(torch.randn(2, 8, 13, 17)).shape
        torch.Size([2, 168])
    """

    def __init__(self, levels: Sequence[int] = (4, 2, 1), mode: str = "max"):
        super().__init__()
        if not levels or min(levels) < 1:
            raise ValueError(f"levels must be numbers of cells of 1 or more, got {tuple(levels)}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {tuple(MODES)}, got {mode!r}")
        self.levels, self.mode = tuple(levels), mode

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or 0 in input.shape[2:]:
            raise ValueError(f"input must be [N, C, H, W] of at least a pixel, got shape {list(input.shape)}")
        pool = MODES[self.mode]
        return torch.cat([pool(input, level).flatten(1) for level in self.levels], 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode!r}"
