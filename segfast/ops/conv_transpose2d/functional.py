"""What users call: `torch.nn.functional.conv_transpose2d` with a fused epilogue, on our kernels or ATen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import use_triton
from .._cpu import conv_transpose2d_chosen
from .._epilogue import apply_epilogue, check_activation, check_epilogue
from .._gpu import can_use_triton, choose
from .._operands import Pair, pair
from .._operator import autocast_dtype
from .._remembered import cast
from .autograd import forward
from .bilinear import channelwise_factors, upsample_separable
from .operators import check_conv_transpose2d

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
        result = conv_transpose2d(
            input.unsqueeze(0),
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            scale=scale,
            shift=shift,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation,
            negative_slope=negative_slope,
        )
        return result.squeeze(0)
    check_activation(activation)
    dtype = autocast_dtype(input)
    differentiates = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    name = "conv_transpose2d"
    chosen = None
    if input.is_cuda:
        operands = (bias, scale, shift, residual)
        options = (
            pair(stride, "stride"),
            pair(padding, "padding"),
            pair(output_padding, "output_padding"),
            groups,
            pair(dilation, "dilation"),
            *[t is not None for t in operands],
            activation,
        )
        chosen = choose(name, (input,), (weight,), options, differentiates, dtype, operands=operands)
    if not use_triton(name, can_use_triton, input, weight, dtype, name, chosen):
        factors = channelwise_factors(input, weight, stride, groups, dilation)
        if factors is None and input.is_cpu and scale is None and shift is None:
            y = conv_transpose2d_chosen(
                input,
                weight,
                bias,
                pair(stride, "stride"),
                pair(padding, "padding"),
                pair(output_padding, "output_padding"),
                pair(dilation, "dilation"),
                groups,
                residual,
                activation,
                negative_slope,
            )
            if y is not None:
                return y
        if factors is None:
            y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
        else:
            steps, pads = pair(stride, "stride"), pair(padding, "padding")
            extra = pair(output_padding, "output_padding")
            check_conv_transpose2d(input, weight, bias, steps, pads, extra, 1, (1, 1))
            y = upsample_separable(input, factors, steps, pads, extra, bias)
        if activation is not None or scale is not None or shift is not None or residual is not None:
            check_epilogue(y.shape, input.device, scale, shift, residual)
            y = apply_epilogue(y, scale, shift, residual, activation, negative_slope)
        return y
    if dtype is not None:
        input, weight = input.to(dtype), cast(weight, dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    output_padding = pair(output_padding, "output_padding")
    return forward(
        input,
        weight,
        bias,
        scale,
        shift,
        residual,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        activation,
        negative_slope,
    )
