"""Autograd of the losses. The gradients are operators too, with derivatives in plain torch operations."""

from torch import Tensor

from .._operator import Differentiable, needs_autograd
from . import formulas
from .operators import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, DICE_SUMS, DICE_SUMS_BACKWARD


class _CrossEntropy(Differentiable):
    @staticmethod
    def forward(*args):
        return CROSS_ENTROPY(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options, ctx.per_pixel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, target, weight, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        args = (grad if ctx.per_pixel else grad[0], *ctx.saved_tensors, *ctx.options)
        differentiates = needs_autograd(args[0], args[1])
        gradient = _CrossEntropyGradient.call(*args) if differentiates else CROSS_ENTROPY_BACKWARD(*args)
        return (gradient, *[None] * 9)


class _CrossEntropyGradient(Differentiable):
    @staticmethod
    def forward(*args):
        return CROSS_ENTROPY_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, logits, target, weight, _, *ctx.options = inputs
        ctx.save_for_backward(grad, logits, target, weight)

    @staticmethod
    def backward(ctx, u):
        to_grad, to_logits = formulas.cross_entropy_second(u, *ctx.saved_tensors, *ctx.options)
        return (to_grad, to_logits, *[None] * 9)


class _DiceSums(Differentiable):
    @staticmethod
    def forward(*args):
        return DICE_SUMS(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, target, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        args = (grad, *ctx.saved_tensors, *ctx.options)
        differentiates = needs_autograd(args[0], args[1])
        gradient = _DiceSumsGradient.call(*args) if differentiates else DICE_SUMS_BACKWARD(*args)
        return (gradient, *[None] * 6)


class _DiceSumsGradient(Differentiable):
    @staticmethod
    def forward(*args):
        return DICE_SUMS_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, logits, target, _, *ctx.options = inputs
        ctx.save_for_backward(grad, logits, target)

    @staticmethod
    def backward(ctx, u):
        to_grad, to_logits = formulas.dice_second(u, *ctx.saved_tensors, *ctx.options)
        return (to_grad, to_logits, *[None] * 7)


def cross_entropy(logits: Tensor, *args) -> Tensor:
    """[N, OH, OW], the loss of each pixel, or [2], the sums of the losses and of the pixels' weights."""
    run = _CrossEntropy.call if needs_autograd(logits) else CROSS_ENTROPY
    return run(logits, *args)[0]


def dice_sums(logits: Tensor, *args) -> Tensor:
    """[3, C]: sums of the probability of the label where it is c, of the probability of c, of pixels."""
    run = _DiceSums.call if needs_autograd(logits) else DICE_SUMS
    return run(logits, *args)[0]
