"""The three registered operators of transposed convolution: checks, shapes, kernels, and the same in ATen."""

import torch
import torch.nn.functional as F

from .._epilogue import apply_epilogue, check_epilogue
from .._layout import channels_innermost, fit_layout, in_format, output_format, packed_weight
from .._operands import Pair, empty, kernel_output, load_kernels
from .._operator import Operator


def output_size(input, weight, stride: Pair, padding: Pair, output_padding: Pair, dilation: Pair) -> Pair:
    """Height and width of the result."""
    height, width = input.shape[-2:]
    kernel_h, kernel_w = weight.shape[-2:]
    return (
        (height - 1) * stride[0] - 2 * padding[0] + dilation[0] * (kernel_h - 1) + output_padding[0] + 1,
        (width - 1) * stride[1] - 2 * padding[1] + dilation[1] * (kernel_w - 1) + output_padding[1] + 1,
    )


def check_conv_transpose2d(
    input, weight, bias, stride: Pair, padding: Pair, output_padding: Pair, groups: int, dilation: Pair
) -> None:
    """Raise torch's kind of error, naming the argument, for what the kernels would be launched wrongly on."""
    if weight.dim() != 4:
        raise RuntimeError(
            f"conv_transpose2d: weight must be 4-D [C_in, C_out/groups, kH, kW], got {list(weight.shape)}"
        )
    if input.dim() != 4:
        raise RuntimeError(
            f"conv_transpose2d: input must be [C_in, H, W] or [N, C_in, H, W], got {list(input.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(
            f"conv_transpose2d: groups must be positive and divide weight's {weight.shape[0]} channels, "
            f"got {groups}"
        )
    if input.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"conv_transpose2d: given weight of size {list(weight.shape)}, expected input{list(input.shape)} "
            f"to have {weight.shape[0]} channels, but got {input.shape[1]} channels instead"
        )
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        raise RuntimeError(
            f"conv_transpose2d: input, weight and bias must share a dtype, got {input.dtype}, {weight.dtype}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        raise RuntimeError(
            f"conv_transpose2d: input, weight and bias must share a device: {input.device}, {weight.device}"
            + ("" if bias is None else f" and {bias.device}")
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[1] * groups,):
        raise RuntimeError(
            f"conv_transpose2d: bias must have shape [{weight.shape[1] * groups}] (output channels), "
            f"got {list(bias.shape)}"
        )
    if min(stride) < 1:
        raise RuntimeError(f"conv_transpose2d: stride must be positive, got {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"conv_transpose2d: dilation must be positive, got {dilation}")
    if min(padding) < 0:
        raise RuntimeError(f"conv_transpose2d: padding must not be negative, got {padding}")
    if min(output_padding) < 0 or any(
        o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)
    ):
        raise RuntimeError(
            "conv_transpose2d: output padding must be smaller than either stride or dilation, but got "
            f"output_padding {output_padding}, stride {stride}, dilation {dilation}"
        )
    size = output_size(input, weight, stride, padding, output_padding, dilation)
    if size[0] < 1 or size[1] < 1:  # not min(): under torch.compile that asks which side is the longer
        raise RuntimeError(
            f"conv_transpose2d: calculated output size {size[0]}x{size[1]} is too small, for input "
            f"{list(input.shape)}, kernel {list(weight.shape[2:])}, stride {stride}, padding {padding}, "
            f"dilation {dilation}"
        )


def _result_shape(
    input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation
):
    check_conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    size = output_size(input, weight, stride, padding, output_padding, dilation)
    shape = (input.shape[0], weight.shape[1] * groups, *size)
    check_epilogue(shape, input.device, scale, shift, residual)
    return shape


def _forward_fake(input, weight, *rest):
    return empty(_result_shape(input, weight, *rest[:-2]), input, output_format(input, weight))


