"""Batch norm in eval as a scale and a shift of the epilogue before it: act(scale * conv + shift)."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._activation import activation_name
from ._rules import own_class

_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"
_PLAIN = (Tensor, nn.Parameter)


class Affine(NamedTuple):
    """What a norm does to each channel, [C] each, float32 or float64; (None, None) where there is no norm."""

    scale: Tensor | None
    shift: Tensor | None


class _Entry(NamedTuple):
    tensors: tuple[Tensor | None, ...]
    versions: list[int]
    eps: float
    result: tuple[Tensor | None, Tensor | None]

    def describes(self, tensors: tuple[Tensor | None, ...], eps: float) -> bool:
        """Whether `result` was computed from these very tensors, not written to since."""
        same = all([a is b for a, b in zip(self.tensors, tensors, strict=True)])
        return same and self.eps == eps and self.versions == _versions(tensors)


_NOTHING = Affine(None, None)
# Beside the modules, not in them: no part of their state_dict, of copies, of pickles.
_known: "weakref.WeakKeyDictionary[nn.Module, _Entry]" = weakref.WeakKeyDictionary()


def runs_eagerly() -> bool:
    """No compiler, exporter, tracer, tensor mode or functorch transform is looking."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a fused chain may take `module` for a batch norm: torch's own, or timm's with an activation."""
    known = own_class(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _name(module) == _WITH_ACTIVATION
    return known and getattr(module, "running_var", None) is not None


def activation_of_norm(norm: Any) -> tuple[str | None, float] | None:
    """The activation a batch norm ends with: timm's `BatchNormAct2d`."""
    return activation_name(norm.act) if _name(norm) == _WITH_ACTIVATION else None


def _name(module: nn.Module) -> str:
    return f"{own_class(module).__module__}.{own_class(module).__qualname__}"


def folds(norm: nn.Module | None) -> bool:
    """Whether `norm` is None or, as it stands, a fixed scale and shift of each channel."""
    if norm is None:
        return True
    known = getattr(own_class(norm), "forward", None) in _FORWARDS
    # A chain knows of the activation in timm's; nobody else does.
    in_chain = own_class(norm) is not type(norm) and is_batch_norm(norm)
    return (
        (known or in_chain)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def folded(norm: Any) -> Affine:
    """The scale and shift of a norm that `folds`.

    Remembered until one of the norm's tensors is replaced or written to, so that a call without gradients
    starts no kernel for it. A write through `.data` or by a replayed CUDA graph leaves no trace in torch:
    `forget` is for those, and `train()` and `eval()` of the modules here call it.
    """
    if norm is None:
        return _NOTHING
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not runs_eagerly() or (
        torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    ):
        return _affine(*tensors, norm.eps)
    return Affine(*_remembered(norm, tensors, norm.eps, lambda: _affine(*tensors, norm.eps)))


def folded_filter(conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of `conv` with a norm that `folds` in them, remembered as `folded` is.

    Only where no gradient is wanted, and nothing but eager code runs.
    """
    if norm is None:
        return conv.weight, conv.bias
    tensors = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)

    def fold() -> tuple[Tensor, Tensor]:
        affine: Any = _affine(*tensors[2:], norm.eps)
        scale, shift = (t.to(conv.weight.dtype) for t in affine)
        return conv.weight * scale[:, None, None, None], (
            shift if conv.bias is None else shift + conv.bias * scale
        )

    weight, bias = _remembered(conv, tensors, norm.eps, fold)
    assert weight is not None
    return weight, bias


def _remembered(
    module: nn.Module, tensors: tuple[Tensor | None, ...], eps: float, compute: Callable[[], Any]
) -> tuple[Tensor | None, Tensor | None]:
    entry = _known.get(module)
    if entry is not None and entry.describes(tensors, eps):
        return entry.result
    # Not inference tensors, which a later call with gradients could not save.
    with torch.inference_mode(False), torch.no_grad():
        result = compute()
    if all([t is None or (type(t) in _PLAIN and not t.is_inference()) for t in tensors]):
        _known[module] = _Entry(tensors, _versions(tensors), eps, result)
    return result


def forget(*norms: nn.Module | None) -> None:
    """Compute these norms' scale and shift anew at their next call."""
    for norm in norms:
        if norm is not None:
            _known.pop(norm, None)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [-1 if t is None else t._version for t in tensors]


def _affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Affine:
    dtype = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    return Affine(scale, shift)
