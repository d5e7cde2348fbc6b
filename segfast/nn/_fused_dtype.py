"""A whole model computed in another dtype, or by ATen alone, with all that the caller sees as it was."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..ops._backend import backend_of_this_thread, get_backend
from ._fused_class import FusedModule, fused_class

# In the __dict__ of a model that computes in another dtype.
_DTYPE = "_segfast_dtype"


class _InDtype(FusedModule):
    """Mixed into the class of a model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if _is_floating(t)]
        if not given or self.training or torch.is_grad_enabled():  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        dtype, device = vars(self)[_DTYPE], given[0].device.type
        with torch.autocast(device, dtype=dtype):
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]

        def as_given(t: Tensor) -> Tensor:
            return t.to(given[0].dtype) if t.dtype == dtype else t

        return _pytree.tree_map_only(Tensor, as_given, outputs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let `model` compute in `dtype` in eval and without gradients; a forward under a tracer does so too."""
    vars(model)[_DTYPE] = dtype
    if not isinstance(model, _InDtype):
        kind: Any = type(model)
        model.__class__ = fused_class(_InDtype, kind)


class _OnATen(FusedModule):
    """Mixed into the class of a model whose layers are segfast's and were no faster by anything else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or get_backend() != "auto":
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with backend_of_this_thread("aten"):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def compute_on_aten(model: nn.Module) -> None:
    """Let `model` compute by ATen alone where "auto" would choose, without gradients."""
    if not isinstance(model, _OnATen):
        kind: Any = type(model)
        model.__class__ = fused_class(_OnATen, kind)


def compute_as_given(model: nn.Module) -> None:
    """Undo `compute_in` and `compute_on_aten`."""
    vars(model).pop(_DTYPE, None)
    while isinstance(model, _InDtype | _OnATen):
        fused: Any = model
        fused.__class__ = fused.unfused_class


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """What `compute_in` was given."""
    return vars(model).get(_DTYPE)
