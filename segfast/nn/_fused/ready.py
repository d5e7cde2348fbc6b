"""A convolution and the layers after it, prepared for a CPU and kept while nothing about them changes.

Working out the operands and the choice takes Python as long as a small layer takes to compute. Here it is
done once for a shape; a call then only makes sure that everything is as it was.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import _cpu
from ...ops._call import CANDIDATES, Call, Candidate
from ...ops._choice import ATEN, PLAIN, standing
from ...ops._epilogue import activate_
from ...ops._operator import autocast_dtype
from ...ops._prepared_weights import watch
from ...ops.conv_transpose2d.bilinear import channelwise_factors
from .eager import folds_filters, global_hooks, only_forward
from .folding import folded_filter, folds

# A convolution, the norm after it and the name of the activation after that; None for what it lacks.
Stage = tuple[Any, Any, str | None]

_CONV = operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_NORM = operator.attrgetter("eps", "training")


class Ready:
    """The calls of some stages for one kind of input, and all that they depend on."""

    __slots__ = ("_modules", "_owned", "_slope", "_steps", "key", "on_aten", "output")

    def __init__(self, stages: Sequence[Stage], input: Tensor, residual: bool, slope: float, key: tuple):
        modules = _modules(stages)
        self.key = key
        # Weakly: what is kept must not keep the model, nor what stood in for its parameters in one call.
        self._modules = [(weakref.ref(module), get, get(module)) for module, get in modules]
        self._slope = slope
        self._owned = [
            (where, name, _weakly(tensor), -1 if tensor is None else tensor._version, _address(tensor))
            for module, _ in modules
            for where in (module._parameters, module._buffers)
            for name, tensor in where.items()
        ]
        self._steps: list[Any] | None = self._bound(stages, input, residual)
        self.output = self._steps[-1][0].output() if self._steps else None
        self.on_aten = _is_torchs(stages, input) and (self._steps is None or _is_plain(*self._steps[0]))
        watch(*[tensor for module, _ in modules for tensor in module._parameters.values()])

    def _bound(self, stages: Sequence[Stage], input: Tensor, residual: bool) -> list[Any] | None:
        steps = []
        shape, channels_last = input.shape, input.is_contiguous(memory_format=torch.channels_last)
        if standing() == ATEN:
            return None
        for stage in stages:
            conv, norm, activation = stage
            plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
            if not plain or (norm is not None and not folds_filters(input, conv)):
                return None
            weight, bias = folded_filter(conv, norm)
            if conv.transposed and _is_channelwise(conv, input, weight):
                return None
            geometry = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
            step = _cpu.bound(
                "conv_transpose2d" if conv.transposed else "conv2d",
                autocast_dtype(input) or input.dtype,
                shape,
                channels_last,
                weight,
                bias,
                geometry,
                residual and stage is stages[-1],
                activation,
            )
            if step is None:
                return None
            steps.append(step)
            shape, channels_last = torch.Size(step[0].output()), True
        return steps

    def stands(self) -> bool:
        """True if nothing about the stages of which this was made has changed."""
        for made, get, settings in self._modules:
            module = made()
            if module is None or get(module) != settings:
                return False
        for where, name, kept, version, address in self._owned:
            tensor = where.get(name)
            if tensor is not kept():
                return False
            if tensor is not None and (tensor._version != version or tensor.data_ptr() != address):
                return False
        return True

    def possible(self) -> bool:
        """True if the layers can run so; else it is only known that they cannot."""
        return self._steps is not None

    def run(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The layers' result; `residual` is added before the last activation."""
        assert self._steps is not None
        *first, (call, candidate, prepared, bias) = self._steps
        for earlier, before, ready, term in first:
            input = before.run(earlier, _in_dtype(input, earlier.dtype), ready, term, None, self._slope)
        residual = None if residual is None else _in_dtype(residual, call.dtype)
        return candidate.run(call, _in_dtype(input, call.dtype), prepared, bias, residual, self._slope)


def _modules(stages: Sequence[Stage]) -> list[tuple[nn.Module, Callable[[Any], Any]]]:
    """The layers, each with what gets its settings."""
    pairs = [pair for conv, norm, _ in stages for pair in ((conv, _CONV), (norm, _NORM))]
    return [(module, get) for module, get in pairs if module is not None]


