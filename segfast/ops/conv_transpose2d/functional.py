"""`torch.nn.functional.conv_transpose2d` with a fused epilogue, on our kernels or ATen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import use_triton
from .._cpu import conv_transpose2d_chosen
from .._epilogue import apply_epilogue, check_activation, check_epilogue
from .._gpu import can_use_triton, choose
from .._operands import Pair, pair
from .._operator import autocast_dtype, cast_operands
from .._prepared_weights import cast
from .bilinear import channelwise_factors, upsample_separable
from .geometry import check_conv_transpose2d
from .operators import CONV_TRANSPOSE2D

OPERATIONS = ("conv_transpose2d_forward", "conv_transpose2d_grad_input", "conv_transpose2d_grad_weight")


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    groups: int = 1,
    dilation: int | Pair = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Transposed convolution with a fused epilogue.

    `act(scale * (convT(input, weight) + bias) + shift + residual)`, in one pass on our kernels. The
    first eight arguments are `torch.nn.functional.conv_transpose2d`'s.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; float16, bfloat16 or float32 on our kernels, any dtype on
            ATen.
        weight: [C_in, C_out/groups, kH, kW]. Free of a copy on our kernels if channels_last.
        bias: [C_out].
        scale, shift: [C_out], for instance a folded batch norm; evaluated in float32.
        residual: the output's shape, added before the activation.
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.

    Returns:
        [N, C_out, H_out, W_out], H_out = (H - 1) stride - 2 padding + dilation (kH - 1) + output_padding + 1;
        channels_last if the input or the weight is.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that do not go together.
        ValueError: an unknown activation.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), chapter 4.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 4, 2, 2)
        >>> segfast.functional.conv_transpose2d(x, w, stride=2, activation="relu").shape
        torch.Size([1, 4, 10, 10])
    """
    if input.dim() == 3:
        return conv_transpose2d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation, scale=scale,
            shift=shift, residual=None if residual is None else residual.unsqueeze(0), activation=activation,
            negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    check_activation(activation)
    steps, pads = pair(stride, "stride"), pair(padding, "padding")
    extra, rates = pair(output_padding, "output_padding"), pair(dilation, "dilation")
    dtype = autocast_dtype(input)
    name, chosen = "conv_transpose2d", None
    if input.is_cuda:
        operands = (bias, scale, shift, residual)
        options = (steps, pads, extra, groups, rates, *[t is not None for t in operands], activation)
        differentiates = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        chosen = choose(name, (input,), (weight,), options, differentiates, dtype, operands=operands)
    if use_triton(name, can_use_triton, input, weight, dtype, name, chosen):
        if dtype is not None:
            input, bias, residual = cast_operands(dtype, input, bias, residual)
            weight = cast(weight, dtype)
        return CONV_TRANSPOSE2D.forward(
            input, weight, bias, scale, shift, residual, steps, pads, extra, groups, rates, activation,
            negative_slope,
        )  # fmt: skip
    y = by_axis(input, weight, bias, steps, pads, extra, groups, rates)
    if y is None and input.is_cpu and scale is None and shift is None:
        whole = conv_transpose2d_chosen(
            input, weight, bias, steps, pads, extra, rates, groups, residual, activation, negative_slope
        )
        if whole is not None:
            return whole
    if y is None:
        # As they came: torch makes less work of numbers than of pairs.
        y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if activation is not None or scale is not None or shift is not None or residual is not None:
        check_epilogue(y.shape, input.device, scale, shift, residual)
        y = apply_epilogue(y, scale, shift, residual, activation, negative_slope)
    return y


def by_axis(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> Tensor | None:
    """The transposed convolution, one axis after the other; None where the weight does not allow it."""
    factors = channelwise_factors(input, weight, stride, groups, dilation)
    if factors is None:
        return None
    check_conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return upsample_separable(input, factors, stride, padding, output_padding, bias)
