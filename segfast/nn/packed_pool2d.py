"""Max pooling of 2x2 windows whose indices take 2 bits each, and its unpooling, on our operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ._rules import Rule
from ._scripting import Unscriptable


class PackedMaxPool2d(Unscriptable, torch.nn.Module):
    """`torch.nn.MaxPool2d(2, ceil_mode=..., return_indices=True)` with the indices in 2 bits a window.

    [N, C, H, W] -> ([N, C, OH, OW], uint8 [N, ceil(C / 4), OH, OW]); see
    `segfast.functional.packed_max_pool2d`.

    Example:
        >>> import torch, segfast
        >>> pool, unpool = segfast.nn.PackedMaxPool2d(ceil_mode=True), segfast.nn.PackedMaxUnpool2d()
        >>> image = torch.randn(1, 64, 45, 60)
        >>> values, indices = pool(image)
        >>> unpool(values, indices, image.shape[2:]).shape
        torch.Size([1, 64, 45, 60])
    """

    def __init__(self, ceil_mode: bool = False) -> None:
        super().__init__()
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return F.packed_max_pool2d(input, self.ceil_mode)

    def extra_repr(self) -> str:
        return f"ceil_mode={self.ceil_mode}"


class PackedMaxUnpool2d(Unscriptable, torch.nn.Module):
    """`torch.nn.MaxUnpool2d(2)` by the indices of `PackedMaxPool2d`.

    See `segfast.functional.packed_max_unpool2d`.
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return F.packed_max_unpool2d(input, indices, output_size)


# Nothing in a network is replaced: of a torch.nn.MaxPool2d alone nobody knows who reads its indices.
RULES: list[Rule] = []
