"""Separable convolution in one operator: depthwise, then 1x1 across channels; the result between is not kept.

Its backward computes the depthwise result again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._convolution import convolution_flops
from .._epilogue import apply_epilogue, check_epilogue, epilogue_backward, keeps_output
from .._layout import channels_innermost, fit_epilogue, fit_vectors, in_format, output_format
from .._operands import empty, load_kernels
from .._operator import Differentiable, Operator, launch_again, launch_first, needs_autograd
from .geometry import check_depthwise, check_pointwise
from .operators import DEPTHWISE_CONV2D, taps_major

NAME = "separable_conv2d"


def result_shape(*args) -> tuple[int, ...]:
    """The result's shape. Raises torch's kind of error, naming the argument, where there is none."""
    input, depthwise_weight, depthwise_bias, inner_scale, inner_shift, weight, bias, *epilogue = args[:10]
    between = check_depthwise(NAME, input, depthwise_weight, depthwise_bias, *args[10:13])
    check_epilogue(between, input.device, inner_scale, inner_shift, None)
    check_pointwise(NAME, between[1], input, weight, bias)
    shape = (between[0], weight.shape[0], *between[2:])
    scale, shift, residual = epilogue
    check_epilogue(shape, input.device, scale, shift, residual)
    return shape


def _format(input: Tensor, depthwise_weight: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of two convolutions one after the other: channels_last if any of the three is."""
    if output_format(input, depthwise_weight) == torch.channels_last:
        return torch.channels_last
    return output_format(input, weight)


def _fake(*args):
    return empty(result_shape(*args), args[0], _format(args[0], args[1], args[5]))


def _kernels(*args):
    kernels = load_kernels()
    tensors, options = args[:10], args[10:]
    input, depthwise_weight, weight = args[0], args[1], args[5]
    precision = kernels.dot_precision(input.dtype)
    key = (NAME, kernels.layout_key(*tensors), input.device, options, precision)
    result = launch_again(key, tensors)
    if result is not None:
        return result
    shape = result_shape(*args)
    fitted = (
        channels_innermost(input),
        taps_major(depthwise_weight),
        *fit_vectors(*tensors[2:5]),
        weight.contiguous(),
        *fit_epilogue(*tensors[6:]),
    )
    return launch_first(
        key,
        shape,
        _format(input, depthwise_weight, weight),
        tensors,
        fitted,
        lambda out: kernels.separable_conv2d_forward(*fitted, out, *options),
    )


def _reference(*args):
    result_shape(*args)
    input, depthwise_weight, depthwise_bias, *first, weight, bias, scale, shift, residual = args[:10]
    *geometry, depthwise_activation, activation, slope = args[10:]
    between = F.conv2d(input, depthwise_weight, depthwise_bias, *geometry, input.shape[1])
    between = apply_epilogue(between, *first, None, depthwise_activation, slope)
    y = apply_epilogue(F.conv2d(between, weight, bias), scale, shift, residual, activation, slope)
    return in_format(y, _format(input, depthwise_weight, weight))


SEPARABLE = Operator(
    "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, "
    "Tensor? depthwise_scale, Tensor? depthwise_shift, Tensor weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str? depthwise_activation, str? activation, float negative_slope) -> Tensor",
    kernels=_kernels,
    reference=_reference,
    fake=_fake,
    per_sample=(0, 9),
    flops=lambda input, first, b, s, t, second, *_, out_shape, **__: (
        convolution_flops(out_shape, first) + convolution_flops(out_shape, second)
    ),
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
        options = (*ctx.geometry, depthwise_activation, negative_slope)
        computed = []

        def between() -> Tensor:
            # Again, once, if anything asks for it.
            if not computed:
                computed.append(DEPTHWISE_CONV2D.forward(*first, *options))
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
            firsts = DEPTHWISE_CONV2D.backward(grad_between, kept, first, options, needs)
        rest = (grads.bias, grads.scale, grads.shift, grads.residual)
        return (*firsts, grad_weight, *rest, *[None] * 6)


def _pixels(t: Tensor) -> Tensor:
    """[N, C, H, W] as the matrix [N * H * W, C]: a view where it is channels_last."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def separable(*args) -> Tensor:
    """The operator, through autograd where it is needed."""
    return _Separable.call(*args) if needs_autograd(*args[:10]) else SEPARABLE(*args)
