"""Autograd of packed pooling, which keeps the places and nothing else. Each is linear: so are derivatives.

`on_aten` says that torch's functions run in place of our operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._operator import Differentiable, is_traced, needs_autograd
from . import formulas
from .operators import POOL, UNPOOL, UNPOOL_BACKWARD


class _Pool(Differentiable):
    @staticmethod
    def forward(input, ceil_mode, on_aten):
        return (formulas.pool if on_aten else POOL)(input, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, ctx.on_aten = inputs
        ctx.size = tuple(input.shape[2:])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        (places,) = ctx.saved_tensors
        return unpool(grad, places, ctx.size, ctx.on_aten), None, None


class _Unpool(Differentiable):
    @staticmethod
    def forward(input, places, size, on_aten):
        return (formulas.unpool if on_aten else UNPOOL)(input, places, size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, places, _, ctx.on_aten = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return _unpool_backward(grad, places, ctx.on_aten), None, None, None


class _UnpoolBackward(Differentiable):
    @staticmethod
    def forward(grad, places, on_aten):
        return (formulas.unpool_backward if on_aten else UNPOOL_BACKWARD)(grad, places)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, places, ctx.on_aten = inputs
        ctx.size = tuple(grad.shape[2:])
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return unpool(grad, places, ctx.size, ctx.on_aten), None, None


def _shows_aten(on_aten: bool) -> bool:
    """True if torch's own functions are to be differentiated: where somebody looks at them one by one."""
    return on_aten and (is_traced() or torch.autograd.forward_ad._current_level >= 0)


def _run(function: type[Differentiable], operator: Any, formula: Any, on_aten: bool, *args: Any) -> Any:
    if _shows_aten(on_aten):
        return formula(*args)
    if needs_autograd(args[0]):
        return function.call(*args, on_aten)
    return (formula if on_aten else operator)(*args)


def pool(input: Tensor, ceil_mode: bool, on_aten: bool) -> tuple[Tensor, Tensor]:
    """The largest of each 2x2, and their places."""
    return _run(_Pool, POOL, formulas.pool, on_aten, input, ceil_mode)


def unpool(input: Tensor, places: Tensor, size: Sequence[int], on_aten: bool) -> Tensor:
    """`input` at its places, zero elsewhere."""
    return _run(_Unpool, UNPOOL, formulas.unpool, on_aten, input, places, size)


def _unpool_backward(grad: Tensor, places: Tensor, on_aten: bool) -> Tensor:
    return _run(_UnpoolBackward, UNPOOL_BACKWARD, formulas.unpool_backward, on_aten, grad, places)
