"""The registered operators of depthwise convolution: shapes, kernels, and the same in ATen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._epilogue import apply_epilogue, check_epilogue
from .._geometry import output_size
from .._layout import channels_innermost, in_format, output_format
from .._operands import empty, kernel_output, load_kernels
from .._operator import Operator
from .geometry import check_depthwise


def taps_major(weight: Tensor) -> Tensor:
    """[C, 1, KH, KW] with its channels side by side in memory: itself if it is so, else a small copy."""
    if weight.stride(0) == 1 or weight.shape[0] == 1:
        return weight
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _result_shape(input, weight, bias, scale, shift, stride, padding, dilation):
    shape = check_depthwise("depthwise_conv2d", input, weight, bias, stride, padding, dilation)
    check_epilogue(shape, input.device, scale, shift, None)
    return shape


def _forward_fake(input, weight, *rest):
    return empty(_result_shape(input, weight, *rest[:-2]), input, output_format(input, weight))


def _forward_kernels(
    input, weight, bias, scale, shift, stride, padding, dilation, activation, negative_slope
):
    kernels = load_kernels()
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    tensors = (input, weight, bias, scale, shift)
    key = (
        "depthwise_conv2d",
        kernels.layout_key(*tensors),
        input.device,
        stride,
        padding,
        dilation,
        activation,
        negative_slope,
    )
    ready = kernels.recall(key)
    if ready is not None:
        # Seen before, found valid, and nothing had to be copied: allocate and launch.
        shape, memory_format, launch = ready
        out = empty(shape, input, memory_format)
        launch(input, weight, bias, scale, shift, out)
        return out
    shape = _result_shape(*tensors, stride, padding, dilation)
    memory_format = output_format(input, weight)
    if input.numel() == 0:
        return empty(shape, input, memory_format)
    out = kernel_output(shape, input, memory_format)
    fitted = _fitted(*tensors)
    launch = kernels.depthwise_conv2d_forward(
        *fitted, out, None, stride, padding, dilation, activation, negative_slope
    )
    result = out.contiguous(memory_format=memory_format)
    if result is out and all(a is b for a, b in zip(fitted, tensors, strict=True)):
        kernels.remember(key, (shape, memory_format, launch))
    return result


def _fitted(input, weight, bias, scale, shift) -> tuple[Tensor | None, ...]:
    """The operands as the kernels take them: themselves if they fit, else copies."""
    return (
        channels_innermost(input),
        weight,
        *[None if vector is None else vector.contiguous() for vector in (bias, scale, shift)],
    )


def _forward_reference(
    input, weight, bias, scale, shift, stride, padding, dilation, activation, negative_slope
):
    _result_shape(input, weight, bias, scale, shift, stride, padding, dilation)
    conv = F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])
    y = apply_epilogue(conv, scale, shift, None, activation, negative_slope)
    return in_format(y, output_format(input, weight))


def statistics_of(y: Tensor) -> Tensor:
    """[N, 2, C] fp32 (fp64 of fp64): sum and sum of squares of [N, C, H, W] over each image's pixels."""
    y = y if y.dtype == torch.float64 else y.float()
    return torch.stack([y.sum((2, 3)), y.square().sum((2, 3))], 1)


def _statistics_fake(input, weight, *rest):
    y = _forward_fake(input, weight, *rest)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return y, torch.empty((y.shape[0], 2, y.shape[1]), dtype=dtype, device=y.device)


def _statistics_kernels(
    input, weight, bias, scale, shift, stride, padding, dilation, activation, negative_slope
):
    kernels = load_kernels()
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    tensors = (input, weight, bias, scale, shift)
    shape = _result_shape(*tensors, stride, padding, dilation)
    memory_format = output_format(input, weight)
    statistics = torch.empty((shape[0], 2, shape[1]), dtype=torch.float32, device=input.device)
    if input.numel() == 0:
        return empty(shape, input, memory_format), statistics.zero_()
    out = kernel_output(shape, input, memory_format)
    kernels.depthwise_conv2d_forward(
        *_fitted(*tensors), out, statistics, stride, padding, dilation, activation, negative_slope
    )
    return out.contiguous(memory_format=memory_format), statistics


