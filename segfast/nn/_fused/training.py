"""Convolution, batch norm and activation in training: of them, one image is kept for the backward pass."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._batch_norm import Norm, batch_norm_act, can_train
from ...ops._epilogue import ACTIVATIONS
from ...ops._kept import hooks_of_others, keeping_less
from .._activation import activation_name
from .._rules import own_class
from .eager import global_hooks, only_forward
from .folding import runs_eagerly
from .separable import is_convolution


def trains(norm: Any) -> bool:
    """True if `norm` is a batch norm, torch's own, whose statistics are now the batch's."""
    known = isinstance(norm, nn.Module) and own_class(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return known and (norm.training or (norm.running_mean is None and norm.running_var is None))


def may_train() -> bool:
    """True if gradients are wanted, by nobody but autograd, and nobody else says what is kept for them."""
    return (
        torch.is_grad_enabled()
        and runs_eagerly()
        and torch.autograd.forward_ad._current_level < 0
        and not global_hooks()
        and not hooks_of_others()
    )


def call_keeping_less(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, in which nothing keeps a result of a norm, or activation, that can be made again."""
    if torch.compiler.is_compiling() or not may_train():
        return function(*args)
    with keeping_less():
        return function(*args)


def train_layers(layers: Iterable[nn.Module], input: Any) -> Tensor | None:
    """The layers one after the other, each batch norm in training as one with the activation after it.

    None if there is no such norm after a convolution among them, or somebody looks in between.
    """
    layers = list(_flat(layers))
    norms = [trains(norm) and is_convolution(conv) for conv, norm in itertools.pairwise(layers)]
    if not any(norms) or not may_train() or not all([only_forward(layer) for layer in layers]):
        return None
    position = 0
    while position < len(layers):
        conv, *rest = layers[position : position + 3]
        if position >= len(norms) or not norms[position]:
            input, position = _result(conv, input), position + 1
            continue
        activation = activation_name(rest[1]) if len(rest) > 1 else None
        input = train(conv, rest[0], input, *(activation or (None,)))
        position += 2 if activation is None else 3
    return input


def _flat(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers, those in an `nn.Sequential` that nobody watches one by one."""
    for layer in layers:
        if own_class(layer) is nn.Sequential and only_forward(layer):
            yield from _flat(layer.children())
        elif type(layer) is not nn.Identity:
            yield layer


def train(
    conv: nn.Module,
    norm: Any,
    input: Any,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(conv(input)) + residual), of a norm that `trains` where `may_train`."""
    with keeping_less():
        y = _result(conv, input)
    if _fits(norm, y, residual) and can_train(activation, negative_slope, residual):
        return batch_norm_act(y, _begun(norm), residual, activation, negative_slope)
    y = _result(norm, y)
    return ACTIVATIONS[activation](y if residual is None else y + residual, negative_slope)


def _result(layer: nn.Module, input: Any) -> Tensor:
    """The layer's result by its class's own forward: a sequence would begin anew with its first layer."""
    return own_class(layer).forward(layer, input)


def _fits(norm: Any, y: Tensor, residual: Tensor | None) -> bool:
    if y.dim() != 4 or not y.is_floating_point() or type(y) is not Tensor:
        return False
    if not y.numel() and _group(norm) is None:  # a rank without images takes part in the others' statistics
        return False
    tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    dtypes = {t.dtype for t in tensors if t is not None} or {y.dtype}
    # Parameters of 16 bits would round the statistics.
    same = dtypes == {y.dtype} if y.dtype.itemsize > 2 else dtypes == {torch.float32}
    alike = residual is None or (residual.shape, residual.dtype) == (y.shape, y.dtype)
    return same and alike and (y.is_cpu or (y.is_cuda and _group(norm) is None))


def _group(norm: Any) -> Any:
    """The processes that share a norm's statistics, or None."""
    distributed = torch.distributed
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = distributed.group.WORLD if norm.process_group is None else norm.process_group
    return group if distributed.get_world_size(group) > 1 else None


def _begun(norm: Any) -> Norm:
    """`norm` at the beginning of a step, which it counts."""
    running = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if running and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = (norm.running_mean, norm.running_var) if running else (None, None)
    return Norm(norm.weight, norm.bias, mean, var, momentum, norm.eps, _group(norm))
