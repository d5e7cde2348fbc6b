"""`torch.nn.functional.conv2d` with a fused epilogue, on our kernels, cuDNN's or ATen's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cpu
from .._aten_only import certainly_aten
from .._backend import add_explanation, get_backend, note_taken, use_triton
from .._cudnn import CALLS, conv2d_cudnn
from .._epilogue import check_activation, check_epilogue
from .._geometry import output_size, resolve_padding
from .._gpu import can_use_triton, choose
from .._operands import Pair, pair
from .._operator import _functorch_active, autocast_dtype, cast_operands
from .._prepared_weights import cast
from ..separable_conv2d.functional import depthwise_conv2d
from . import concat
from .geometry import check_images, cropped
from .operators import CONV2D

OPERATIONS = (
    "conv2d_forward",
    "conv2d_grad_input",
    "conv2d_grad_weight",
    "parallel_conv2d_forward",
)


def conv2d(
    input: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Convolution with a fused epilogue: `act(scale * (conv(input, weight) + bias) + shift + residual)`.

    The first seven arguments are `torch.nn.functional.conv2d`'s. On our kernels it is one pass, and taps that
    meet nothing but padding, many of them at large dilations, are not computed. Where cuDNN's own fused calls
    were measured faster on this GPU, "auto" takes those.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; float16, bfloat16 or float32 on our kernels, any dtype on
            ATen. A list of images [N, C_i, H_i, W_i] stands for their concatenation along the channels, each
            cropped at the center, at `(H_i - H) // 2`, to the smallest height and width; our kernels read
            the images where they lie (up to four of them).
        weight: [C_out, C_in/groups, kH, kW]. Free of a copy on our kernels if channels_last.
        bias: [C_out].
        padding: an int, a pair, "valid" or "same".
        scale, shift: [C_out], for instance a folded batch norm; evaluated in float32.
        residual: the output's shape, added before the activation; may be an expanded view.
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.

    Returns:
        [N, C_out, H_out, W_out], H_out = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1;
        channels_last if the input or the weight is.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that do not go together.
        ValueError: an unknown activation.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions" (2016).

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 33, 33), torch.randn(4, 8, 3, 3)
        >>> segfast.functional.conv2d(x, w, padding=12, dilation=12, activation="relu").shape
        torch.Size([1, 4, 33, 33])
        >>> skip, up = torch.randn(1, 6, 13, 13), torch.randn(1, 2, 9, 9)
        >>> segfast.functional.conv2d([skip, up], w).shape
        torch.Size([1, 4, 7, 7])
    """
    check_activation(activation)
    epilogue = (scale, shift, residual, activation, negative_slope)
    if not isinstance(input, Tensor):
        return _of_images(list(input), weight, bias, stride, padding, dilation, groups, *epilogue)
    if input.dim() != 3:
        return _of_one(input, weight, bias, stride, padding, dilation, groups, *epilogue)
    batched = None if residual is None else residual.unsqueeze(0)
    epilogue = (scale, shift, batched, activation, negative_slope)
    one = input.unsqueeze(0)
    return _of_one(one, weight, bias, stride, padding, dilation, groups, *epilogue).squeeze(0)


