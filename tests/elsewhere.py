"""A device to stand for a GPU on a machine without one, for tests of what is sent where.

Its tensors say that they are on the meta device and have numbers all the same: those of a CPU tensor each
holds. As on a GPU, an operation on one and on a CPU tensor is an error, as is `numpy()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
# What may have operands of two devices.
_MOVES = ("aten::copy_", "aten::_to_copy")


class Elsewhere(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Sees also what has no tensor of the device yet."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(value, Elsewhere) for value in tree_leaves((args, kwargs))):
            self.operations.add(function.name())
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    name = function.name().partition(".")[0]
    if here and there and name not in _MOVES:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, got cpu and {DEVICE}")
    target = kwargs.get("device")
    stays = bool(there) if target is None else torch.device(target) == DEVICE
    if name == "aten::copy_":
        stays = isinstance(args[0], Elsewhere)
    if target is not None and stays:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(Elsewhere, lambda t: t.held, (args, kwargs))
    result = function(*args, **kwargs)
    if not stays:
        return result
    # In place: the very tensor that was given.
    given = {id(t.held): t for t in there}
    return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else Elsewhere(t), result)


@contextmanager
def elsewhere() -> Iterator[set[str]]:
    """Within, tensors can be sent to `DEVICE`; yields the names of the operations on those, as they run."""
    with _Device() as mode:
        yield mode.operations
