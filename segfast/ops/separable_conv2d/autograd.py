"""Autograd of depthwise convolution: three bilinear maps, each the gradient of another."""

from torch import Tensor

from .._epilogue import epilogue_backward, keeps_output
from .._operator import Differentiable, needs_autograd
from .operators import FORWARD, GRAD_INPUT, GRAD_WEIGHT, STATISTICS


class _Forward(Differentiable):
    @staticmethod
    def forward(*args):
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, stride, padding, dilation, activation, negative_slope = inputs
        ctx.options = ((stride, padding, dilation), activation, negative_slope)
        kept = output if keeps_output(activation, negative_slope) else None
        ctx.save_for_backward(*tensors, kept)

    @staticmethod
    def backward(ctx, grad):
        *tensors, output = ctx.saved_tensors
        grads = depthwise_backward(grad, output, *tensors, *ctx.options, ctx.needs_input_grad)
        return (*grads, None, None, None, None, None)


class _Statistics(Differentiable):
    @staticmethod
    def forward(*args):
        return STATISTICS(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, stride, padding, dilation, activation, negative_slope = inputs
        ctx.options = ((stride, padding, dilation), activation, negative_slope)
        ctx.save_for_backward(*tensors, output[0])

    @staticmethod
    def backward(ctx, grad, grad_statistics):
        *tensors, output = ctx.saved_tensors
        # Of the sum a one, of the sum of squares 2 y, for each pixel.
        to_sum, to_squares = grad_statistics.unbind(1)
        grad = grad + (to_sum[..., None, None] + 2 * to_squares[..., None, None] * output).to(grad.dtype)
        if not keeps_output(*ctx.options[1:]):
            output = None
        grads = depthwise_backward(grad, output, *tensors, *ctx.options, ctx.needs_input_grad)
        return (*grads, None, None, None, None, None)


class _GradInput(Differentiable):
    @staticmethod
    def forward(*args):
        return GRAD_INPUT(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weight, _, _, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx, grad_grad):
        grad, weight = ctx.saved_tensors
        to_grad = to_weight = None
        if ctx.needs_input_grad[0]:
            to_grad = plain_forward(grad_grad, weight, *ctx.geometry)
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
        to_grad = to_input = None
        if ctx.needs_input_grad[0]:
            to_grad = plain_forward(input, grad_grad, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            to_input = grad_of_input(grad, grad_grad, *input.shape[1:], *ctx.geometry)
        return (to_grad, to_input, None, None, None, None)


def depthwise_backward(
    grad, output, input, weight, bias, scale, shift, geometry, activation, negative_slope, needs
) -> tuple[Tensor | None, ...]:
    """Gradients of (input, weight, bias, scale, shift), those that `needs` asks for; differentiable.

    `output` is the layer's result where its activation's gradient follows from it, else None.
    """

    def recompute(bias, scale, shift, residual):
        return forward(input, weight, bias, scale, shift, *geometry, None, 0.0)

    grads = epilogue_backward(
        grad, output, recompute, bias, scale, shift, None, activation, negative_slope, (*needs[2:5], False)
    )
    grad_input = grad_weight = None
    if needs[0]:
        grad_input = grad_of_input(grads.conv, weight, *input.shape[1:], *geometry)
    if needs[1]:
        grad_weight = grad_of_weight(grads.conv, input, weight, *geometry)
    return grad_input, grad_weight, grads.bias, grads.scale, grads.shift


def forward(input, weight, bias, scale, shift, *options) -> Tensor:
    """The operator, through autograd where it is needed."""
    if needs_autograd(input, weight, bias, scale, shift):
        return _Forward.call(input, weight, bias, scale, shift, *options)
    return FORWARD(input, weight, bias, scale, shift, *options)


def forward_with_statistics(input, weight, bias, scale, shift, *options) -> tuple[Tensor, Tensor]:
    """The result and its statistics [N, 2, C], through autograd where it is needed."""
    if needs_autograd(input, weight, bias, scale, shift):
        return _Statistics.call(input, weight, bias, scale, shift, *options)
    return STATISTICS(input, weight, bias, scale, shift, *options)


def plain_forward(input, weight, stride, padding, dilation) -> Tensor:
    """The depthwise convolution alone."""
    return forward(input, weight, None, None, None, stride, padding, dilation, None, 0.0)


def grad_of_input(grad, weight, channels, height, width, *geometry) -> Tensor:
    """Gradient of the input [N, channels, height, width], differentiable."""
    args = (grad, weight, channels, height, width, *geometry)
    return _GradInput.call(*args) if needs_autograd(grad, weight) else GRAD_INPUT(*args)


def grad_of_weight(grad, input, weight, *geometry) -> Tensor:
    """Gradient of the weight, differentiable; `weight` gives the shape and the layout only."""
    args = (grad, input, weight.detach(), *geometry)
    return _GradWeight.call(*args) if needs_autograd(grad, input) else GRAD_WEIGHT(*args)
