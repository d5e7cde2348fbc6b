"""Comparing a model's outputs with its layers fused and without."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..nn._fused.sequence import fusing
from .snapshot import Snapshot, write_back

Inputs = tuple[Any, ...] | dict[str, Any]


def arguments(example_inputs: Any) -> Inputs:
    """A model's arguments: of a mapping the keyword ones, of a tuple the positional; else the first."""
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for `arguments`, of which it gets copies."""
    inputs = cloned(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def run_once(model: nn.Module, inputs: Inputs) -> None:
    """Run the model on these inputs, in eval and without gradients, to raise whatever it raises."""
    with undisturbed(model), running_mode(model, False), torch.no_grad():
        call(model, inputs)


def difference(model: nn.Module, inputs: Inputs) -> str | None:
    """The first difference of the fused model's outputs, or None. Model and inputs stay as they are."""
    with running_mode(model, False), torch.no_grad(), exact_fp32():
        results = []
        for fused in (False, True):
            try:
                with undisturbed(model), fusing(fused):
                    torch.manual_seed(0)
                    results.append([leaf for _, leaf in leaves(call(model, inputs))])
            except RuntimeError as error:
                return first_line(error)
    if len(results[0]) != len(results[1]):
        return f"an output of {len(results[0])} parts became one of {len(results[1])}"
    for expected, actual in zip(*results, strict=True):
        if isinstance(expected, Tensor) and expected.is_floating_point() and expected.numel():
            if expected.shape != actual.shape:
                return f"an output of {list(expected.shape)} became {list(actual.shape)}"
            scale = expected.abs().nan_to_num(0, 0, 0).max().item()
            worst = torch.where(expected.isfinite(), (actual - expected).abs(), 0).max().item()
            if not worst <= scale * math.sqrt(torch.finfo(expected.dtype).eps):
                return f"an output changed by {worst:.3g}, its largest value is {scale:.3g}"
    return None


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """The leaves of a model's output, each with its path in it.

    Of mappings (ModelOutput too), sequences and dataclasses the values, and of what torch's pytrees know.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    else:
        for index, leaf in enumerate(_pytree.tree_leaves(value)):
            yield from [(path, leaf)] if leaf is value else leaves(leaf, f"{path}<{index}>")


def cloned(inputs: Any) -> Any:
    """The same structure with a copy of each tensor in it: a forward may work in place."""
    return _pytree.tree_map_only(Tensor, _clone, inputs)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers, gradients, attributes, modes and the random state are those of before a run."""
    modules = list(model.modules())
    attributes = [(module, _attributes(module)) for module in modules]
    modes = [(module, module.training) for module in modules]
    buffers = [(m, name, *_kept(buffer)) for m in modules for name, buffer in m._buffers.items()]
    registered = [(module, set(module._buffers.keys())) for module in modules]
    parameters = [(p, p.requires_grad, *_kept(p.grad)) for p in model.parameters()]
    elsewhere = (*modules, *model.parameters(), *model.buffers())
    states = Snapshot([v for _, kept in attributes for v in kept.values()], without=elsewhere)
    # manual_seed seeds every GPU.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, names in registered:
                for name in set(module._buffers.keys()) - names:
                    delattr(module, name)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = _put_back(buffer, value)
                for parameter, requires_grad, grad, value in parameters:
                    if parameter.requires_grad != requires_grad:
                        parameter.requires_grad_(requires_grad)
                    parameter.grad = _put_back(grad, value)
            for module, kept in attributes:
                for name in _attributes(module).keys() - kept.keys():
                    del vars(module)[name]
                vars(module).update(kept)
            states.put_back()


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of `module` in which the model's own code may keep a cache or a state."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin | torch.jit.ScriptModule):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and not name.startswith("_segfast")
    }


def _kept(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A tensor and its values."""
    return tensor, None if tensor is None else tensor.detach().clone()


def _put_back(tensor: Tensor | None, values: Tensor | None) -> Tensor | None:
    """The tensor with its values."""
    if tensor is not None and values is not None:
        write_back(tensor, values)
    return tensor


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Convolutions and matrix products in fp32 are exact on a GPU: over many layers TF32 hides any fault."""
    knobs: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
    finally:
        for knob, precision in zip(knobs, before, strict=True):
            knob.fp32_precision = precision


@contextmanager
def running_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    if any(mode != training for _, mode in before):  # a change of mode makes packed weights anew
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
