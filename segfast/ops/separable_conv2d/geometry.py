"""Checks of depthwise and separable convolution."""

from torch import Tensor

from .._geometry import check_alike, check_geometry
from .._operands import Pair


def check_depthwise(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int, int, int]:
    """The result's shape. Raises torch's kind of error, naming the argument, where there is none.

    `name` is the function's, for the message.
    """
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise RuntimeError(
            f"{name}: weight must be [C * multiplier, 1, kH, kW], one filter a channel, "
            f"got {list(weight.shape)}"
        )
    if input.dim() != 4:
        raise RuntimeError(f"{name}: input must be [C, H, W] or [N, C, H, W], got {list(input.shape)}")
    channels = input.shape[1]
    if channels == 0 or weight.shape[0] == 0 or weight.shape[0] % channels:
        raise RuntimeError(
            f"{name}: weight's {weight.shape[0]} filters must be a positive multiple of the input's "
            f"{channels} channels"
        )
    check_alike(name, input, weight=weight, bias=bias)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(
            f"{name}: bias must have shape [{weight.shape[0]}] (output channels), got {list(bias.shape)}"
        )
    size = check_geometry(name, input, weight.shape[-2:], stride, padding, dilation)
    return (input.shape[0], weight.shape[0], *size)


def check_pointwise(name: str, channels: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise for a 1x1 convolution's operands that do not fit `channels` channels coming in."""
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise RuntimeError(
            f"{name}: pointwise_weight must be [C_out, {channels}, 1, 1], got {list(weight.shape)}"
        )
    check_alike(name, input, pointwise_weight=weight, bias=bias)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(
            f"{name}: bias must have shape [{weight.shape[0]}] (output channels), got {list(bias.shape)}"
        )
