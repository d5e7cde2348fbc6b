"""Separable convolution in one operator: depthwise, then 1x1 across channels; the result between is not kept.

Its backward computes the depthwise result again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._epilogue import apply_epilogue, check_epilogue, epilogue_backward, keeps_output
from .._geometry import output_size
from .._layout import channels_innermost, in_format, output_format
from .._operands import empty, kernel_output, load_kernels
from .._operator import Differentiable, Operator, needs_autograd
from .autograd import depthwise_backward
from .autograd import forward as depthwise
from .geometry import check_depthwise, check_pointwise
from .operators import taps_major

NAME = "separable_conv2d"


def result_shape(
    input, depthwise_weight, depthwise_bias, depthwise_scale, depthwise_shift, weight, bias, scale, shift,
    residual, stride, padding, dilation,
):  # fmt: skip
    """The result's shape. Raises torch's kind of error, naming the argument, where there is none."""
    between = check_depthwise(NAME, input, depthwise_weight, depthwise_bias, stride, padding, dilation)
    check_epilogue(between, input.device, depthwise_scale, depthwise_shift, None)
    check_pointwise(NAME, between[1], input, weight, bias)
    shape = (between[0], weight.shape[0], *between[2:])
    check_epilogue(shape, input.device, scale, shift, residual)
    return shape


def _format(input: Tensor, depthwise_weight: Tensor, weight: Tensor) -> torch.memory_format:
    """What two convolutions one after the other return: channels_last if any of the three is."""
    if output_format(input, depthwise_weight) == torch.channels_last:
        return torch.channels_last
    return output_format(input, weight)


def _fake(*args):
    return empty(result_shape(*args[:-3]), args[0], _format(args[0], args[1], args[5]))


def _kernels(*args):
    kernels = load_kernels()
    *tensors, stride, padding, dilation, depthwise_activation, activation, negative_slope = args
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    input, weight = tensors[0], tensors[5]
    options = (stride, padding, dilation, depthwise_activation, activation, negative_slope)
    key = (
        NAME,
        kernels.layout_key(*tensors),
        input.device,
        options,
        kernels.dot_precision(input.dtype),
    )
    ready = kernels.recall(key)
    if ready is not None:
        # Seen before, found valid, and nothing had to be copied: allocate and launch.
        shape, memory_format, launch = ready
        out = empty(shape, input, memory_format)
        launch(*tensors, out)
        return out
    shape = result_shape(*tensors, stride, padding, dilation)
    memory_format = _format(input, tensors[1], weight)
    if input.numel() == 0 or weight.numel() == 0:
        return empty(shape, input, memory_format)
    out = kernel_output(shape, input, memory_format)
    fitted = (
        channels_innermost(input),
        taps_major(tensors[1]),
        *[None if vector is None else vector.contiguous() for vector in tensors[2:5]],
        weight.contiguous(),
        *[None if vector is None else vector.contiguous() for vector in tensors[6:9]],
        None if tensors[9] is None else channels_innermost(tensors[9]),
    )
    launch = kernels.separable_conv2d_forward(*fitted, out, *options)
    result = out.contiguous(memory_format=memory_format)
    if result is out and all(a is b for a, b in zip(fitted, tensors, strict=True)):
        kernels.remember(key, (shape, memory_format, launch))
    return result


def _reference(
    input, depthwise_weight, depthwise_bias, depthwise_scale, depthwise_shift, weight, bias, scale, shift,
    residual, stride, padding, dilation, depthwise_activation, activation, negative_slope,
):  # fmt: skip
    result_shape(
        input, depthwise_weight, depthwise_bias, depthwise_scale, depthwise_shift, weight, bias, scale, shift,
        residual, stride, padding, dilation,
    )  # fmt: skip
    between = F.conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation, input.shape[1])
    between = apply_epilogue(
        between, depthwise_scale, depthwise_shift, None, depthwise_activation, negative_slope
    )
    y = apply_epilogue(F.conv2d(between, weight, bias), scale, shift, residual, activation, negative_slope)
    return in_format(y, _format(input, depthwise_weight, weight))


def _flops(input, depthwise_weight, db, ds, dt, weight, b, s, t, r, stride, padding, dilation, *_, **__):
    height, width = output_size(*input[2:], depthwise_weight[2:], stride, padding, dilation)
    taps = depthwise_weight[2] * depthwise_weight[3]
    return 2 * input[0] * height * width * depthwise_weight[0] * (taps + weight[0])


SEPARABLE = Operator(
    "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, "
    "Tensor? depthwise_scale, Tensor? depthwise_shift, Tensor weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str? depthwise_activation, str? activation, float negative_slope) -> Tensor",
    kernels=_kernels,
    reference=_reference,
    fake=_fake,
    per_sample=(0, 9),
    flops=_flops,
)


class _Separable(Differentiable):
    @staticmethod
    def forward(*args):
        return SEPARABLE(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, stride, padding, dilation, depthwise_activation, activation, negative_slope = inputs
        ctx.geometry = (stride, padding, dilation)
        ctx.activations = (depthwise_activation, activation, negative_slope)
        kept = output if keeps_output(activation, negative_slope) else None
        ctx.save_for_backward(*tensors, kept)

    @staticmethod
    def backward(ctx, grad):
        # The operands have their dtype: an autocast around the backward must not touch the products.
        with torch.autocast(grad.device.type, enabled=False):
            return _Separable._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        *first, weight, bias, scale, shift, residual, output = ctx.saved_tensors
        depthwise_activation, activation, negative_slope = ctx.activations
        needs = ctx.needs_input_grad
        computed = []

        def between() -> Tensor:
            # Again, once, if anything asks for it.
            if not computed:
                computed.append(depthwise(*first, *ctx.geometry, depthwise_activation, negative_slope))
            return computed[0]

        def recompute(bias, scale, shift, residual):
            return apply_epilogue(F.conv2d(between(), weight, bias), scale, shift, residual, None, 0.0)

        grads = epilogue_backward(
            grad, output, recompute, bias, scale, shift, residual, activation, negative_slope, needs[6:10]
        )
        grad_weight = None
        if needs[5]:
            grad_weight = _pixels(grads.conv).T @ _pixels(between())
            grad_weight = grad_weight.view(weight.shape)
        firsts = (None,) * 5
        if any(needs[:5]):
            grad_between = F.conv2d(grads.conv, weight.transpose(0, 1))
            kept = between() if keeps_output(depthwise_activation, negative_slope) else None
            firsts = depthwise_backward(
                grad_between, kept, *first, ctx.geometry, depthwise_activation, negative_slope, needs
            )
        rest = (grads.bias, grads.scale, grads.shift, grads.residual)
        return (*firsts, grad_weight, *rest, *[None] * 6)


def _pixels(t: Tensor) -> Tensor:
    """[N, C, H, W] as the matrix [N * H * W, C]: a view where it is channels_last."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def separable(*args) -> Tensor:
    """The operator, through autograd where it is needed."""
    return _Separable.call(*args) if needs_autograd(*args[:10]) else SEPARABLE(*args)
