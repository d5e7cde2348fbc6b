"""What a convolution and the layers after it come to on a CPU, kept while nothing about them changes.

Working out the operands and the choice takes Python as long as a small layer takes to compute. Here it is
done once for a shape; a call then only makes sure that everything is as it was.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import _cpu
from ...ops._choice import can_choose, settled
from ...ops._operator import autocast_dtype
from .eager import folds_filters, global_hooks, only_forward
from .folding import folded_filter, folds


class Stage:
    """A convolution with the norm and activation after it, as `Ready` is made of."""

    __slots__ = ("activation", "conv", "norm")

    def __init__(self, conv: Any, norm: Any, activation: str | None):
        self.conv, self.norm, self.activation = conv, norm, activation


class Ready:
    """The calls of some stages for one kind of input, and all that they depend on."""

    __slots__ = ("_modules", "_owned", "_slope", "_steps", "output")

    def __init__(self, stages: Sequence[Stage], input: Tensor, residual: bool, slope: float):
        modules = _modules(stages)
        # Weakly: what is kept must not keep the model, nor what stood in for its parameters in one call.
        self._modules = [(weakref.ref(module), _settings(module)) for module in modules]
        self._slope = slope
        self._owned = [
            (where, key, _weakly(tensor), -1 if tensor is None else tensor._version, _address(tensor))
            for module in modules
            for where in (module._parameters, module._buffers)
            for key, tensor in where.items()
        ]
        self._steps: list[Any] | None = self._bound(stages, input, residual)
        self.output = self._steps[-1][0].output() if self._steps else None

    def _bound(self, stages: Sequence[Stage], input: Tensor, residual: bool) -> list[Any] | None:
        steps = []
        shape, channels_last = input.shape, input.is_contiguous(memory_format=torch.channels_last)
        for stage in stages:
            conv = stage.conv
            plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            if not plain or (stage.norm is not None and not folds_filters(input, conv)):
                return None
            weight, bias = folded_filter(conv, stage.norm)
            last = stage is stages[-1]
            step = _cpu.bound_conv2d(
                autocast_dtype(input) or input.dtype,
                shape,
                channels_last,
                weight,
                bias,
                (conv.stride, conv.padding, conv.dilation, conv.groups),
                residual and last,
                stage.activation,
            )
            if step is None:
                return None
            steps.append(step)
            shape, channels_last = torch.Size(step[0].output()), True
        return steps

    def stands(self, stages: Sequence[Stage]) -> bool:
        """Whether nothing about these stages, of which this was made, has changed."""
        modules = _modules(stages)
        return (
            not global_hooks()
            and len(modules) == len(self._modules)
            and all(
                [
                    made() is module and only_forward(module) and _settings(module) == settings
                    for module, (made, settings) in zip(modules, self._modules, strict=True)
                ]
            )
            and all([_is_the_same(where.get(key), *kept) for where, key, *kept in self._owned])
        )

    def possible(self) -> bool:
        """Whether the layers can run so; else it is only known that they cannot."""
        return self._steps is not None

    def run(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The layers' result; `residual` is added before the last activation."""
        assert self._steps is not None
        *first, (call, candidate, prepared, bias) = self._steps
        for earlier, before, ready, term in first:
            input = before.run(earlier, _in_dtype(input, earlier.dtype), ready, term, None, self._slope)
        residual = None if residual is None else _in_dtype(residual, call.dtype)
        return candidate.run(call, _in_dtype(input, call.dtype), prepared, bias, residual, self._slope)


def _settings(module: Any) -> tuple:
    if isinstance(module, nn.Conv2d):
        return (module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return (module.eps, module.training)


def _modules(stages: Sequence[Stage]) -> list[nn.Module]:
    return [m for stage in stages for m in (stage.conv, stage.norm) if m is not None]


def _weakly(tensor: Tensor | None) -> Any:
    return None if tensor is None else weakref.ref(tensor)


def _is_the_same(tensor: Tensor | None, kept: Any, version: int, address: int) -> bool:
    if tensor is None or kept is None:
        return tensor is kept
    return kept() is tensor and tensor._version == version and tensor.data_ptr() == address


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kind(input: Tensor, residual: bool) -> tuple:
    return (
        input.shape,
        input.dtype,
        input.is_contiguous(memory_format=torch.channels_last),
        residual,
        autocast_dtype(input),
        torch.get_num_threads(),
        settled(),
    )


# Of each first convolution, by its id, what was made of it, by what is computed of what. Beside the modules:
# no part of their state_dict, of copies, of pickles.
_made: dict[int, dict[tuple, Ready]] = {}
_MOST_KINDS = 8  # of inputs, for each convolution


def ready(stages: Sequence[Stage], input: Any, residual: Tensor | None, slope: float) -> Ready | None:
    """What computes these stages of `input`, or None where the layers are to be asked one by one."""
    eager = type(input) is Tensor and not torch.is_grad_enabled() and can_choose(input, residual)
    if not eager or settled() is None:
        return None
    conv = stages[0].conv
    what = [(id(stage.conv), id(stage.norm), stage.activation) for stage in stages]
    key = (*what, slope, *_kind(input, residual is not None))
    kinds = _made.get(id(conv))
    found = None if kinds is None else kinds.get(key)
    if found is None or not found.stands(stages):
        found = _make(stages, input, residual is not None, slope, key)
    if found is None or not found.possible():
        return None
    return found if residual is None or residual.shape == found.output else None


def _make(stages: Sequence[Stage], input: Tensor, residual: bool, slope: float, key: tuple) -> Ready | None:
    conv = stages[0].conv
    modules = _modules(stages)
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    fit = (
        input.dim() == 4
        and all([folds(stage.norm) and "weight" in stage.conv._parameters for stage in stages])
        and not any([t.is_inference() for t in tensors])
        and not global_hooks()
        and all([only_forward(m) for m in modules])
    )
    if not fit:
        return None
    if id(conv) not in _made:
        weakref.finalize(conv, _made.pop, id(conv), None)
        _made[id(conv)] = {}
    kinds = _made[id(conv)]
    if key not in kinds and len(kinds) >= _MOST_KINDS:
        kinds.clear()
    kinds[key] = Ready(stages, input, residual, slope)
    return kinds[key]


def forget_ready(model: nn.Module) -> None:
    """Drop what was made of the convolutions in `model`."""
    for module in model.modules():
        if id(module) in _made:
            _made[id(module)].clear()
