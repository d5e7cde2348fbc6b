"""Sizes and checks of depthwise and separable convolution."""

from torch import Tensor
from torch.nn import functional as F

from .._operands import Pair, pair


def output_size(height: int, width: int, kernel, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's result."""
    return (
        (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


def resolve_padding(name: str, input: Tensor, weight: Tensor, stride: Pair, padding, dilation: Pair):
    """`input` and the padding as a pair, for an int, a pair, "valid" or "same".

    "same" pads one more below and on the right where the sum is odd, as torch does.

    Raises:
        RuntimeError: another string, or "same" with a stride.
    """
    if not isinstance(padding, str):
        return input, pair(padding, "padding")
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"{name}: padding must be 'valid', 'same', an int or two ints, got {padding!r}")
    if stride != (1, 1):
        raise RuntimeError(f"{name}: padding='same' is not supported with stride {stride}")
    if weight.dim() != 4:
        return input, (0, 0)  # an error, as the checks to come will say
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
    if total[0] % 2 or total[1] % 2:
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


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
    if min(stride) < 1:
        raise RuntimeError(f"{name}: stride must be positive, got {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"{name}: dilation must be positive, got {dilation}")
    if min(padding) < 0:
        raise RuntimeError(f"{name}: padding must not be negative, got {padding}")
    height, width = input.shape[-2:]
    if height == 0 or width == 0:
        raise RuntimeError(f"{name}: input must have pixels, got {list(input.shape)}")
    size = output_size(height, width, weight.shape[-2:], stride, padding, dilation)
    if size[0] < 1 or size[1] < 1:  # not min(): under torch.compile that asks which side is the longer
        raise RuntimeError(
            f"{name}: calculated output size {size[0]}x{size[1]} is too small, for input "
            f"{list(input.shape)}, kernel {list(weight.shape[2:])}, stride {stride}, padding {padding}, "
            f"dilation {dilation}"
        )
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


def check_alike(name: str, input: Tensor, **operands: Tensor | None) -> None:
    """Raise unless the operands share the input's dtype and device."""
    for operand, t in operands.items():
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(
                f"{name}: input and {operand} must share a dtype, got {input.dtype} and {t.dtype}"
            )
        if t is not None and t.device != input.device:
            raise RuntimeError(
                f"{name}: input and {operand} must share a device, got {input.device} and {t.device}"
            )
