"""Autograd of conv2d: three bilinear maps, each the gradient of another."""

from torch import Tensor

from .._epilogue import epilogue_backward, keeps_output
from .._operator import Differentiable, needs_autograd
from .operators import FORWARD, GRAD_INPUT, GRAD_WEIGHT


class _Forward(Differentiable):
    @staticmethod
    def forward(*args):
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, scale, shift, residual, *ctx.options = inputs
        kept = output if keeps_output(*ctx.options[4:]) else None
        ctx.save_for_backward(input, weight, bias, scale, shift, residual, kept)

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, scale, shift, residual, output = ctx.saved_tensors
        *geometry, activation, negative_slope = ctx.options

        def recompute(*epilogue):
            return forward(input, weight, *epilogue, *geometry, None, 0.0)

        needs = ctx.needs_input_grad
        grads = epilogue_backward(
            grad, output, recompute, bias, scale, shift, residual, activation, negative_slope, needs[2:6]
        )
        grad_input = grad_weight = None
        if needs[0]:
            grad_input = grad_of_input(grads.conv, weight, *input.shape[2:], *geometry)
        if needs[1]:
            grad_weight = grad_of_weight(grads.conv, input, weight, *geometry)
        return (grad_input, grad_weight, *grads[1:], None, None, None, None, None, None)


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
            to_input = grad_of_input(grad, grad_grad, *input.shape[2:], *ctx.geometry)
        return (to_grad, to_input, None, None, None, None, None)


def forward(input, weight, bias, scale, shift, residual, *options) -> Tensor:
    """The operator, through autograd where it is needed."""
    if needs_autograd(input, weight, bias, scale, shift, residual):
        return _Forward.call(input, weight, bias, scale, shift, residual, *options)
    return FORWARD(input, weight, bias, scale, shift, residual, *options)


def plain_forward(input, weight, *geometry) -> Tensor:
    """The convolution alone."""
    return forward(input, weight, None, None, None, None, *geometry, None, 0.0)


def grad_of_input(grad, weight, height, width, *geometry) -> Tensor:
    """Gradient of the input, differentiable."""
    args = (grad, weight, height, width, *geometry)
    return _GradInput.call(*args) if needs_autograd(grad, weight) else GRAD_INPUT(*args)


def grad_of_weight(grad, input, weight, *geometry) -> Tensor:
    """Gradient of the weight, differentiable; `weight` gives the shape and the memory format only."""
    args = (grad, input, weight.detach(), *geometry)
    return _GradWeight.call(*args) if needs_autograd(grad, input) else GRAD_WEIGHT(*args)
