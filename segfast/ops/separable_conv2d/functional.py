"""Depthwise and separable convolution with fused epilogues, on our kernels or ATen: the functions."""

import torch
from torch import Tensor

from .._aten_only import certainly_aten
from .._backend import get_backend, use_triton
from .._choice import is_listening
from .._cpu import conv2d
from .._epilogue import check_activation, check_epilogue
from .._geometry import resolve_padding
from .._gpu import can_use_triton, choose
from .._operands import Pair, pair
from .._operator import autocast_dtype, cast_operands
from .._prepared_weights import cast
from .fused import NAME, result_shape, separable
from .geometry import check_depthwise, check_pointwise
from .operators import DEPTHWISE_CONV2D, forward_with_statistics, statistics_of

OPERATIONS = (
    "depthwise_conv2d_forward",
    "depthwise_conv2d_grad_input",
    "depthwise_conv2d_grad_weight",
    "separable_conv2d_forward",
)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    return_statistics: bool = False,
):
    """Depthwise convolution, one filter (or several) a channel, with a fused epilogue.

    `act(scale * (conv(input, weight) + bias) + shift)`, in one pass on our kernels; the first six arguments
    are those of `torch.nn.functional.conv2d` with `groups=input.shape[1]`.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16 or float32 on our kernels, any dtype on ATen.
        weight: [C * multiplier, 1, kH, kW]. Loaded fastest on our kernels if its first dimension has stride 1
            (`segfast.optimize` lays it out so on a GPU).
        bias: [C * multiplier].
        padding: an int, a pair, "valid" or "same".
        scale, shift: [C * multiplier], for instance a folded batch norm; evaluated in float32.
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.
        return_statistics: also sum the result, and its squares, over each image's pixels: what
            squeeze-and-excitation, image pooling, instance and group norm need, without another pass.

    Returns:
        [N, C * multiplier, H_out, W_out], H_out = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1;
        channels_last if the input or the weight is. With `return_statistics`, (that, sum, sum of squares),
        the sums [N, C * multiplier] in float32, differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that do not go together.
        ValueError: an unknown activation.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Sifre, "Rigid-motion scattering for image classification" (2014), section 6.2.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3)
        >>> segfast.functional.depthwise_conv2d(x, w, stride=2, padding=1, activation="relu6").shape
        torch.Size([1, 8, 5, 5])
    """
    if input.dim() == 3:
        result = depthwise_conv2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, scale=scale, shift=shift,
            activation=activation, negative_slope=negative_slope, return_statistics=return_statistics,
        )  # fmt: skip
        return tuple(t.squeeze(0) for t in result) if return_statistics else result.squeeze(0)
    check_activation(activation)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    dtype = autocast_dtype(input)
    input, padding = resolve_padding("depthwise_conv2d", input, weight, stride, padding, dilation)
    name, chosen, asks = "depthwise_conv2d", None, _well_formed(input, weight)
    if input.is_cuda and asks:
        operands = (bias, scale, shift)
        given = [t is not None for t in operands]
        options = (stride, padding, dilation, *given, activation, return_statistics)
        differentiates = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        chosen = choose(name, (input,), (weight,), options, differentiates, dtype, operands=operands)
    geometry, ending = (stride, padding, dilation), (scale, shift, activation, negative_slope)
    if asks and use_triton(name, can_use_triton, input, weight, dtype, name, chosen):
        if dtype is not None:
            input, bias = cast_operands(dtype, input, bias)
            weight = cast(weight, dtype)
        args = (input, weight, bias, scale, shift, *geometry, activation, negative_slope)
        if not return_statistics:
            return DEPTHWISE_CONV2D.forward(*args)
        y, statistics = forward_with_statistics(*args)
    else:
        y = _depthwise_aten(name, input, weight, bias, *geometry, *ending)
        if not return_statistics:
            return y
        statistics = statistics_of(y)
    return y, statistics[:, 0], statistics[:, 1]


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    *,
    depthwise_scale: Tensor | None = None,
    depthwise_shift: Tensor | None = None,
    depthwise_activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Depthwise-separable convolution, depthwise then 1x1 across channels, with both epilogues fused.

    `act(scale * (conv1x1(between) + bias) + shift + residual)` with
    `between = act'(depthwise_scale * (depthwise(input) + depthwise_bias) + depthwise_shift)`. On our kernels
    `between` is not written to memory where one kernel is chosen for both, and never kept for the backward,
    which computes it again.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16 or float32 on our kernels, any dtype on ATen.
        depthwise_weight: [C * multiplier, 1, kH, kW]; depthwise_bias, depthwise_scale, depthwise_shift:
            [C * multiplier].
        pointwise_weight: [C_out, C * multiplier, 1, 1]; bias, scale, shift: [C_out].
        stride, padding, dilation: the depthwise convolution's; padding may be "valid" or "same".
        residual: the output's shape, added before the activation.
        depthwise_activation, activation: as in `depthwise_conv2d`.
        negative_slope: leaky_relu's, of both.

    Returns:
        [N, C_out, H_out, W_out], sizes as in `depthwise_conv2d`; channels_last if the input or a weight is.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that do not go together.
        ValueError: an unknown activation.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Chollet, "Xception" (2017); Sandler et al., "MobileNetV2" (2018).

    Example:
        >>> import torch, segfast
        >>> x, dw, pw = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> segfast.functional.separable_conv2d(x, dw, pw, padding="same", activation="relu").shape
        torch.Size([1, 16, 9, 9])
    """
    first = (depthwise_bias, depthwise_scale, depthwise_shift)
    second = (bias, scale, shift, residual)
    check_activation(depthwise_activation)
    check_activation(activation)
    weights, geometry = (depthwise_weight, pointwise_weight), (stride, padding, dilation)
    ending = (depthwise_activation, activation, negative_slope)
    if input.dim() != 3:
        return _separable(input, weights, first, second, geometry, ending)
    if residual is not None:
        second = (bias, scale, shift, residual.unsqueeze(0))
    return _separable(input.unsqueeze(0), weights, first, second, geometry, ending).squeeze(0)


def _separable(input, weights, first, second, geometry, ending) -> Tensor:
    """The result for a batch; `first`, `second`: bias, scale, shift and residual of either convolution."""
    stride, dilation = pair(geometry[0], "stride"), pair(geometry[2], "dilation")
    depthwise_weight, pointwise_weight = weights
    dtype = autocast_dtype(input)
    input, padding = resolve_padding(NAME, input, depthwise_weight, stride, geometry[1], dilation)
    geometry = (stride, padding, dilation)
    chosen, asks = None, _well_formed(input, depthwise_weight)
    if input.is_cuda and asks:
        given = [[t is not None for t in each] for each in (first, second)]
        options = (*geometry, *given[0], ending[0], *given[1], ending[1])
        differentiates = torch.is_grad_enabled() and any([t.requires_grad for t in (input, *weights)])
        operands = (*first, *second)
        chosen = choose(NAME, (input,), weights, options, differentiates, dtype, operands=operands)
    if asks and use_triton(NAME, can_use_triton, input, depthwise_weight, dtype, NAME, chosen):
        if dtype is not None:
            depthwise_weight, pointwise_weight = [cast(t, dtype) for t in weights]
            input, depthwise_bias = cast_operands(dtype, input, first[0])
            bias, residual = cast_operands(dtype, second[0], second[3])
            first, second = (depthwise_bias, *first[1:]), (bias, *second[1:3], residual)
        return separable(input, depthwise_weight, *first, pointwise_weight, *second, *geometry, *ending)
    by_parts = input.is_cuda and get_backend() == "auto" and not certainly_aten(input)
    if dtype is None and not torch.compiler.is_compiling() and (by_parts or is_listening()):
        # What is wrong is told before the first of both convolutions is measured, or runs.
        result_shape(input, depthwise_weight, *first, pointwise_weight, *second, *geometry)
    if by_parts:
        return _by_parts(input, weights, first, second, geometry, ending)
    depthwise_activation, activation, slope = ending
    bias, scale, shift = first
    options = (*geometry, scale, shift, depthwise_activation, slope)
    between = _depthwise_aten(NAME, input, depthwise_weight, bias, *options)
    bias, scale, shift, residual = second
    if dtype is None:
        check_pointwise(NAME, between.shape[1], between, pointwise_weight, bias)
    shape = (between.shape[0], pointwise_weight.shape[0], *between.shape[2:])
    check_epilogue(shape, input.device, scale, shift, residual)
    plain = ((1, 1), (0, 0), (1, 1), 1)
    return conv2d(between, pointwise_weight, bias, *plain, scale, shift, residual, activation, slope)


def _by_parts(input, weights, first, second, geometry, ending) -> Tensor:
    """Each convolution by what was chosen for it."""
    from ..conv2d.functional import conv2d as any_conv2d  # which imports this module

    depthwise_activation, activation, slope = ending
    bias, scale, shift = first
    options = {"scale": scale, "shift": shift, "activation": depthwise_activation, "negative_slope": slope}
    between = depthwise_conv2d(input, weights[0], bias, *geometry, **options)
    bias, scale, shift, residual = second
    options = {"scale": scale, "shift": shift, "activation": activation, "negative_slope": slope}
    return any_conv2d(between, weights[1], bias, residual=residual, **options)


def _well_formed(input: Tensor, weight: Tensor) -> bool:
    """True if the arguments suffice to choose a backend; else torch's error, or ours, says what is wrong."""
    return input.dim() == 4 and weight.dim() == 4


def _depthwise_aten(
    name, input, weight, bias, stride, padding, dilation, scale, shift, activation, negative_slope
) -> Tensor:
    groups = input.shape[1] if input.dim() == 4 else 0
    filters = weight.shape[0]
    wrong = groups == 0 or weight.dim() != 4 or weight.shape[1] != 1 or filters == 0 or filters % groups
    # A bias that only broadcasts would fit what is done with it here.
    if wrong or (bias is not None and bias.shape != (filters,)):
        check_depthwise(name, input, weight, bias, stride, padding, dilation)  # raises
    if scale is not None or shift is not None:
        check_epilogue((input.shape[0], filters, 1, 1), input.device, scale, shift, None)
    return conv2d(
        input, weight, bias, stride, padding, dilation, groups, scale, shift, None, activation, negative_slope
    )