def _of_one(
    input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation, slope
) -> Tensor:
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    input, padding = resolve_padding("conv2d", input, weight, stride, padding, dilation)
    args = (input, weight, bias, stride, padding, dilation, groups)
    epilogue = (scale, shift, residual, activation, slope)
    if certainly_aten(input) or input.dim() != 4 or weight.dim() != 4:
        return _aten(*args, *epilogue)
    if _is_depthwise(input, weight, groups) and residual is None:
        return depthwise_conv2d(
            *args[:-1], scale=scale, shift=shift, activation=activation, negative_slope=slope
        )
    dtype = autocast_dtype(input)
    differentiates = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    rest = (bias, scale, shift, residual)
    options = (stride, padding, dilation, groups, *[t is not None for t in rest], activation)
    chosen = choose("conv2d", (input,), (weight,), options, differentiates, dtype, operands=rest)
    if use_triton("conv2d", can_use_triton, input, weight, dtype, "conv2d", chosen):
        if dtype is not None:
            weight = cast(weight, dtype)
            input, bias, residual = cast_operands(dtype, input, bias, residual)
        operands = (input, weight, bias, scale, shift, residual)
        return CONV2D.forward(*operands, stride, padding, dilation, groups, activation, slope)
    if chosen in CALLS:
        y = conv2d_cudnn(chosen, *args, scale, shift, residual, activation)
        if y is not None:
            return y
    if dtype is not None and input.is_cuda:
        args = (input, cast(weight, dtype), *args[2:])  # once, where autocast would at every call
    return _aten(*args, *epilogue)


def _is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    """A filter, or several, for each channel, and more than one channel."""
    return groups > 1 and weight.shape[1] == 1 and input.shape[1] == groups


def _aten(
    input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation, slope
) -> Tensor:
    affine = scale is not None or shift is not None or residual is not None
    if affine and input.dim() == 4 and weight.dim() == 4 and min(stride) > 0:
        height, width = input.shape[2:]
        size = output_size(height, width, weight.shape[2:], stride, padding, dilation)
        check_epilogue((input.shape[0], weight.shape[0], *size), input.device, scale, shift, residual)
    return _cpu.conv2d(
        input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation, slope
    )


def _of_images(
    images, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation, slope
) -> Tensor:
    """conv2d of the images' concatenation."""
    dtype = autocast_dtype(images[0]) if images and isinstance(images[0], Tensor) else None
    if dtype is not None:
        images = [t.to(dtype) for t in images]
        if not certainly_aten(images[0]):  # else a cast weight would be another at every call
            weight = cast(weight, dtype)
            bias, residual = cast_operands(dtype, bias, residual)
    check_images(images)
    images = [t for t in images if t.shape[1] > 0] or images[:1]
    steps, rates = pair(stride, "stride"), pair(dilation, "dilation")
    stays = len(images) > 1 and groups == 1 and weight.dim() == 4 and not _functorch_active()
    # As torch does it, "same" may pad one more at the end: then the images are brought together first.
    resolved, pads = resolve_padding("conv2d", images[0], weight, steps, padding, rates)
    stays = stays and resolved is images[0] and len(images) <= concat.MOST_IMAGES
    if stays and prefers_virtual_concat(images, weight, steps, pads, rates):
        add_explanation("conv2d", "triton", "reads the images where they lie")
        note_taken("conv2d", (weight,))
        return concat.forward(
            images, weight, bias, scale, shift, residual, steps, pads, rates, activation, slope
        )
    joined = torch.cat(cropped(images), 1) if len(images) > 1 else images[0]
    epilogue = (scale, shift, residual, activation, slope)
    return _of_one(joined, weight, bias, steps, padding, rates, groups, *epilogue)


def prefers_virtual_concat(
    images: Sequence[Tensor],
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
) -> bool:
    """True if conv2d of a list of images reads them where they lie.

    It does where that was chosen. Where cuDNN or ATen compute it, there must be a concatenation, and
    `up_concat` writes it in one launch.
    """
    first = images[0]
    channels = sum([t.shape[1] for t in images])
    backend = get_backend()
    if backend == "aten" or certainly_aten(first) or weight.dim() != 4 or weight.shape[1] != channels:
        return False
    differentiates = torch.is_grad_enabled() and any([t.requires_grad for t in (*images, weight)])
    dtype = autocast_dtype(first)
    options = (stride, padding, dilation)  # an epilogue hardly matters
    chosen = choose("conv2d_of_images", images, (weight,), options, differentiates, dtype)
    return can_use_triton(backend, first, weight, dtype, "conv2d_of_images", chosen) is None
