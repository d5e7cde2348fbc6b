"""Checks of conv2d, and how several images become one input."""

from collections.abc import Sequence

from torch import Tensor

from .._geometry import check_alike, check_geometry
from .._operands import Pair


def check_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    channels: int | None = None,
) -> tuple[int, int, int, int]:
    """The result's shape. Raises torch's kind of error, naming the argument, where there is none.

    `channels` is how many come in, where `input` is only the first part of them.
    """
    if weight.dim() != 4:
        raise RuntimeError(
            f"conv2d: weight must be 4-D [C_out, C_in/groups, kH, kW], got {list(weight.shape)}"
        )
    if input.dim() != 4:
        raise RuntimeError(f"conv2d: input must be [C_in, H, W] or [N, C_in, H, W], got {list(input.shape)}")
    filters, per_group = weight.shape[:2]
    if groups < 1 or filters < 1 or filters % groups:
        raise RuntimeError(
            f"conv2d: groups must be positive and divide weight's {filters} filters, got {groups}"
        )
    channels = input.shape[1] if channels is None else channels
    if channels != per_group * groups:
        raise RuntimeError(
            f"conv2d: given groups={groups}, weight of size {list(weight.shape)}, expected "
            f"input{list(input.shape)} to have {per_group * groups} channels, but got {channels} channels "
            "instead"
        )
    check_alike("conv2d", input, weight=weight, bias=bias)
    if bias is not None and tuple(bias.shape) != (filters,):
        raise RuntimeError(
            f"conv2d: bias must have shape [{filters}] (output channels), got {list(bias.shape)}"
        )
    size = check_geometry("conv2d", input, weight.shape[-2:], stride, padding, dilation)
    return (input.shape[0], filters, *size)


def check_images(inputs: Sequence[Tensor]) -> None:
    """Raise unless the images [N, C_i, H_i, W_i] can be put side by side."""
    if not inputs:
        raise RuntimeError("conv2d: input is an empty list, expected images [N, C_i, H_i, W_i]")
    first = inputs[0]
    for index, t in enumerate(inputs):
        if not isinstance(t, Tensor) or t.dim() != 4:
            got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise RuntimeError(f"conv2d: input[{index}] must be an image [N, C_i, H_i, W_i], got {got}")
        if t.shape[0] != first.shape[0]:
            raise RuntimeError(
                f"conv2d: input[0] and input[{index}] must have the same batch size, "
                f"got {first.shape[0]} and {t.shape[0]}"
            )
        check_alike("conv2d", first, **{f"input[{index}]": t})


def cropped(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Views of the images, each cut at the center to the smallest height and the smallest width."""
    heights, widths = [t.shape[2] for t in inputs], [t.shape[3] for t in inputs]
    if all([h == heights[0] for h in heights]) and all([w == widths[0] for w in widths]):
        return list(inputs)
    height, width = heights[0], widths[0]
    for h, w in zip(heights, widths, strict=True):
        # Not min(): torch.export would keep it in every size that follows.
        height, width = h if h < height else height, w if w < width else width
    found = []
    for t, h, w in zip(inputs, heights, widths, strict=True):
        top, left = (h - height) // 2, (w - width) // 2
        found.append(t[:, :, top : top + height, left : left + width])
    return found
