"""Checks of transposed convolution."""

from torch import Tensor

from .._geometry import check_alike, check_size, check_steps, transposed_output_size
from .._operands import Pair


def check_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> tuple[int, int, int, int]:
    """The result's shape. Raises torch's kind of error, naming the argument, where there is none."""
    if weight.dim() != 4:
        raise RuntimeError(
            f"conv_transpose2d: weight must be 4-D [C_in, C_out/groups, kH, kW], got {list(weight.shape)}"
        )
    if input.dim() != 4:
        raise RuntimeError(
            f"conv_transpose2d: input must be [C_in, H, W] or [N, C_in, H, W], got {list(input.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(
            f"conv_transpose2d: groups must be positive and divide weight's {weight.shape[0]} channels, "
            f"got {groups}"
        )
    if input.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"conv_transpose2d: given weight of size {list(weight.shape)}, expected input{list(input.shape)} "
            f"to have {weight.shape[0]} channels, but got {input.shape[1]} channels instead"
        )
    check_alike("conv_transpose2d", input, weight=weight, bias=bias)
    channels = weight.shape[1] * groups
    if bias is not None and tuple(bias.shape) != (channels,):
        raise RuntimeError(
            f"conv_transpose2d: bias must have shape [{channels}] (output channels), got {list(bias.shape)}"
        )
    check_steps("conv_transpose2d", stride, padding, dilation)
    if min(output_padding) < 0 or any(
        o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)
    ):
        raise RuntimeError(
            "conv_transpose2d: output padding must be smaller than either stride or dilation, but got "
            f"output_padding {output_padding}, stride {stride}, dilation {dilation}"
        )
    kernel = weight.shape[2:]
    size = transposed_output_size(input.shape[2:], kernel, stride, padding, output_padding, dilation)
    check_size("conv_transpose2d", size, input, kernel, stride, padding, dilation)
    return (input.shape[0], channels, *size)
