"""A whole model computed in another dtype, or by ATen alone, with all that the caller sees as it was."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..ops._backend import backend_of_this_thread, get_backend
from ._fused_class import FusedModule, fused_class

# In the __dict__ of a model: the dtype it computes in, or None; and whether its outputs are made contiguous.
_DTYPE = "_segfast_dtype"
_CONTIGUOUS = "_segfast_contiguous"


class _Whole(FusedModule):
    """Mixed into the class of a model, around its call: the forward and its signature stay its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if _is_floating(t)]
        training = self.training  # type: ignore[attr-defined]
        if not given or training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        dtype = vars(self).get(_DTYPE)
        casting: Any = contextlib.nullcontext()
        if dtype is not None:
            casting = torch.autocast(given[0].device.type, dtype=dtype)
        with casting:
            outputs = super().__call__(*args, **kwargs)  # type: ignore[misc]
        contiguous = vars(self).get(_CONTIGUOUS, False) and given[0].is_contiguous()

        def as_given(t: Tensor) -> Tensor:
            t = t.to(given[0].dtype) if t.dtype == dtype else t
            return t.contiguous() if contiguous and t.dim() == 4 else t

        return _mapped(as_given, outputs)


def _mapped(function: Any, value: Any) -> Any:
    """The same structure with `function` of each tensor in it, in dataclasses too, which pytrees pass by."""
    leaves = _pytree.tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value or not dataclasses.is_dataclass(value):
        return _pytree.tree_map_only(Tensor, function, value)
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    changed = {name: _mapped(function, getattr(value, name)) for name in fields}
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


class _OnATen(FusedModule):
    """Mixed into the class of a model whose layers are segfast's and were no faster by anything else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or get_backend() != "auto":
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with backend_of_this_thread("aten"):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _mix(mixin: Any, model: nn.Module) -> None:
    if not isinstance(model, mixin):
        kind: Any = type(model)
        model.__class__ = fused_class(mixin, kind)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let `model` compute in `dtype` in eval and without gradients; outputs have the input's dtype."""
    vars(model)[_DTYPE] = dtype
    _mix(_Whole, model)


def keep_contiguous(model: nn.Module) -> None:
    """Let the images that `model` returns be contiguous where those given are, in eval without gradients."""
    vars(model)[_CONTIGUOUS] = True
    _mix(_Whole, model)


def compute_on_aten(model: nn.Module) -> None:
    """Let `model` compute by ATen alone where "auto" would choose, without gradients."""
    _mix(_OnATen, model)


def compute_as_given(model: nn.Module) -> None:
    """Undo all of these."""
    for key in (_DTYPE, _CONTIGUOUS):
        vars(model).pop(key, None)
    while isinstance(model, _Whole | _OnATen):
        fused: Any = model
        fused.__class__ = fused.unfused_class


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """What `compute_in` was given."""
    return vars(model).get(_DTYPE)