def _statistics_reference(*args):
    y = _forward_reference(*args)
    return y, statistics_of(y)


def _grad_input_fake(grad, weight, channels, height, width, stride, padding, dilation):
    return empty((grad.shape[0], channels, height, width), grad, output_format(grad, weight))


def _grad_input_kernels(grad, weight, channels, height, width, stride, padding, dilation):
    memory_format = output_format(grad, weight)
    out = kernel_output((grad.shape[0], channels, height, width), grad, memory_format)
    if out.numel() > 0:
        load_kernels().depthwise_conv2d_grad_input(
            channels_innermost(grad), weight, out, tuple(stride), tuple(padding), tuple(dilation)
        )
    return out.contiguous(memory_format=memory_format)


def _grad_input_reference(grad, weight, channels, height, width, stride, padding, dilation):
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    extra = (height - least[0], width - least[1])
    full = F.conv_transpose2d(grad, weight, None, stride, padding, extra, channels, dilation)
    return in_format(full, output_format(grad, weight))


def _grad_weight_fake(grad, input, weight, stride, padding, dilation):
    # In the weight's own layout: what AccumulateGrad and DDP expect of a gradient.
    return torch.empty_like(weight)


def _grad_weight_kernels(grad, input, weight, stride, padding, dilation):
    out = torch.empty_like(weight)
    if input.numel() == 0:
        return out.zero_()
    load_kernels().depthwise_conv2d_grad_weight(
        channels_innermost(input),
        channels_innermost(grad),
        out,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
    )
    return out


def _grad_weight_reference(grad, input, weight, stride, padding, dilation):
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        input.shape[1],
        (False, True, False),
    )
    return torch.empty_like(weight).copy_(grad_weight)


def _flops(pixels: int, weight_shape) -> int:
    return 2 * pixels * weight_shape[0] * weight_shape[2] * weight_shape[3]


def _forward_flops(input, weight, bias, scale, shift, stride, padding, dilation, *_, **__):
    height, width = output_size(*input[2:], weight[2:], stride, padding, dilation)
    return _flops(input[0] * height * width, weight)


_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_OPERANDS = "(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, " + _GEOMETRY
FORWARD = Operator(
    "depthwise_conv2d" + _OPERANDS + ", str? activation, float negative_slope) -> Tensor",
    kernels=_forward_kernels,
    reference=_forward_reference,
    fake=_forward_fake,
    per_sample=(0,),
    flops=_forward_flops,
)
# Second result: [N, 2, C] fp32, sum and sum of squares of the result over each image's pixels.
STATISTICS = Operator(
    "depthwise_conv2d_statistics"
    + _OPERANDS
    + ", str? activation, float negative_slope) -> (Tensor, Tensor)",
    kernels=_statistics_kernels,
    reference=_statistics_reference,
    fake=_statistics_fake,
    per_sample=(0,),
    flops=_forward_flops,
)
GRAD_INPUT = Operator(
    "depthwise_conv2d_grad_input(Tensor grad, Tensor weight, SymInt channels, SymInt height, SymInt width, "
    + _GEOMETRY
    + ") -> Tensor",
    kernels=_grad_input_kernels,
    reference=_grad_input_reference,
    fake=_grad_input_fake,
    per_sample=(0,),
    flops=lambda grad, weight, *_, **__: _flops(grad[0] * grad[2] * grad[3], weight),
)
GRAD_WEIGHT = Operator(
    "depthwise_conv2d_grad_weight(Tensor grad, Tensor input, Tensor weight, " + _GEOMETRY + ") -> Tensor",
    kernels=_grad_weight_kernels,
    reference=_grad_weight_reference,
    fake=_grad_weight_fake,
    flops=lambda grad, input, weight, *_, **__: _flops(grad[0] * grad[2] * grad[3], weight),
)
