"""The three registered operators of conv2d: shapes, kernels, and the same in ATen."""

import torch
import torch.nn.functional as F

from .._epilogue import apply_epilogue, check_epilogue
from .._geometry import output_size
from .._layout import channels_innermost, in_format, output_format, packed_weight, row_weight
from .._operands import empty, kernel_output, load_kernels
from .._operator import Operator
from .geometry import check_conv2d


def _result_shape(input, weight, bias, scale, shift, residual, stride, padding, dilation, groups):
    shape = check_conv2d(input, weight, bias, stride, padding, dilation, groups)
    check_epilogue(shape, input.device, scale, shift, residual)
    return shape


def _forward_fake(input, weight, *rest):
    return empty(_result_shape(input, weight, *rest[:-2]), input, output_format(input, weight))


def _forward_kernels(
    input, weight, bias, scale, shift, residual, stride, padding, dilation, groups, activation, negative_slope
):  # fmt: skip
    kernels = load_kernels()
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    tensors = (input, weight, bias, scale, shift, residual)
    options = (stride, padding, dilation, groups, activation, negative_slope)
    key = ("conv2d", kernels.layout_key(*tensors), input.device, options, kernels.dot_precision(input.dtype))
    ready = kernels.recall(key)
    if ready is not None:
        # Seen before, found valid, and nothing had to be copied: allocate and launch.
        shape, memory_format, launch = ready
        out = empty(shape, input, memory_format)
        launch((input,), weight, bias, scale, shift, residual, out)
        return out
    shape = _result_shape(*tensors, stride, padding, dilation, groups)
    memory_format = output_format(input, weight)
    out = kernel_output(shape, input, memory_format)
    if out.numel() == 0:
        return out.contiguous(memory_format=memory_format)
    fitted = (
        channels_innermost(input),
        row_weight(weight),
        *[None if vector is None else vector.contiguous() for vector in (bias, scale, shift)],
        None if residual is None else channels_innermost(residual),
    )
    launch = kernels.conv2d_forward((fitted[0],), *fitted[1:], out, *options)
    result = out.contiguous(memory_format=memory_format)
    if result is out and all([a is b for a, b in zip(fitted, tensors, strict=True)]):
        kernels.remember(key, (shape, memory_format, launch))
    return result


def _forward_reference(
    input, weight, bias, scale, shift, residual, stride, padding, dilation, groups, activation, negative_slope
):  # fmt: skip
    _result_shape(input, weight, bias, scale, shift, residual, stride, padding, dilation, groups)
    # Nothing written over, no size asked: this is also the decomposition that a tracer records.
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = apply_epilogue(y, scale, shift, residual, activation, negative_slope)
    return in_format(y, output_format(input, weight))


def _grad_input_fake(grad, weight, height, width, stride, padding, dilation, groups):
    return empty((grad.shape[0], weight.shape[1] * groups, height, width), grad, output_format(grad, weight))


def _grad_input_kernels(grad, weight, height, width, stride, padding, dilation, groups):
    memory_format = output_format(grad, weight)
    out = kernel_output((grad.shape[0], weight.shape[1] * groups, height, width), grad, memory_format)
    if out.numel() == 0:
        return out.contiguous(memory_format=memory_format)
    load_kernels().conv2d_grad_input(
        channels_innermost(grad),
        packed_weight(weight),
        out,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    return out.contiguous(memory_format=memory_format)


def _backward(grad, input, weight, stride, padding, dilation, groups, mask):
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
    )


def _grad_input_reference(grad, weight, height, width, stride, padding, dilation, groups):
    input = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, height, width)
    result, _, _ = _backward(grad, input, weight, stride, padding, dilation, groups, (True, False, False))
    return in_format(result, output_format(grad, weight))


def _grad_weight_fake(grad, input, weight, stride, padding, dilation, groups):
    return empty(weight.shape, weight, output_format(weight, weight))


def _grad_weight_kernels(grad, input, weight, stride, padding, dilation, groups):
    memory_format = output_format(weight, weight)
    out = kernel_output(weight.shape, weight, memory_format)
    load_kernels().conv2d_grad_weight(
        channels_innermost(input),
        channels_innermost(grad),
        out,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    # In the weight's own format: what AccumulateGrad and DDP expect of a gradient.
    return out.contiguous(memory_format=memory_format)


def _grad_weight_reference(grad, input, weight, stride, padding, dilation, groups):
    _, result, _ = _backward(grad, input, weight, stride, padding, dilation, groups, (False, True, False))
    return in_format(result, output_format(weight, weight))


def multiply_add_flops(batch: int, size, weight_shape) -> int:
    """Of a convolution with a result of `size`."""
    filters, per_group, kernel_h, kernel_w = weight_shape
    return 2 * batch * size[0] * size[1] * filters * per_group * kernel_h * kernel_w


def _forward_flops(input, weight, bias, scale, shift, residual, stride, padding, dilation, *_, **__) -> int:
    size = output_size(input[2], input[3], weight[2:], stride, padding, dilation)
    return multiply_add_flops(input[0], size, weight)


_OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
FORWARD = Operator(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    + _OPTIONS
    + ", str? activation, float negative_slope) -> Tensor",
    kernels=_forward_kernels,
    reference=_forward_reference,
    fake=_forward_fake,
    per_sample=(0, 5),
    flops=_forward_flops,
)
GRAD_INPUT = Operator(
    "conv2d_grad_input(Tensor grad, Tensor weight, SymInt height, SymInt width, " + _OPTIONS + ") -> Tensor",
    kernels=_grad_input_kernels,
    reference=_grad_input_reference,
    fake=_grad_input_fake,
    per_sample=(0,),
    flops=lambda grad, weight, *_, **__: multiply_add_flops(grad[0], grad[2:], weight),
)
GRAD_WEIGHT = Operator(
    "conv2d_grad_weight(Tensor grad, Tensor input, Tensor weight, " + _OPTIONS + ") -> Tensor",
    kernels=_grad_weight_kernels,
    reference=_grad_weight_reference,
    fake=_grad_weight_fake,
    flops=lambda grad, input, weight, *_, **__: multiply_add_flops(grad[0], grad[2:], weight),
)
