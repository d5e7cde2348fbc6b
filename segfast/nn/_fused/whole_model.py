"""A whole model computed in another dtype, or by ATen alone, with all that the caller sees as it was."""

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ...ops._backend import backend_of_this_thread, get_backend
from ...ops._enlarge import interpolate
from .swap import FusedModule, fused_class

# In the __dict__ of a model: the dtype it computes in, or None; and whether its outputs are made contiguous.
_DTYPE = "_segfast_dtype"
_CONTIGUOUS = "_segfast_contiguous"


class _Whole(FusedModule):
    """Mixed into the class of a model, around its call: the forward and its signature stay its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = _first_floating(args, kwargs)
        if given is None or _is_compiled_or_traced():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        own = vars(self)
        training = self.training or torch.is_grad_enabled()  # type: ignore[attr-defined]
        dtype = None if training else own.get(_DTYPE)
        contiguous = own.get(_CONTIGUOUS, False) and given.is_contiguous()
        with _wanted.layout(contiguous):
            if dtype is None:
                outputs = super().__call__(*args, **kwargs)  # type: ignore[misc]
            else:
                with torch.autocast(given.device.type, dtype=dtype):
                    outputs = super().__call__(*args, **kwargs)  # type: ignore[misc]

        def as_given(t: Tensor) -> Tensor:
            # In this order: laid out in half the bytes.
            t = t.contiguous() if contiguous and t.dim() == 4 else t
            return t.to(given.dtype) if t.dtype == dtype else t

        return _mapped(as_given, outputs) if contiguous or dtype is not None else outputs


def _is_compiled_or_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _first_floating(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor of floating-point numbers in the arguments."""
    if args and _is_floating(args[0]):
        return args[0]  # the usual case, which is to cost nothing
    return next(filter(_is_floating, _pytree.tree_leaves((args, kwargs))), None)


def _mapped(function: Any, value: Any) -> Any:
    """The same structure with `function` of each tensor in it, in dataclasses too, which pytrees pass by."""
    # The usual structures, which are to cost nothing.
    if type(value) is Tensor:
        return function(value)
    if type(value) in (dict, OrderedDict) and all([type(t) is Tensor for t in value.values()]):
        return type(value)([(key, function(t)) for key, t in value.items()])
    leaves = _pytree.tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value or not dataclasses.is_dataclass(value):
        return _pytree.tree_map_only(Tensor, function, value)
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    changed = {name: _mapped(function, getattr(value, name)) for name in fields}
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


class _Enlarging(TorchFunctionMode):
    """Computes what is called to enlarge images; active after a model's last convolution."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        function = interpolate if func is nn.functional.interpolate else func
        return function(*args, **(kwargs or {}))


class _Wanted(threading.local):
    """State of a thread: whether its running model is to return contiguous images, and how it makes them."""

    contiguous = False
    # How many modes there were when the model was called, and ours if there is one now.
    depth = 0
    mode: _Enlarging | None = None

    @contextlib.contextmanager
    def layout(self, contiguous: bool) -> Iterator[None]:
        """A context for a call of the model; `contiguous` images are to be returned."""
        before = (self.contiguous, self.depth, self.mode)
        self.contiguous, self.depth, self.mode = contiguous, _len_torch_function_stack(), None
        try:
            yield
        finally:
            if self.mode is not None:
                self.mode.__exit__(None, None, None)
            self.contiguous, self.depth, self.mode = before

    def enlarge(self) -> None:
        """Enlarge images by `interpolate` from here to the end of the model, if no other mode began since."""
        if self.mode is None and _len_torch_function_stack() == self.depth and not torch.is_grad_enabled():
            self.mode = _Enlarging()
            self.mode.__enter__()


_wanted = _Wanted()


class _Last(FusedModule):
    """Mixed into the class of a model's last convolution.

    Its scores are laid out as the model's output is to be before they are enlarged, when they are few; and
    what enlarges them is called by `ops._enlarge.interpolate`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)  # type: ignore[misc]
        # A mode that compiled code began would not end with the model.
        if _is_compiled_or_traced() or not (_wanted.contiguous and type(y) is Tensor and y.dim() == 4):
            return y
        _wanted.enlarge()
        return y.contiguous()


class _OnATen(FusedModule):
    """Mixed into the class of a model whose layers are segfast's and were no faster by anything else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiled_or_traced() or torch.is_grad_enabled() or get_backend() != "auto":
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


def keep_contiguous(model: nn.Module, last: nn.Module | None = None) -> None:
    """Let the images that `model` returns be contiguous where those given are.

    `last` is its last convolution, if that is known and not the model itself.
    """
    vars(model)[_CONTIGUOUS] = True
    _mix(_Whole, model)
    if last is not None and last is not model:
        lay_out_scores(last)


def lay_out_scores(last: nn.Module) -> None:
    """Let a model's last convolution return what `keep_contiguous` asks of the model."""
    _mix(_Last, last)


def compute_on_aten(model: nn.Module) -> None:
    """Let `model` compute by ATen alone where "auto" would choose, without gradients."""
    _mix(_OnATen, model)


def compute_as_given(model: nn.Module) -> None:
    """Undo all of these."""
    for key in (_DTYPE, _CONTIGUOUS):
        vars(model).pop(key, None)
    for module in model.modules():
        while isinstance(module, _Whole | _OnATen | _Last):
            fused: Any = module
            fused.__class__ = fused.unfused_class


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype given to `compute_in`, or None."""
    return vars(model).get(_DTYPE)
