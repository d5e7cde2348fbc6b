"""The last step of a segmentation network: a loss, or labels, of logits that are upsampled on the way."""

import torch
from torch import Tensor

from .. import functional as F
from ._rules import Rule
from ._scripting import Unscriptable


class UpsampleCrossEntropyLoss(Unscriptable, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of logits upsampled to the target's size, which never exist in full size.

    logits [N, C, H, W] and class indices [N, OH, OW] to [], or to [N, OH, OW] with reduction "none". Without
    a scale_factor to the target's own size. The arguments before `mode` are torch.nn.CrossEntropyLoss's, the
    others `segfast.functional.upsample_cross_entropy`'s.

    Example:
        >>> import torch, segfast
        >>> loss = segfast.nn.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> loss(torch.randn(2, 21, 16, 16), torch.randint(21, (2, 128, 128))).shape
        torch.Size([])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        mode: str = "bilinear",
        align_corners: bool = False,
        scale_factor: float | tuple[float, float] | None = None,
    ):
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.mode, self.align_corners, self.scale_factor = mode, align_corners, scale_factor

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.upsample_cross_entropy(
            input,
            target,
            None,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.weight,
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
        )

    def extra_repr(self) -> str:
        options = f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, mode={self.mode!r}"
        if self.label_smoothing:
            options += f", label_smoothing={self.label_smoothing}"
        return options + _interpolation(self.align_corners, self.scale_factor)


class UpsampleArgmax(Unscriptable, torch.nn.Module):
    """The labels int64 [N, OH, OW] of upsampled logits [N, C, H, W], and on demand their softmax probability.

    The arguments are `segfast.functional.upsample_argmax`'s; a size given to `forward` goes first.

    Example:
        >>> import torch, segfast
        >>> head = segfast.nn.UpsampleArgmax(scale_factor=4)
        >>> head(torch.randn(1, 21, 16, 16)).shape
        torch.Size([1, 64, 64])
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        scale_factor: float | tuple[float, float] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        return_confidence: bool = False,
    ):
        super().__init__()
        self.size, self.scale_factor = size, scale_factor
        self.mode, self.align_corners, self.return_confidence = mode, align_corners, return_confidence

    def forward(self, input: Tensor, size: int | tuple[int, int] | None = None):
        given = size is not None
        return F.upsample_argmax(
            input,
            size if given else self.size,
            None if given else self.scale_factor,
            self.mode,
            self.align_corners,
            self.return_confidence,
        )

    def extra_repr(self) -> str:
        size = f"size={self.size}, " if self.size is not None else ""
        confidence = ", return_confidence=True" if self.return_confidence else ""
        return f"{size}mode={self.mode!r}{_interpolation(self.align_corners, self.scale_factor)}{confidence}"


def _interpolation(align_corners: bool, scale_factor) -> str:
    corners = ", align_corners=True" if align_corners else ""
    return corners if scale_factor is None else f"{corners}, scale_factor={scale_factor}"


# Nothing in a network is replaced: a loss and an argmax stand outside of it.
RULES: list[Rule] = []
