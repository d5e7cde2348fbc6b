"""Computing a model without the values that take the time: shapes, layouts and devices are as ever.

A tensor without values is an ordinary one on its own device, whose memory nobody has written. What is made of
sizes alone, a table of positions say, has its values. Where somebody keeps what has none, a cache of the
module's that is keyed by sizes, or a hook, it gets the values that a run of the model would have given it.
"""

import gc
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils.weak import WeakTensorKeyDictionary


class _Number(NamedTuple):
    """Stands for a tensor without values, in the order in which they were made."""

    number: int


class _Made(NamedTuple):
    """A tensor that an operator made without values: its number, and how it lies in memory."""

    number: int
    stride: tuple[int, ...]


class WithoutValues:
    """Computes operations: those of tensors without values give more of these, the others what they give."""

    def __init__(self) -> None:
        self._bare: set[StorageWeakRef] = set()
        self._numbers = WeakTensorKeyDictionary()
        self._count = 0
        self._given: list[Tensor] = []
        self._ran: list[tuple[Any, list[Any], Any, list[_Made | None]]] = []

    def bare(self, t: Tensor) -> Tensor:
        """A tensor like `t`, without its values.

        Raises:
            TypeError: `t` is more than shape and values.
        """
        if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
            raise TypeError(f"a {type(t).__name__} may be more than shape and values")
        made = self._empty(t, t.device)
        made = nn.Parameter(made, False) if type(t) is nn.Parameter else made
        self._given.append(t)
        self._number(made)
        return made.requires_grad_(t.requires_grad)

    def is_bare(self, t: Tensor) -> bool:
        """True if `t` has no values."""
        return t.layout == torch.strided and StorageWeakRef(t.untyped_storage()) in self._bare

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator.

        Raises:
            RuntimeError: it depends on values, or is not known to torch without them.
        """
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(map(self.is_bare, read)):
            return function(*args, **kwargs)
        operands = [self._operand(leaf) for leaf in leaves]
        if function.is_view:
            result = function(*args, **kwargs)
        else:
            result = self._shaped(function, leaves, structure, read)
        made = [
            _Made(self._number(leaf), leaf.stride()) if isinstance(leaf, Tensor) else None
            for leaf in _pytree.tree_leaves(result)
        ]
        self._ran.append((function, operands, structure, made))
        return result

    def _shaped(self, function: Any, leaves: list[Any], structure: Any, read: list[Tensor]) -> Any:
        """The result of an operator as torch knows it without values; what it writes to has none then."""
        copies = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in read}
        originals = {id(copies[id(t)]): t for t in read}
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        device = asked[0] if asked else max(read, key=lambda t: t.dim() > 0).device

        def meta(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("meta")
            return copies[id(leaf)] if isinstance(leaf, Tensor) else leaf

        def real(t: Tensor) -> Tensor:
            given = originals.get(id(t))
            if given is None:
                return self._empty(t, device)
            if given.shape != t.shape:
                raise RuntimeError(f"{function} changes a shape in place")
            return given

        args, kwargs = _pytree.tree_unflatten(list(map(meta, leaves)), structure)
        result = _pytree.tree_map_only(Tensor, real, function(*args, **kwargs))
        args, kwargs = _pytree.tree_unflatten(leaves, structure)
        self._bare |= set(written(function, args, kwargs))
        return result

    def _empty(self, like: Tensor, device: torch.device) -> Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        self._bare.add(StorageWeakRef(made.untyped_storage()))
        return made

    def _number(self, t: Tensor) -> int:
        if t not in self._numbers:
            self._numbers[t] = self._count
            self._count += 1
        return self._numbers[t]

    def _operand(self, value: Any) -> Any:
        """A stand-in for an operand until the end, which keeps no tensor alive that nobody else does."""
        if not isinstance(value, Tensor):
            return value
        return _Number(self._numbers[value]) if value in self._numbers else value.detach()

    def fill(self) -> None:
        """Give what is still alive its values, once the model without them is gone: somebody kept it."""
        if self._numbers:
            gc.collect()
        alive = dict(self._numbers.items())
        if not alive:
            return
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(gpus), torch.inference_mode():
            values = {number: t.detach().clone() for number, t in enumerate(self._given)}
            for function, operands, structure, results in self._ran:
                operands = [values[o.number] if isinstance(o, _Number) else o for o in operands]
                args, kwargs = _pytree.tree_unflatten(operands, structure)
                for made, value in zip(results, _pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                    if made is not None and isinstance(value, Tensor):  # some tell of none that is not needed
                        values[made.number] = _lying(value, made.stride, function)
            for t, number in alive.items():
                value = values[number]
                for dim in [dim for dim, stride in enumerate(t.stride()) if stride == 0]:
                    t, value = t.narrow(dim, 0, 1), value.narrow(dim, 0, 1)  # expanded
                t.detach().copy_(value)


def _lying(t: Tensor, stride: tuple[int, ...], function: Any) -> Tensor:
    """The result of `function` laid out as torch foretold it, where it makes another layout than that."""
    if t.stride() == stride or function.is_view or function._schema.is_mutable:
        return t
    return torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a structure that pytree knows."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def written(function: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> list[StorageWeakRef]:
    """The memory that an operator says it writes to."""
    arguments = function._schema.arguments
    given = [(argument, value) for argument, value in zip(arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
    return [
        StorageWeakRef(t.untyped_storage())
        for argument, value in given
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in tensors(value)
        if t.layout == torch.strided
    ]
