"""The registered operators of depthwise convolution and their autograd: see `Convolution`."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._convolution import Convolution, convolution_flops
from .._epilogue import keeps_output
from .._geometry import missing_output_padding
from .._layout import channels_innermost, fit_vectors, output_format
from .._operands import empty, kernel_output, load_kernels
from .._operator import Differentiable, Operator, needs_autograd
from .geometry import check_depthwise


def taps_major(weight: Tensor) -> Tensor:
    """[C, 1, KH, KW] with its channels side by side in memory: itself if it is so, else a small copy."""
    if weight.stride(0) == 1 or weight.shape[0] == 1:
        return weight
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


class _DepthwiseConv2d(Convolution):
    """Weights are [C * multiplier, 1, kH, kW] of any strides; how many groups, the input's channels say."""

    name = "depthwise_conv2d"
    operands = ("bias", "scale", "shift")
    options = geometry = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
    sizes = ("channels", "height", "width")
    multiplies_matrices = False
    check = staticmethod(partial(check_depthwise, "depthwise_conv2d"))
    fit_weight = fit_weight_to_gradient = staticmethod(lambda weight: weight)

    def launch(self, *args):
        tensors, options = args[:6], args[6:]
        return load_kernels().depthwise_conv2d_forward(*tensors, None, *options)

    def new_weight(self, weight, allocate=empty):
        return torch.empty_like(weight)

    def in_weights_format(self, gradient, weight):
        return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)

    def input_shape(self, grad, weight, channels, height, width, *geometry):
        return (grad.shape[0], channels, height, width)

    def aten(self, input, weight, bias, *options):
        return F.conv2d(input, weight, bias, *options, input.shape[1])

    def aten_grad_input(self, grad, weight, shape, stride, padding, dilation):
        sizes = (shape[2:], grad.shape[2:], weight.shape[2:])
        extra = missing_output_padding(*sizes, stride, padding, dilation)
        return F.conv_transpose2d(grad, weight, None, stride, padding, extra, shape[1], dilation)

    def aten_grad_weight(self, grad, input, weight, *geometry):
        return super().aten_grad_weight(grad, input, weight, *geometry, input.shape[1])


DEPTHWISE_CONV2D = _DepthwiseConv2d()


def statistics_of(y: Tensor) -> Tensor:
    """[N, 2, C] fp32 (fp64 of fp64): sum and sum of squares of [N, C, H, W] over each image's pixels."""
    y = y if y.dtype == torch.float64 else y.float()
    return torch.stack([y.sum((2, 3)), y.square().sum((2, 3))], 1)


def _statistics_fake(*args):
    y = DEPTHWISE_CONV2D.empty(*args)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y, torch.empty((y.shape[0], 2, y.shape[1]), dtype=dtype, device=y.device)


def _statistics_kernels(*args):
    (input, weight, *vectors), options = args[:5], args[5:]
    shape, memory_format = DEPTHWISE_CONV2D.result_shape(*args), output_format(input, weight)
    statistics = torch.empty((shape[0], 2, shape[1]), dtype=torch.float32, device=input.device)
    if input.numel() == 0:
        return empty(shape, input, memory_format), statistics.zero_()
    out = kernel_output(shape, input, memory_format)
    fitted = (channels_innermost(input), weight, *fit_vectors(*vectors))
    load_kernels().depthwise_conv2d_forward(*fitted, out, statistics, *options)
    return out.contiguous(memory_format=memory_format), statistics


def _statistics_reference(*args):
    y = DEPTHWISE_CONV2D.operator.reference(*args)
    return y, statistics_of(y)


# Second result: [N, 2, C] fp32, sum and sum of squares of the result over each image's pixels.
STATISTICS = Operator(
    f"depthwise_conv2d_statistics({DEPTHWISE_CONV2D.arguments}) -> (Tensor, Tensor)",
    kernels=_statistics_kernels,
    reference=_statistics_reference,
    fake=_statistics_fake,
    per_sample=(0,),
    flops=lambda input, weight, *_, out_shape, **__: convolution_flops(out_shape[0], weight),
)


class _Statistics(Differentiable):
    @staticmethod
    def forward(*args):
        return STATISTICS(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5], output[0])

    @staticmethod
    def backward(ctx, grad, grad_statistics):
        *tensors, output = ctx.saved_tensors
        # Of the sum a one, of the sum of squares 2 y, for each pixel.
        to_sum, to_squares = grad_statistics.unbind(1)
        grad = grad + (to_sum[..., None, None] + 2 * to_squares[..., None, None] * output).to(grad.dtype)
        kept = output if keeps_output(*ctx.options[-2:]) else None
        grads = DEPTHWISE_CONV2D.backward(grad, kept, tensors, ctx.options, ctx.needs_input_grad)
        return (*grads, *[None] * len(ctx.options))


def forward_with_statistics(*args) -> tuple[Tensor, Tensor]:
    """The result and its statistics [N, 2, C], through autograd where it is needed."""
    return _Statistics.call(*args) if needs_autograd(*args[:5]) else STATISTICS(*args)
