"""The registered operators of the segmentation head: checks, shapes, kernels, and the same in ATen.

All take the interpolation as `size, mode, align_corners, scales`: see `geometry.Resampling`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._layout import in_format, output_format
from .._operands import load_kernels
from .._operator import Operator
from . import chunked, formulas
from .geometry import check_labels, planar


def _reference(tiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """On CPU tensors tile by tile; where the operator is decomposed or on another device the definition."""

    def run(*args):
        tensor = next(a for a in args if isinstance(a, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            if tensor.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
                return plain(*args)
            with torch.no_grad():
                return tiled(*args)

    return run


def _map(logits: Tensor, size) -> Tensor:
    """An unwritten number for each output pixel."""
    dtype = chunked.accumulation_dtype(logits)
    return torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)


def _cross_entropy_fake(logits, target, weight, size, mode, align_corners, scales, ignore_index, smoothing,
                        per_pixel):  # fmt: skip
    check_labels("upsample_cross_entropy", logits, target, size, weight)
    lse = _map(logits, size)
    return (torch.empty_like(lse) if per_pixel else lse.new_empty(2)), lse


def _cross_entropy_kernels(logits, target, weight, size, mode, align_corners, scales, ignore_index,
                           smoothing, per_pixel):  # fmt: skip
    check_labels("upsample_cross_entropy", logits, target, size, weight)
    lse = _map(logits, size)
    losses = torch.empty_like(lse) if per_pixel else None
    weight = None if weight is None else weight.contiguous()
    result = load_kernels().upsample_softmax_forward(
        planar(logits), target, weight, losses, lse, mode, align_corners, scales, ignore_index,
        smoothing,
    )  # fmt: skip
    return (losses if per_pixel else result.sum(0, dtype=torch.float64).float()), lse


def _cross_entropy_backward_fake(grad, logits, *rest):
    return _like(logits)


def _cross_entropy_backward_kernels(grad, logits, target, weight, lse, size, mode, align_corners, scales,
                                    ignore_index, smoothing):  # fmt: skip
    out = _like(logits)
    weight = None if weight is None else weight.contiguous()
    load_kernels().upsample_grad_logits(
        grad.float(), planar(logits), target, weight, lse, None, out,
        mode, align_corners, scales, ignore_index, smoothing,
    )  # fmt: skip
    return out


def _like(logits: Tensor) -> Tensor:
    """An unwritten tensor in the logits' shape, dtype and memory format: a gradient of theirs."""
    memory_format = output_format(logits, logits)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format)


def _argmax_fake(logits, size, mode, align_corners, scales, confidence):
    shape = (logits.shape[0], *size)
    probability = shape if confidence else (shape[0], 0, 0)
    return (
        torch.empty(shape, dtype=torch.int64, device=logits.device),
        torch.empty(probability, dtype=torch.float32, device=logits.device),
    )


def _argmax_kernels(logits, size, mode, align_corners, scales, confidence):
    labels, probability = _argmax_fake(logits, size, mode, align_corners, scales, confidence)
    load_kernels().upsample_argmax(
        planar(logits), labels, probability if confidence else None, mode, align_corners, scales
    )
    return labels, probability


def _dice_sums_fake(logits, target, size, mode, align_corners, scales, ignore_index):
    check_labels("upsample_dice", logits, target, size)
    lse = _map(logits, size)
    return lse.new_empty((3, logits.shape[1])), lse


def _dice_sums_kernels(logits, target, size, mode, align_corners, scales, ignore_index):
    check_labels("upsample_dice", logits, target, size)
    kernels, x, lse = load_kernels(), planar(logits), _map(logits, size)
    geometry = (mode, align_corners, scales)
    kernels.upsample_softmax_forward(x, None, None, None, lse, *geometry, ignore_index, 0.0)
    partials = kernels.upsample_dice_sums(x, target, lse, *geometry, ignore_index)
    return partials.sum(0, dtype=torch.float64).float(), lse


def _dice_backward_fake(grad, logits, *rest):
    return _like(logits)


def _dice_backward_kernels(grad, logits, target, lse, size, mode, align_corners, scales, ignore_index):
    kernels, x, mean = load_kernels(), planar(logits), torch.empty_like(lse)
    grad, geometry = grad.float().contiguous(), (mode, align_corners, scales)
    kernels.softmax_expectation(x, target, lse, grad, mean, *geometry)
    out = _like(logits)
    kernels.upsample_grad_logits(grad, x, target, None, lse, mean, out, *geometry, ignore_index, 0.0)
    return out


def _gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function(grad, logits, ...)` in the logits' memory format."""

    def run(grad, logits, *rest):
        return in_format(function(grad, logits, *rest), output_format(logits, logits))

    return run


_RESAMPLING = "SymInt[2] size, str mode, bool align_corners, float[]? scales"
CROSS_ENTROPY = Operator(
    f"upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, {_RESAMPLING}, "
    "SymInt ignore_index, float smoothing, bool per_pixel) -> (Tensor, Tensor)",
    kernels=_cross_entropy_kernels,
    reference=_reference(chunked.cross_entropy, formulas.cross_entropy),
    fake=_cross_entropy_fake,
    flops=lambda logits, target, weight, size, *_, **__: chunked.flops(logits, size),
)
CROSS_ENTROPY_BACKWARD = Operator(
    f"upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor lse, "
    f"{_RESAMPLING}, SymInt ignore_index, float smoothing) -> Tensor",
    kernels=_cross_entropy_backward_kernels,
    reference=_gradient(_reference(chunked.cross_entropy_gradient, formulas.cross_entropy_gradient)),
    fake=_cross_entropy_backward_fake,
    flops=lambda grad, logits, target, weight, lse, size, *_, **__: 2 * chunked.flops(logits, size),
)
ARGMAX = Operator(
    f"upsample_argmax(Tensor logits, {_RESAMPLING}, bool confidence) -> (Tensor, Tensor)",
    kernels=_argmax_kernels,
    reference=_reference(chunked.argmax, formulas.argmax),
    fake=_argmax_fake,
    per_sample=(0,),
    flops=lambda logits, size, *_, **__: chunked.flops(logits, size),
)
DICE_SUMS = Operator(
    f"upsample_dice_sums(Tensor logits, Tensor target, {_RESAMPLING}, SymInt ignore_index) "
    "-> (Tensor, Tensor)",
    kernels=_dice_sums_kernels,
    reference=_reference(chunked.dice_sums, formulas.dice_sums),
    fake=_dice_sums_fake,
    flops=lambda logits, target, size, *_, **__: chunked.flops(logits, size),
)
DICE_SUMS_BACKWARD = Operator(
    f"upsample_dice_sums_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, {_RESAMPLING}, "
    "SymInt ignore_index) -> Tensor",
    kernels=_dice_backward_kernels,
    reference=_gradient(_reference(chunked.dice_gradient, formulas.dice_gradient)),
    fake=_dice_backward_fake,
    flops=lambda grad, logits, target, lse, size, *_, **__: 2 * chunked.flops(logits, size),
)
