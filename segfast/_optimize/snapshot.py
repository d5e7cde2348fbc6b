"""The contents of objects, taken before a run of a model and put back after it, in the same objects."""

import contextlib
import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A run changes nothing in them that could be put back.
_NOT_OPENED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


class Snapshot:
    """The contents of `values` and of all that is reached from them: containers, tensors, objects.

    No copies take their place meanwhile: a hook may write into the dictionary that the forward reads. Left
    out are what stands in `without`, closures, what an object keeps elsewhere than in its `__dict__`, and
    what cannot be copied.
    """

    def __init__(self, values: Iterable[Any], without: Iterable[Any] = ()) -> None:
        self._seen = {id(each): each for each in without}  # which keeps their ids from being given again
        self._undo: list[Callable[[], object]] = []
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if id(value) not in self._seen and not isinstance(value, _NOT_OPENED):
                self._seen[id(value)] = value
                with contextlib.suppress(Exception):
                    waiting += self._keep(value)

    def put_back(self) -> None:
        """Give each of them what it held."""
        for undo in self._undo:
            undo()

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep what `value` holds, and hand it out to be looked into."""
        held: list[Any] = []
        undo: Callable[[], object] | None = None
        if isinstance(value, Tensor):
            undo = functools.partial(write_back, value, value.detach().clone())
        elif isinstance(value, np.ndarray):
            held = list(value.flat) if value.dtype == object else []
            undo = functools.partial(np.copyto, value, value.copy()) if value.flags.writeable else None
        elif isinstance(value, torch.Generator):
            undo = functools.partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            undo = functools.partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            undo = functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, functools.partial):
            held = [value.func, value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            held = [value.__self__]
        elif isinstance(value, dict):
            items = list(value.items())
            held = [each for item in items for each in item]
            undo = functools.partial(_fill_mapping, value, items)
        elif isinstance(value, list | set | deque | tuple | frozenset):
            held = list(value)
            undo = None if isinstance(value, tuple | frozenset) else functools.partial(_fill, value, held)
        elif hasattr(value, "__dict__"):
            held = [vars(value)]
        if undo is not None:
            self._undo.append(undo)
        return held


def write_back(tensor: Tensor, values: Tensor) -> None:
    """Give the tensor its values, written only if somebody changed them."""
    if tensor.shape != values.shape:
        tensor.data = values
    # Not by its version: a batch norm in training writes its statistics without counting it.
    elif tensor.layout != torch.strided or not torch.equal(tensor, values):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def _fill_mapping(mapping: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    kind = OrderedDict if isinstance(mapping, OrderedDict) else dict  # past what its own class does besides
    if not _same(
        [each for item in mapping.items() for each in item], [each for item in items for each in item]
    ):
        kind.clear(mapping)
        for key, value in items:
            kind.__setitem__(mapping, key, value)


def _fill(container: Any, held: list[Any]) -> None:
    if not _same(list(container), held):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(held)


def _same(first: list[Any], second: list[Any]) -> bool:
    """True if both have the same objects in the same order."""
    return len(first) == len(second) and all(map(lambda a, b: a is b, first, second))
