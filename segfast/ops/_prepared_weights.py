"""Weights packed, transformed or cast, remembered while the weight itself stands unchanged."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._captured import is_captured
from ._operator import is_traced


class _Kept:
    """The tensors made of one weight, by what they are."""

    __slots__ = ("address", "made", "ref", "version")

    def __init__(self, weight: Tensor, ref: "weakref.ref[Tensor]"):
        self.ref, self.made = ref, dict[Any, Any]()
        self.version, self.address = _version(weight), weight.data_ptr()

    def describes(self, weight: Tensor) -> bool:
        return self.ref() is weight and self.version == _version(weight) and self.address == weight.data_ptr()


_kept: dict[int, _Kept] = {}
_MOST_KINDS = 64  # of one weight: some are one thing for each size of images
# Tensors from which something was computed that is kept, here or elsewhere, by id.
_watched: dict[int, "weakref.ref[Tensor]"] = {}


def watch(*tensors: Tensor | None) -> None:
    """Have writes to these counted (`_version`) where torch does not: by an optimizer with `fused=True`."""
    for tensor in tensors:
        if tensor is not None and id(tensor) not in _watched:
            _watched[id(tensor)] = weakref.ref(tensor, functools.partial(_gone, id(tensor)))


def _gone(key: int, _: "weakref.ref[Tensor]") -> None:
    _watched.pop(key, None)


def _count_writes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups if _watched else ():
        if group.get("fused"):
            for parameter in group["params"]:
                if id(parameter) in _watched and not parameter.is_inference():
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_writes)


def remembered(weight: Tensor, kind: Any, make: Callable[[Tensor], Any]) -> Any:
    """`make(weight)`, made once for each `kind`, until the weight is written to or goes.

    A write through `.data` leaves no trace in torch: `forget` is for those.
    """
    key = id(weight)
    entry = _kept.get(key)
    if entry is None or not entry.describes(weight):
        ref = weakref.ref(weight, lambda _: _kept.pop(key, None))
        entry = _Kept(weight, ref)
        # An inference tensor's writes cannot be seen; what is computed in a capture is the graph's.
        if not weight.is_inference() and not is_captured([weight]):
            _kept[key] = entry
            watch(weight)
    found = entry.made.get(kind)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make(weight.detach())
        if len(entry.made) >= _MOST_KINDS:
            entry.made.clear()
        entry.made[kind] = found
    return found


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: a parameter that needs no gradient is cast once."""
    if weight.dtype == dtype:
        return weight
    if type(weight) is not torch.nn.Parameter or torch.is_grad_enabled() or is_traced():
        return weight.to(dtype)
    if is_captured([weight]):
        return weight.to(dtype)  # the graph's own: what is remembered may go before it
    return remembered(weight, ("cast", dtype), lambda w: w.to(dtype))


def forget(*weights: Tensor | None) -> None:
    """Make anew what is made of these."""
    for weight in weights:
        _kept.pop(id(weight), None)


def forget_all() -> None:
    """Drop everything that was made."""
    _kept.clear()


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version
