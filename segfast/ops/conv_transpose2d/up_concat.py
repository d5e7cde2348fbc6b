"""Up-convolution and concatenation in one operator: the decoder step of a U-Net, `cat([skip', up], 1)`.

The up-convolution writes into its channels of the result, the same launch copies the skip into the others.
One operator returns the whole buffer: an autograd Function that writes into a view loses gradients silently.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import use_triton
from .._convolution import convolution_flops
from .._epilogue import check_activation, epilogue_backward, keeps_output
from .._geometry import transposed_output_size
from .._gpu import can_use_triton, choose
from .._layout import channels_innermost, fit_epilogue, in_format, output_format, packed_weight
from .._operands import Pair, empty, load_kernels, pair
from .._operator import (
    Differentiable,
    Operator,
    autocast_dtype,
    cast_operands,
    launch_again,
    launch_first,
    needs_autograd,
)
from .._prepared_weights import cast
from .functional import conv_transpose2d
from .geometry import check_conv_transpose2d
from .operators import CONV_TRANSPOSE2D


def geometry(input, skip, weight, stride: Pair, padding: Pair) -> tuple[Pair, Pair, Pair]:
    """(output_padding, crop, size): how the up-convolution grows to the skip, or the skip is cropped to it.

    Raises:
        ValueError: the up-convolution is larger than the skip.
    """
    options = (stride, padding, (0, 0), (1, 1))
    size = transposed_output_size(input.shape[2:], weight.shape[2:], *options)
    extra, crop, final = [], [], []
    for i, axis in enumerate(("height", "width")):
        up, have, s = size[i], skip.shape[2 + i], stride[i]
        # As much of the input as the skip has room for. torch.export sees without a guard that half of a free
        # size is half of it; that twice the half is at most the whole, it does not see.
        most = (have + 2 * padding[i] - weight.shape[2 + i]) // s + 1
        if input.shape[2 + i] > most:
            raise ValueError(
                f"up_concat: the up-convolution's {axis} {up} is larger than the skip's {have}; pad the "
                f"network's input or give a larger skip (input {list(input.shape)}, "
                f"skip {list(skip.shape)}, stride {s})"
            )
        grows = input.shape[2 + i] == most
        extra.append(have - up if grows else 0)
        crop.append(0 if grows else (have - up) // 2)
        final.append(have if grows else up)
    return (extra[0], extra[1]), (crop[0], crop[1]), (final[0], final[1])


def _result_shape(input, skip, weight, bias, stride, padding) -> tuple[tuple[int, ...], Pair]:
    """Shape of the result, and where the skip is cropped."""
    check_conv_transpose2d(input, weight, bias, stride, padding, (0, 0), 1, (1, 1))
    if input.shape[0] != skip.shape[0]:
        raise RuntimeError(
            f"up_concat: x and skip must have the same batch size, got {input.shape[0]} and {skip.shape[0]}"
        )
    if input.device != skip.device:
        raise RuntimeError(
            f"up_concat: x and skip must be on the same device, got {input.device} and {skip.device}"
        )
    if input.dtype != skip.dtype:
        raise RuntimeError(
            f"up_concat: x and skip must have the same dtype, got {input.dtype} and {skip.dtype}"
        )
    _, crop, size = geometry(input, skip, weight, stride, padding)
    return (input.shape[0], skip.shape[1] + weight.shape[1], *size), crop


def _up_concat_fake(input, skip, weight, bias, stride, padding, activation, negative_slope):
    shape, _ = _result_shape(input, skip, weight, bias, stride, padding)
    return empty(shape, input, output_format(input, weight))


def _up_concat_kernels(input, skip, weight, bias, stride, padding, activation, negative_slope):
    kernels = load_kernels()
    key = (
        "up_concat",
        kernels.layout_key(input, weight, bias, skip),
        input.device,
        stride,
        padding,
        activation,
        negative_slope,
        kernels.dot_precision(input.dtype),
    )
    tensors = (input, weight, bias, None, None, None, skip)
    result = launch_again(key, tensors)
    if result is not None:
        return result
    shape, crop = _result_shape(input, skip, weight, bias, stride, padding)
    fitted = (
        channels_innermost(input),
        packed_weight(weight),
        *fit_epilogue(bias, None, None, None),
        channels_innermost(skip),
    )
    options = (stride, padding, (1, 1), 1, crop, activation, negative_slope)
    return launch_first(
        key,
        shape,
        output_format(input, weight),
        tensors,
        fitted,
        lambda out: kernels.conv_transpose2d_forward(*fitted, out, *options),
    )


def _up_concat_reference(input, skip, weight, bias, stride, padding, activation, negative_slope):
    result = _up_concat_aten(
        input, skip, weight, bias, tuple(stride), tuple(padding), activation, negative_slope
    )
    return in_format(result, output_format(input, weight))


def _up_concat_aten(input, skip, weight, bias, stride, padding, activation, negative_slope):
    if autocast_dtype(input) is None:
        _result_shape(input, skip, weight, bias, stride, padding)
    extra, crop, size = geometry(input, skip, weight, stride, padding)
    options = {"activation": activation, "negative_slope": negative_slope}
    up = up_convolution(input, weight, bias, stride, padding, extra, size, **options)
    if torch.compiler.is_exporting():
        skip = _cut(skip, crop, size)
    else:
        skip = skip[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]
    return torch.cat([skip.to(up.dtype), up], 1)


def up_convolution(
    input, weight, bias, stride: Pair, padding: Pair, extra: Pair, size: Pair, **options
) -> Tensor:
    """The transposed convolution of `size`: `extra`, of `geometry`, is its output padding.

    torch.export asks whether a padding of free size is negative: there the whole of what may be lacking is
    computed, and cut.
    """
    if not torch.compiler.is_exporting():
        return conv_transpose2d(input, weight, bias, stride, padding, extra, **options)
    most = (stride[0] - 1, stride[1] - 1)
    return _cut(conv_transpose2d(input, weight, bias, stride, padding, most, **options), (0, 0), size)


def _cut(image: Tensor, start: Pair, size: Pair) -> Tensor:
    """`size` pixels from `start` on, by negative padding: slices of free size tie an export to one."""
    (top, left), (height, width) = start, image.shape[-2:]
    return F.pad(image, (-left, left + size[1] - width, -top, top + size[0] - height))


UP_CONCAT = Operator(
    "up_concat(Tensor input, Tensor skip, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
    "str? activation, float negative_slope) -> Tensor",
    kernels=_up_concat_kernels,
    reference=_up_concat_reference,
    fake=_up_concat_fake,
    per_sample=(0, 1),
    flops=lambda input, skip, weight, *_, **__: convolution_flops(input, weight),
)


class _UpConcat(Differentiable):
    @staticmethod
    def forward(*args):
        return UP_CONCAT(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, skip, weight, bias, *ctx.options = inputs
        ctx.skip_shape = skip.shape
        ctx.sizes = geometry(input, skip, weight, *ctx.options[:2])
        ctx.save_for_backward(input, weight, bias, output if keeps_output(*ctx.options[2:]) else None)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, output = ctx.saved_tensors
        stride, padding, activation, negative_slope = ctx.options
        extra, crop, size = ctx.sizes
        skip_channels, skip_h, skip_w = ctx.skip_shape[1:]

        def recompute(bias, *_):
            return CONV_TRANSPOSE2D.forward(
                input, weight, bias, None, None, None, stride, padding, extra, 1, (1, 1), None, 0.0
            )

        # Views of the gradient: the operators read them where they lie.
        grads = epilogue_backward(
            grad[:, skip_channels:],
            None if output is None else output[:, skip_channels:],
            recompute,
            bias,
            None,
            None,
            None,
            activation,
            negative_slope,
            (ctx.needs_input_grad[3], False, False, False),
        )
        grad_input = grad_skip = grad_weight = None
        geometry = (stride, padding, 1, (1, 1))
        if ctx.needs_input_grad[0]:
            grad_input = CONV_TRANSPOSE2D.grad_input(grads.conv, weight, *input.shape[2:], *geometry)
        if ctx.needs_input_grad[1]:
            grad_skip = grad[:, :skip_channels]
            if (skip_h, skip_w) != size:
                below, right = skip_h - size[0] - crop[0], skip_w - size[1] - crop[1]
                grad_skip = F.pad(grad_skip, (crop[1], right, crop[0], below))
        if ctx.needs_input_grad[2]:
            grad_weight = CONV_TRANSPOSE2D.grad_weight(grads.conv, input, weight, *geometry)
        return (grad_input, grad_skip, grad_weight, grads.bias, None, None, None, None)


def up_concat(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 2,
    padding: int | Pair = 0,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """`cat([skip', up], 1)` with up = act(convT(x, weight) + bias): a U-Net decoder's step.

    Where up is smaller than the skip by less than the stride, it is made as large as the skip, as
    `output_size=` of `torch.nn.ConvTranspose2d` would (odd sizes: 7 -> 3 -> 7). Where it is smaller by more,
    the skip is cropped at the center, at `(H_skip - H_up) // 2`. Height and width are treated each by itself.

    Args:
        x: [N, C_in, H, W].
        skip: [N, C_skip, H_skip, W_skip], same dtype and device.
        weight: [C_in, C_up, kH, kW].
        bias: [C_up].
        activation, negative_slope: as in `conv_transpose2d`; on `up` only.

    Returns:
        [N, C_skip + C_up, H_out, W_out].

    Raises:
        ValueError: up is larger than the skip, or an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not go together.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Ronneberger, Fischer and Brox, "U-Net" (2015), figure 1.

    Example:
        >>> import torch, segfast
        >>> x, skip, w = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 7, 7), torch.randn(8, 4, 2, 2)
        >>> segfast.functional.up_concat(x, skip, w).shape
        torch.Size([1, 8, 7, 7])
    """
    check_activation(activation)
    if x.dim() != 4 or skip.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            "up_concat: x, skip and weight must be 4-D, got "
            f"{list(x.shape)}, {list(skip.shape)}, {list(weight.shape)}"
        )
    dtype = autocast_dtype(x)
    stride, padding = pair(stride, "stride"), pair(padding, "padding")
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    options = (stride, padding, bias is not None, activation)
    chosen = choose("up_concat", (x, skip), (weight,), options, differentiates, dtype, operands=(bias,))
    if not use_triton("up_concat", can_use_triton, x, weight, dtype, "up_concat", chosen):
        return _up_concat_aten(x, skip, weight, bias, stride, padding, activation, negative_slope)
    if dtype is not None:
        x, skip, bias = cast_operands(dtype, x, skip, bias)
        weight = cast(weight, dtype)
    if needs_autograd(x, skip, weight, bias):
        return _UpConcat.call(x, skip, weight, bias, stride, padding, activation, negative_slope)
    return UP_CONCAT(x, skip, weight, bias, stride, padding, activation, negative_slope)
