"""Sizes, padding and checks that every convolution of images shares."""

from torch import Tensor
from torch.nn import functional as F

from ._operands import Pair, pair


def output_size(height: int, width: int, kernel, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's result."""
    return (
        (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


def transposed_output_size(
    size, kernel, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair
) -> Pair:
    """Height and width of a transposed convolution's result, of an input of `size`."""
    return (
        (size[0] - 1) * stride[0] - 2 * padding[0] + dilation[0] * (kernel[0] - 1) + output_padding[0] + 1,
        (size[1] - 1) * stride[1] - 2 * padding[1] + dilation[1] * (kernel[1] - 1) + output_padding[1] + 1,
    )


def missing_output_padding(output, input, kernel, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """The output padding with which a transposed convolution of size `input` comes to size `output`."""
    least = transposed_output_size(input, kernel, stride, padding, (0, 0), dilation)
    return (output[0] - least[0], output[1] - least[1])


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


def check_steps(name: str, stride: Pair, padding: Pair, dilation: Pair) -> None:
    """Raise for a stride, a padding or a dilation that no convolution has."""
    if min(stride) < 1:
        raise RuntimeError(f"{name}: stride must be positive, got {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"{name}: dilation must be positive, got {dilation}")
    if min(padding) < 0:
        raise RuntimeError(f"{name}: padding must not be negative, got {padding}")


def check_geometry(name: str, input: Tensor, kernel, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """The result's height and width. Raises torch's kind of error, naming the argument, if it has none."""
    check_steps(name, stride, padding, dilation)
    height, width = input.shape[-2:]
    if height == 0 or width == 0:
        raise RuntimeError(f"{name}: input must have pixels, got {list(input.shape)}")
    size = output_size(height, width, kernel, stride, padding, dilation)
    check_size(name, size, input, kernel, stride, padding, dilation)
    return size


def check_size(
    name: str, size: Pair, input: Tensor, kernel, stride: Pair, padding: Pair, dilation: Pair
) -> None:
    """Raise for a result without pixels."""
    if size[0] < 1 or size[1] < 1:  # not min(): under torch.compile that asks which side is the longer
        raise RuntimeError(
            f"{name}: calculated output size {size[0]}x{size[1]} is too small, for input "
            f"{list(input.shape)}, kernel {list(kernel)}, stride {stride}, padding {padding}, "
            f"dilation {dilation}"
        )