def _weakly(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return _nothing if tensor is None else weakref.ref(tensor)


def _nothing() -> None:
    return None


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_torchs(stages: Sequence[Stage], input: Tensor) -> bool:
    """True if it is one convolution, of an image that fits it, which the operator leaves to torch's function.

    Not a dilated one, whose taps the operator looks at.
    """
    conv, norm, _ = stages[0]
    if norm is not None or len(stages) > 1:
        return False
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    return (
        conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and all([t is None or (type(t) in PLAIN and t.dtype is input.dtype) for t in (weight, bias)])
        and min(input.shape) > 0
        and input.shape[1] == (weight.shape[0] if conv.transposed else weight.shape[1] * conv.groups)
        and (bias is None or bias.shape == (conv.out_channels,))
        and not (conv.transposed and _is_channelwise(conv, input, weight))
    )


def _is_plain(call: Call, candidate: Candidate, *_: Any) -> bool:
    """True if ATen was chosen, for images as it takes them."""
    return candidate is CANDIDATES[call.operation][ATEN] and call.channels_last


def _is_channelwise(conv: Any, input: Tensor, weight: Tensor) -> bool:
    """True if the operator enlarges each channel by itself."""
    return channelwise_factors(input, weight, conv.stride, conv.groups, conv.dilation) is not None


# Of each first convolution, by its id, what was made of it, the last used first. Beside the modules: no part
# of their state_dict, of copies, of pickles.
_made: dict[int, list[Ready]] = {}
_MOST_KINDS = 8  # of inputs, for each convolution


def ready(stages: Sequence[Stage], input: Any, residual: Tensor | None, slope: float) -> Ready | None:
    """The computation of these stages of `input`, or None where the layers are to be asked one by one."""
    choice = standing()
    if choice is None or choice == ATEN or global_hooks():
        return None
    for conv, norm, _ in stages:
        if not only_forward(conv) or (norm is not None and not only_forward(norm)):
            return None
    found = _found(stages, input, residual, slope, choice)
    if found is None or not found.possible():
        return None
    return found if residual is None or residual.shape == found.output else None


def convolved(conv: Any, input: Any) -> Tensor | None:
    """The result of `conv`, a layer of ours, on a CPU; None where its operator is to be asked."""
    choice = standing()
    if choice is None:
        return None
    stage = (conv, None, conv.activation)
    found = _found((stage,), input, None, conv.negative_slope, choice)
    if found is None:
        return None
    if not found.on_aten:
        return found.run(input, None) if found.possible() else None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    if conv.transposed:
        geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        y = F.conv_transpose2d(input, weight, bias, *geometry)
    else:
        y = F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y if stage[2] is None else activate_(y, stage[2], conv.negative_slope)


def _found(
    stages: Sequence[Stage], input: Any, residual: Tensor | None, slope: float, choice: int | str
) -> Ready | None:
    """The computation prepared for such an input, or prepared now, if it still stands."""
    if type(input) is not Tensor or not input.is_cpu or not (residual is None or type(residual) in PLAIN):
        return None
    what = [(id(conv), id(norm), activation) for conv, norm, activation in stages]
    key = (
        input.shape,
        what,
        input.dtype,
        input.is_contiguous(memory_format=torch.channels_last),
        residual is not None,
        slope,
        autocast_dtype(input) if torch.is_autocast_enabled("cpu") else None,
        torch.get_num_threads(),
        choice,
    )
    kinds = _made.get(id(stages[0][0]), [])
    for found in kinds:
        if found.key == key:
            if not found.stands():
                break
            if found is not kinds[0]:
                # Another list: other threads may be looking through this one.
                _made[id(stages[0][0])] = [found, *[other for other in kinds if other is not found]]
            return found
    return _make(stages, input, residual is not None, slope, key)


def _make(stages: Sequence[Stage], input: Tensor, residual: bool, slope: float, key: tuple) -> Ready | None:
    modules = [module for module, _ in _modules(stages)]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    fit = (
        input.dim() == 4
        and all([folds(norm) and "weight" in conv._parameters for conv, norm, _ in stages])
        and not any([t.is_inference() for t in tensors])
    )
    if not fit:
        return None
    conv = stages[0][0]
    if id(conv) not in _made:
        weakref.finalize(conv, _made.pop, id(conv), None)
        _made[id(conv)] = []
    made = Ready(stages, input, residual, slope, key)
    others = [other for other in _made[id(conv)] if other.key != key]
    _made[id(conv)] = [made, *others[: _MOST_KINDS - 1]]
    return made


def forget_ready(model: nn.Module) -> None:
    """Drop what was made of the convolutions in `model`."""
    for module in model.modules():
        if id(module) in _made:
            _made[id(module)] = []
