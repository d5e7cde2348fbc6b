"""Transposed convolution: `torch.nn.functional.conv_transpose2d` with a fused epilogue, on our kernels or ATen."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import kernel_reason_not, measured_reason_not, use_triton
from ._bilinear import channelwise_factors, upsample_separable
from ._epilogue import apply_epilogue, check_activation, check_epilogue, epilogue_backward, keeps_output
from ._layout import channels_innermost, dense, output_format, packed_weight
from ._registry import Differentiable, Operator, autocast_dtype, needs_autograd

Pair = tuple[int, int]


def pair(value: Any, name: str) -> Pair:
    """An int or a sequence of one or two ints as a pair."""
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, int):
        return (value, value)
    values = tuple(value)
    if len(values) == 1:
        return values * 2
    if len(values) != 2:
        raise RuntimeError(f"{name} must be an int or two ints, got {value!r}")
    return values


def output_size(input, weight, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair) -> Pair:
    """Height and width of the result."""
    height, width = input.shape[-2:]
    kernel_h, kernel_w = weight.shape[-2:]
    return (
        (height - 1) * stride[0] - 2 * padding[0] + dilation[0] * (kernel_h - 1) + output_padding[0] + 1,
        (width - 1) * stride[1] - 2 * padding[1] + dilation[1] * (kernel_w - 1) + output_padding[1] + 1,
    )


def check_conv_transpose2d(
    input, weight, bias, stride: Pair, padding: Pair, output_padding: Pair, groups: int, dilation: Pair,
    autocast: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Raise torch's kind of error, naming the argument, for what the kernels would be launched wrongly on."""
    if weight.dim() != 4:
        raise RuntimeError(f"conv_transpose2d: weight must be 4-D [C_in, C_out/groups, kH, kW], got {list(weight.shape)}")
    if input.dim() != 4:
        raise RuntimeError(
            f"conv_transpose2d: input must be 3-D [C_in, H, W] or 4-D [N, C_in, H, W], got {list(input.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(
            f"conv_transpose2d: groups must be positive and divide weight's {weight.shape[0]} input channels, got {groups}"
        )
    if input.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"conv_transpose2d: given weight of size {list(weight.shape)}, expected input{list(input.shape)} to have "
            f"{weight.shape[0]} channels, but got {input.shape[1]} channels instead"
        )
    if autocast is None and (weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)):
        raise RuntimeError(
            f"conv_transpose2d: input, weight and bias must have the same dtype, got {input.dtype}, {weight.dtype}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        raise RuntimeError(
            f"conv_transpose2d: input, weight and bias must be on the same device, got {input.device}, {weight.device}"
            + ("" if bias is None else f" and {bias.device}")
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[1] * groups,):
        raise RuntimeError(
            f"conv_transpose2d: bias must have shape [{weight.shape[1] * groups}] (output channels), got {list(bias.shape)}"
        )
    if min(stride) < 1:
        raise RuntimeError(f"conv_transpose2d: stride must be positive, got {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"conv_transpose2d: dilation must be positive, got {dilation}")
    if min(padding) < 0:
        raise RuntimeError(f"conv_transpose2d: padding must not be negative, got {padding}")
    if min(output_padding) < 0 or any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise RuntimeError(
            "conv_transpose2d: output padding must be smaller than either stride or dilation, but got output_padding "
            f"{output_padding}, stride {stride}, dilation {dilation}"
        )
    size = output_size(input, weight, stride, padding, output_padding, dilation)
    if min(size) < 1:
        raise RuntimeError(
            f"conv_transpose2d: calculated output size {size[0]}x{size[1]} is too small, for input {list(input.shape)}, "
            f"kernel {list(weight.shape[2:])}, stride {stride}, padding {padding}, dilation {dilation}"
        )


# --- the three operators -----------------------------------------------------------------------------------------------


def _kernels():
    from segfast import kernels

    return kernels


def _empty(shape, like: Tensor, memory_format=torch.channels_last) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _forward_fake(input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation, *_):
    size = output_size(input, weight, stride, padding, output_padding, dilation)
    return _empty((input.shape[0], weight.shape[1] * groups, *size), input, output_format(input, weight))


def _forward_kernels(input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation,
                     activation, negative_slope):  # fmt: skip
    size = output_size(input, weight, stride, padding, output_padding, dilation)
    out = _empty((input.shape[0], weight.shape[1] * groups, *size), input)
    _kernels().conv_transpose2d_forward(
        channels_innermost(input), packed_weight(weight), dense(bias), dense(scale), dense(shift),
        None if residual is None else channels_innermost(residual), None, out,
        tuple(stride), tuple(padding), tuple(dilation), groups, (0, 0), activation, negative_slope,
    )  # fmt: skip
    return out.contiguous(memory_format=output_format(input, weight))


def _forward_reference(input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation,
                       activation, negative_slope):  # fmt: skip
    conv = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    y = apply_epilogue(conv, scale, shift, residual, activation, negative_slope)
    return y.contiguous(memory_format=output_format(input, weight))


def _grad_input_fake(grad, weight, height, width, stride, padding, groups, dilation):
    return _empty((grad.shape[0], weight.shape[0], height, width), grad, output_format(grad, weight))


def _grad_input_kernels(grad, weight, height, width, stride, padding, groups, dilation):
    out = _empty((grad.shape[0], weight.shape[0], height, width), grad)
    _kernels().conv_transpose2d_grad_input(
        channels_innermost(grad), packed_weight(weight), out, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    return out.contiguous(memory_format=output_format(grad, weight))


def _grad_input_reference(grad, weight, height, width, stride, padding, groups, dilation):
    # The output's size names the input's only up to the stride: what conv2d returns beyond it is cut off.
    full = F.conv2d(grad, weight, None, stride, padding, dilation, groups)[:, :, :height, :width]
    return full.contiguous(memory_format=output_format(grad, weight))


def _grad_weight_fake(grad, input, weight, stride, padding, groups, dilation):
    return _empty(weight.shape, weight, output_format(weight, weight))


def _grad_weight_kernels(grad, input, weight, stride, padding, groups, dilation):
    out = _empty(weight.shape, weight)
    _kernels().conv_transpose2d_grad_weight(
        channels_innermost(input), channels_innermost(grad), out, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    # In the weight's own format: what AccumulateGrad and DDP expect of a gradient.
    return out.contiguous(memory_format=output_format(weight, weight))


def _grad_weight_reference(grad, input, weight, stride, padding, groups, dilation):
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, True, _output_padding(grad, input, weight, stride, padding,
        dilation), groups, (False, True, False))  # fmt: skip
    return grad_weight.contiguous(memory_format=output_format(weight, weight))


def _output_padding(grad, input, weight, stride, padding, dilation) -> Pair:
    least = output_size(input, weight, stride, padding, (0, 0), dilation)
    return (grad.shape[2] - least[0], grad.shape[3] - least[1])


def _flops(input_shape, weight_shape) -> int:
    batch, _, height, width = input_shape
    channels_in, channels_out, kernel_h, kernel_w = weight_shape
    return 2 * batch * height * width * channels_in * channels_out * kernel_h * kernel_w


_OPTIONS = "SymInt[2] stride, SymInt[2] padding, {}SymInt groups, SymInt[2] dilation"
FORWARD = Operator(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    + _OPTIONS.format("SymInt[2] output_padding, ") + ", str? activation, float negative_slope) -> Tensor",
    kernels=_forward_kernels, reference=_forward_reference, fake=_forward_fake, per_sample=(0, 5),
    flops=lambda input, weight, *_, **__: _flops(input, weight),
)  # fmt: skip
GRAD_INPUT = Operator(
    "conv_transpose2d_grad_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
    + _OPTIONS.format("") + ") -> Tensor",
    kernels=_grad_input_kernels, reference=_grad_input_reference, fake=_grad_input_fake, per_sample=(0,),
    flops=lambda grad, weight, height, width, *_, **__: _flops((grad[0], 0, height, width), weight),
)  # fmt: skip
GRAD_WEIGHT = Operator(
    "conv_transpose2d_grad_weight(Tensor grad, Tensor input, Tensor weight, " + _OPTIONS.format("") + ") -> Tensor",
    kernels=_grad_weight_kernels, reference=_grad_weight_reference, fake=_grad_weight_fake,
    flops=lambda grad, input, weight, *_, **__: _flops(input, weight),
)  # fmt: skip


# --- autograd: three bilinear maps, each other's gradients ---------------------------------------------------------------


class _Forward(Differentiable):
    @staticmethod
    def forward(*args):
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, scale, shift, residual, *ctx.options = inputs
        kept = output if keeps_output(*ctx.options[5:]) else None
        ctx.save_for_backward(input, weight, bias, scale, shift, residual, kept)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, scale, shift, residual, output = ctx.saved_tensors
        stride, padding, output_padding, groups, dilation, activation, negative_slope = ctx.options

        def recompute(*epilogue):
            return forward(input, weight, *epilogue, stride, padding, output_padding, groups, dilation, None, 0.0)

        needs = ctx.needs_input_grad
        grads = epilogue_backward(
            grad, output, recompute, bias, scale, shift, residual, activation, negative_slope, needs[2:6]
        )
        geometry = (stride, padding, groups, dilation)
        grad_input = grad_weight = None
        if needs[0]:
            grad_input = grad_of_input(grads.conv, weight, *input.shape[2:], *geometry)
        if needs[1]:
            grad_weight = grad_of_weight(grads.conv, input, weight, *geometry)
        return (grad_input, grad_weight, *grads[1:], None, None, None, None, None, None, None)


class _GradInput(Differentiable):
    @staticmethod
    def forward(*args):
        return GRAD_INPUT(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weight, _, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx, grad_grad):
        grad, weight = ctx.saved_tensors
        stride, padding, groups, dilation = ctx.geometry
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            extra = _output_padding(grad, grad_grad, weight, stride, padding, dilation)
            to_grad = plain_forward(grad_grad, weight, stride, padding, extra, groups, dilation)
        if ctx.needs_input_grad[1]:
            to_weight = grad_of_weight(grad, grad_grad, weight, *ctx.geometry)
        return (to_grad, to_weight, None, None, None, None, None, None)


class _GradWeight(Differentiable):
    @staticmethod
    def forward(*args):
        return GRAD_WEIGHT(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx, grad_grad):
        grad, input = ctx.saved_tensors
        stride, padding, groups, dilation = ctx.geometry
        to_grad = to_input = None
        if ctx.needs_input_grad[0]:
            extra = _output_padding(grad, input, grad_grad, stride, padding, dilation)
            to_grad = plain_forward(input, grad_grad, stride, padding, extra, groups, dilation)
        if ctx.needs_input_grad[1]:
            to_input = grad_of_input(grad, grad_grad, *input.shape[2:], *ctx.geometry)
        return (to_grad, to_input, None, None, None, None, None)


def forward(input, weight, bias, scale, shift, residual, *options) -> Tensor:
    """The operator, through autograd where it is needed."""
    if needs_autograd(input, weight, bias, scale, shift, residual):
        return _Forward.call(input, weight, bias, scale, shift, residual, *options)
    return FORWARD(input, weight, bias, scale, shift, residual, *options)


def plain_forward(input, weight, stride, padding, output_padding, groups, dilation) -> Tensor:
    """The transposed convolution alone."""
    return forward(input, weight, None, None, None, None, stride, padding, output_padding, groups, dilation, None, 0.0)


def grad_of_input(grad, weight, height, width, *geometry) -> Tensor:
    """Gradient of the input, differentiable."""
    args = (grad, weight, height, width, *geometry)
    return _GradInput.call(*args) if needs_autograd(grad, weight) else GRAD_INPUT(*args)


def grad_of_weight(grad, input, weight, *geometry) -> Tensor:
    """Gradient of the weight, differentiable; `weight` gives the shape and the memory format only."""
    args = (grad, input, weight.detach(), *geometry)
    return _GradWeight.call(*args) if needs_autograd(grad, input) else GRAD_WEIGHT(*args)


# --- the functional ------------------------------------------------------------------------------------------------------

OPERATIONS = ("conv_transpose2d_forward", "conv_transpose2d_grad_input", "conv_transpose2d_grad_weight")


def can_use_triton(choice: str, input: Tensor, weight: Tensor, dtype: torch.dtype | None, groups: int, differentiates: bool):
    """None if our kernels serve the call, else why not. `dtype` is autocast's, or None."""
    reason = kernel_reason_not(choice, input, dtype)
    if reason is None and (input.numel() == 0 or weight.numel() == 0):
        reason = "a tensor is empty"
    if reason is not None or choice == "triton":
        return reason
    needed = OPERATIONS if differentiates else OPERATIONS[:1]
    batch, channels_in, height, width = input.shape
    kernel_h, kernel_w = weight.shape[2:]
    return measured_reason_not(
        needed, dtype or input.dtype, input.device, channels_in, weight.shape[1] * groups, kernel_h * kernel_w, groups,
        batch * height * width,
    )  # fmt: skip


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
    """Transposed convolution with a fused epilogue: `act(scale * (convT(input, weight) + bias) + shift + residual)`.

    The first eight arguments are `torch.nn.functional.conv_transpose2d`'s.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; float16, bfloat16 or float32 on our kernels, any dtype on ATen.
        weight: [C_in, C_out/groups, kH, kW]. Free of a copy on our kernels if channels_last.
        bias: [C_out].
        scale, shift: [C_out], for instance a folded batch norm; evaluated in float32.
        residual: the output's shape, added before the activation.
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish" or
            "hardsigmoid".
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
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation, scale=scale, shift=shift,
            residual=None if residual is None else residual.unsqueeze(0), activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
        return result.squeeze(0)
    check_activation(activation)
    dtype = autocast_dtype(input)
    differentiates = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    fused = activation is not None or scale is not None or shift is not None or residual is not None
    if not use_triton("conv_transpose2d", can_use_triton, input, weight, dtype, groups, differentiates):
        factors = channelwise_factors(input, weight, stride, groups, dilation)
        if factors is None:
            y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
        else:
            y = upsample_separable(input, factors, stride, padding, output_padding, bias)
        if fused:
            check_epilogue(y.shape[1], y.shape, scale, shift, residual)
            y = apply_epilogue(y, scale, shift, residual, activation, negative_slope)
        return y
    if dtype is not None:
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    output_padding = pair(output_padding, "output_padding")
    check_conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if fused:
        size = output_size(input, weight, stride, padding, output_padding, dilation)
        channels = weight.shape[1] * groups
        check_epilogue(channels, (input.shape[0], channels, *size), scale, shift, residual)
    return forward(
        input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation, activation,
        negative_slope,
    )  # fmt: skip