def _forward_kernels(
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
):
    kernels = load_kernels()
    stride, padding, output_padding, dilation = (
        tuple(stride),
        tuple(padding),
        tuple(output_padding),
        tuple(dilation),
    )
    tensors = (input, weight, bias, scale, shift, residual)
    key = (
        "conv_transpose2d",
        kernels.layout_key(*tensors),
        input.device,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        activation,
        negative_slope,
        kernels.dot_precision(input.dtype),
    )
    ready = kernels.recall(key)
    if ready is not None:
        # Seen before, found valid, and nothing had to be copied: allocate and launch.
        shape, memory_format, launch = ready
        out = empty(shape, input, memory_format)
        launch(input, weight, bias, scale, shift, residual, None, out)
        return out
    shape = _result_shape(*tensors, stride, padding, output_padding, groups, dilation)
    memory_format = output_format(input, weight)
    out = kernel_output(shape, input, memory_format)
    fitted = fit_layout(input, weight, bias, scale, shift, residual)
    launch = kernels.conv_transpose2d_forward(
        *fitted, None, out, stride, padding, dilation, groups, (0, 0), activation, negative_slope
    )
    result = out.contiguous(memory_format=memory_format)
    if result is out and all(a is b for a, b in zip(fitted, tensors, strict=True)):
        kernels.remember(key, (shape, memory_format, launch))
    return result


def _forward_reference(
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
):
    _result_shape(
        input, weight, bias, scale, shift, residual, stride, padding, output_padding, groups, dilation
    )
    conv = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    y = apply_epilogue(conv, scale, shift, residual, activation, negative_slope)
    return in_format(y, output_format(input, weight))


def _grad_input_fake(grad, weight, height, width, stride, padding, groups, dilation):
    return empty((grad.shape[0], weight.shape[0], height, width), grad, output_format(grad, weight))


def _grad_input_kernels(grad, weight, height, width, stride, padding, groups, dilation):
    memory_format = output_format(grad, weight)
    out = kernel_output((grad.shape[0], weight.shape[0], height, width), grad, memory_format)
    load_kernels().conv_transpose2d_grad_input(
        channels_innermost(grad),
        packed_weight(weight),
        out,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    return out.contiguous(memory_format=memory_format)


def _grad_input_reference(grad, weight, height, width, stride, padding, groups, dilation):
    # The output's size names the input's only up to the stride: what conv2d returns beyond it is cut off.
    full = F.conv2d(grad, weight, None, stride, padding, dilation, groups)[:, :, :height, :width]
    return in_format(full, output_format(grad, weight))


def _grad_weight_fake(grad, input, weight, stride, padding, groups, dilation):
    return empty(weight.shape, weight, output_format(weight, weight))


def _grad_weight_kernels(grad, input, weight, stride, padding, groups, dilation):
    memory_format = output_format(weight, weight)
    out = kernel_output(weight.shape, weight, memory_format)
    load_kernels().conv_transpose2d_grad_weight(
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


def _grad_weight_reference(grad, input, weight, stride, padding, groups, dilation):
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        True,
        missing_output_padding(grad, input, weight, stride, padding, dilation),
        groups,
        (False, True, False),
    )
    return in_format(grad_weight, output_format(weight, weight))


def missing_output_padding(grad, input, weight, stride, padding, dilation) -> Pair:
    least = output_size(input, weight, stride, padding, (0, 0), dilation)
    return (grad.shape[2] - least[0], grad.shape[3] - least[1])


def multiply_add_flops(input_shape, weight_shape) -> int:
    batch, _, height, width = input_shape
    channels_in, channels_out, kernel_h, kernel_w = weight_shape
    return 2 * batch * height * width * channels_in * channels_out * kernel_h * kernel_w


_OPTIONS = "SymInt[2] stride, SymInt[2] padding, {}SymInt groups, SymInt[2] dilation"
FORWARD = Operator(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? residual, "
    + _OPTIONS.format("SymInt[2] output_padding, ")
    + ", str? activation, float negative_slope) -> Tensor",
    kernels=_forward_kernels,
    reference=_forward_reference,
    fake=_forward_fake,
    per_sample=(0, 5),
    flops=lambda input, weight, *_, **__: multiply_add_flops(input, weight),
)
GRAD_INPUT = Operator(
    "conv_transpose2d_grad_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
    + _OPTIONS.format("")
    + ") -> Tensor",
    kernels=_grad_input_kernels,
    reference=_grad_input_reference,
    fake=_grad_input_fake,
    per_sample=(0,),
    flops=lambda grad, weight, height, width, *_, **__: multiply_add_flops(
        (grad[0], 0, height, width), weight
    ),
)
GRAD_WEIGHT = Operator(
    "conv_transpose2d_grad_weight(Tensor grad, Tensor input, Tensor weight, "
    + _OPTIONS.format("")
    + ") -> Tensor",
    kernels=_grad_weight_kernels,
    reference=_grad_weight_reference,
    fake=_grad_weight_fake,
    flops=lambda grad, input, weight, *_, **__: multiply_add_flops(input, weight),
)
