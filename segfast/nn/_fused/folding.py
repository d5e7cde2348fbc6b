"""Batch norm in eval as a scale and a shift of the epilogue before it: act(scale * conv + shift)."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops._backend import note_origin
from ...ops._captured import is_captured, renewed
from ...ops._choice import forget_prepared
from ...ops._prepared_weights import watch
from .._activation import activation_name
from .._rules import own_class
from .._scripting import Unscriptable

_OPENMMLAB = "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm"  # torch's, but for its check
_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"
_PLAIN = (Tensor, nn.Parameter)


class Affine(NamedTuple):
    """A norm's scale and shift of each channel, [C], float32 or float64; (None, None) without a norm."""

    scale: Tensor | None
    shift: Tensor | None


@dataclass
class _Entry:
    tensors: tuple[Tensor | None, ...]
    versions: list[Any] | None  # None once forgotten
    key: Any
    result: Any
    captured: bool  # a CUDA graph reads `result`

    def describes(self, tensors: tuple[Tensor | None, ...], key: Any) -> bool:
        """True if `result` was computed from these very tensors, not written to since."""
        same = len(self.tensors) == len(tensors) and all(
            [a is b for a, b in zip(self.tensors, tensors, strict=True)]
        )
        return same and self.key == key and self.versions == _versions(tensors)


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
    """True if a sequence may take `module` for a batch norm: torch's, OpenMMLab's, timm's with activation."""
    torchs = own_class(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, PooledBatchNorm2d)
    known = torchs or _name(module) in (_WITH_ACTIVATION, _OPENMMLAB)
    return known and getattr(module, "running_var", None) is not None


def activation_of_norm(norm: Any) -> tuple[str | None, float] | None:
    """The activation a batch norm ends with: timm's `BatchNormAct2d`."""
    return activation_name(norm.act) if _name(norm) == _WITH_ACTIVATION else None


def _name(module: nn.Module) -> str:
    return f"{own_class(module).__module__}.{own_class(module).__qualname__}"


def folds(norm: nn.Module | None) -> bool:
    """True if `norm` is None or, as it stands, a fixed scale and shift of each channel."""
    if norm is None:
        return True
    forwards = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, PooledBatchNorm2d.forward)
    known = getattr(own_class(norm), "forward", None) in forwards
    # A sequence knows of the activation in timm's; nobody else does.
    in_sequence = own_class(norm) is not type(norm) and is_batch_norm(norm)
    return (
        (known or in_sequence)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def folded(norm: Any) -> Affine:
    """The scale and shift of a norm that `folds`.

    Remembered until one of the norm's tensors is replaced or written to, so that a call without gradients
    starts no kernel for it. A write through `.data` or by a replayed CUDA graph leaves no trace in torch:
    `forget` is for those, and `train()` and `eval()` of the modules here call it. A captured graph follows
    when the module next runs outside of one.
    """
    if norm is None:
        return _NOTHING
    tensors = norm_tensors(norm)
    if not runs_eagerly() or needs_gradient(tensors):
        return affine(tensors, norm.eps)
    return remembered(norm, tensors, norm.eps, lambda: affine(tensors, norm.eps))


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """True if autograd is to see what is computed from these."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def folded_filter(conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of `conv` with a norm that `folds` in them, remembered as `folded` is.

    `conv` may be transposed and have groups. Only where no gradient is wanted, and nothing but eager code
    runs.
    """
    if norm is None:
        return conv.weight, conv.bias
    tensors = (conv.weight, conv.bias, *norm_tensors(norm))

    def fold() -> tuple[Tensor, Tensor]:
        both: Any = affine(tensors[2:], norm.eps)
        scale, shift = (t.to(conv.weight.dtype) for t in both)
        return scaled(conv.weight, scale, conv.transposed, conv.groups), (
            shift if conv.bias is None else shift + conv.bias * scale
        )

    # Not the tensor alone: its layout may have been changed under it.
    weight, bias = remembered(conv, tensors, (norm.eps, conv.weight.stride()), fold)
    note_origin(weight, conv.weight)
    return weight, bias


def scaled(weight: Tensor, scale: Tensor, transposed: bool, groups: int) -> Tensor:
    """The filter of `scale * conv`, [C_out, C_in/groups, ...]; [C_in, C_out/groups, ...] if transposed."""
    if not transposed:
        return weight * scale[:, None, None, None]
    by_group = weight.unflatten(0, (groups, -1))
    return (by_group * scale.view(groups, 1, -1, 1, 1)).flatten(0, 1)


def norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
    """The tensors that the scale and shift of a norm that `folds` come from; none without a norm.

    And its counter of batches: a training step writes the running statistics without marking them as written.
    """
    if norm is None:
        return ()
    return (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)


def remembered(
    module: nn.Module, tensors: tuple[Tensor | None, ...], key: Any, compute: Callable[[], Any]
) -> Any:
    """The result of `compute()` for this module, these very tensors as they are now, and `key`."""
    entry = _known.get(module)
    capturing = is_captured(tensors)
    if entry is not None and entry.describes(tensors, key):
        entry.captured |= capturing
        return entry.result
    # Not inference tensors, which a later call with gradients could not save.
    with torch.inference_mode(False), torch.no_grad():
        result = compute()
    # What is computed during a capture is the graph's, written when it is replayed.
    if not capturing and all([t is None or (type(t) in _PLAIN and not t.is_inference()) for t in tensors]):
        captured = entry is not None and entry.captured
        if entry is not None and captured:
            result = renewed(entry.result, result)
        _known[module] = _Entry(tensors, _versions(tensors), key, result, captured)
        watch(*tensors)
    return result


def forget(*modules: nn.Module | None) -> None:
    """Compute anew, at its next call, what is remembered of each of these."""
    for module in modules:
        if module is None:
            continue
        forget_prepared(*module._parameters.values())
        if module in _known:
            if _known[module].captured:
                _known[module].versions = None
            else:
                del _known[module]


class Remembers(Unscriptable, nn.Module):
    """Computes what it remembers of its weights and norms anew after each change of mode, device or dtype."""

    def train(self, mode: bool = True):
        forget(*self.modules())
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        forget(*self.modules())
        return super()._apply(fn, recurse)


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of `[N, C, 1, 1]`, the features of whole images.

    One image has no variance over its batch; it is normalized with the running statistics, in train too, and
    leaves them alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] == 1 and self.running_mean is not None:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """How often each was written, and where it lies, for `.data` may have been set."""
    return [None if t is None else (t._version, t.data_ptr()) for t in tensors]


def affine(tensors: tuple[Tensor | None, ...], eps: float) -> Affine:
    """The scale and shift of a batch norm whose `norm_tensors` these are."""
    weight, bias, mean, var, _ = tensors
    assert mean is not None and var is not None
    dtype = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    return Affine(scale, shift)
