"""A loss or labels of logits at a lower resolution than the target's: the functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import _INTERPRETING, EMPTY, kernel_reason_not, use_triton
from .._gpu import choose, reason_not
from . import autograd, chunked, formulas
from .geometry import Resampling, check_labels, resolve, upsample
from .operators import ARGMAX

OPERATIONS = (
    "upsample_softmax_forward",
    "upsample_grad_logits",
    "upsample_argmax",
    "upsample_dice_sums",
    "softmax_expectation",
)
MOST_CLASSES = 1024


def can_use_triton(choice: str, logits: Tensor, name: str, chosen: str | None) -> str | None:
    """None if our kernels serve the call, else why not; `chosen` is what `_gpu.choose` said of `name`."""
    reason = kernel_reason_not(choice, logits)
    classes = logits.shape[1]
    if reason is None and classes > MOST_CLASSES:
        reason = f"there are {classes} classes, more than {MOST_CLASSES}"
    if reason is None and logits.numel() == 0:
        reason = EMPTY
    if reason is not None or choice == "triton":
        return reason
    return reason_not(name, chosen)


def _uses_operator(
    name: str, logits: Tensor, resampling: Resampling, differentiates: bool, *options: Any
) -> bool:
    """True if our operators run: kernels, or "aten"'s tiles. Else PyTorch's functions run one by one.

    `options` are what a choice may depend on beside sizes and resampling.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return False  # PyTorch's own differentiate forwards
    known = (resampling.mode, resampling.align_corners, *options)
    sizes = ((logits.shape[0], 1, *resampling.size),)
    chosen = choose(name, (logits,), (), known, differentiates, sizes=sizes)
    if use_triton(name, can_use_triton, logits, name, chosen):
        return True
    return logits.is_cpu and not _INTERPRETING and chunked.worth_tiling(name, logits, resampling.size)


def _result_dtype(logits: Tensor) -> torch.dtype:
    """The logits', but fp32 where autocast lets torch's losses compute in it."""
    kind = logits.device.type
    casts = not logits.is_meta and torch.is_autocast_enabled(kind) and logits.dtype != torch.float64
    return torch.float32 if casts else logits.dtype


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(interpolate(logits, ...), target, ...)` of torch.nn.functional, in one pass.

    The full-size logits never exist on our kernels, nor on a CPU unless they are few (under 8 classes, or a
    megabyte), where torch's two functions are as good. On a GPU "aten" is those two functions.
    Interpolates, and sums, in float32 (float64 logits: in it). Deterministic, which torch's bilinear backward
    on a GPU is not. Differentiable twice and more, in the logits alone.

    Args:
        logits: [N, C, H, W]; float16, bfloat16 or float32 and C <= 1024 on our kernels.
        target: class indices [N, OH, OW]; int64, int32 or uint8. One that is no class and not
            `ignore_index` raises IndexError on a CPU and makes the loss NaN on our kernels.
        size, scale_factor, align_corners: torch.nn.functional.interpolate's. With neither of the first two
            the target's size.
        mode: "bilinear" or "nearest".
        weight: [C], of the classes; not differentiated.
        ignore_index, label_smoothing, reduction: torch.nn.functional.cross_entropy's.

    Returns:
        [] or, with reduction "none", [N, OH, OW]; of the logits' dtype, float32 under autocast.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together.
        ValueError: an unknown mode or reduction, a label_smoothing outside 0 to 1, both or no sizes.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Szegedy et al.,
    "Rethinking the Inception architecture" (2016), section 7, for label smoothing.

    Example:
        >>> import torch, segfast
        >>> logits, target = torch.randn(2, 21, 16, 16), torch.randint(21, (2, 64, 64))
        >>> segfast.functional.upsample_cross_entropy(logits, target, scale_factor=4).shape
        torch.Size([])
    """
    name = "upsample_cross_entropy"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{name}: reduction must be "none", "mean" or "sum", got {reduction!r}')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    resampling = resolve(name, logits, size, scale_factor, mode, align_corners, target)
    check_labels(name, logits, target, resampling.size, weight)
    weight = None if weight is None else weight.detach()
    differentiates = torch.is_grad_enabled() and logits.requires_grad
    smoothing = float(label_smoothing)
    options = (weight is not None, smoothing > 0, reduction)
    if not _uses_operator(name, logits, resampling, differentiates, *options):
        return F.cross_entropy(
            upsample(logits, *resampling),
            target.long(),  # with bytes torch has no backward
            None if weight is None else weight.to(_result_dtype(logits)),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    per_pixel = reduction == "none"
    result = autograd.cross_entropy(logits, target, weight, *resampling, ignore_index, smoothing, per_pixel)
    if reduction == "mean":
        result = result[0] / result[1]
    elif reduction == "sum":
        result = result[0]
    return result.to(_result_dtype(logits))


def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`interpolate(logits, ...).argmax(1)` in one pass; no gradient.

    Interpolates in float32, so that labels may differ from those of 16-bit full-size logits where two
    classes are as good as equal. Of equal logits the first class's label.

    Args:
        logits: [N, C, H, W]; float16, bfloat16 or float32 and C <= 1024 on our kernels.
        size, scale_factor, mode, align_corners: torch.nn.functional.interpolate's; "bilinear" or "nearest".
        return_confidence: also the softmax probability of each label.

    Returns:
        labels int64 [N, OH, OW], or (labels, confidence float32 [N, OH, OW]).

    Raises:
        RuntimeError: logits of another shape, or not floating point.
        ValueError: an unknown mode, both or no sizes.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Example:
        >>> import torch, segfast
        >>> labels, confidence = segfast.functional.upsample_argmax(
        ...     torch.randn(1, 21, 16, 16), size=(60, 80), return_confidence=True)
        >>> labels.shape, labels.dtype, confidence.dtype
        (torch.Size([1, 60, 80]), torch.int64, torch.float32)
    """
    resampling = resolve("upsample_argmax", logits, size, scale_factor, mode, align_corners)
    logits = logits.detach()
    if _uses_operator("upsample_argmax", logits, resampling, False, return_confidence):
        labels, confidence = ARGMAX(logits, *resampling, return_confidence)
    else:
        z = upsample(logits, *resampling)
        if return_confidence:
            largest, labels = z.float().max(1)
            confidence = (largest - torch.logsumexp(z.float(), 1)).exp()
        else:
            labels = z.argmax(1)
    return (labels, confidence) if return_confidence else labels


def upsample_dice(
    logits: Tensor,
    target: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    ignore_index: int = -100,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """Soft dice loss of softmax(interpolate(logits, ...)) in one pass, its sums taken over the whole batch.

    With p the probabilities of a class and t its one-hot labels, both zero where ignored,
    1 - (2 sum(p t) + smooth) / max(sum(p + t) + smooth, eps), or 0 for a class no pixel has; averaged over
    all classes. Differentiable twice and more, in the logits alone.

    Args:
        logits: [N, C, H, W]; float16, bfloat16 or float32 and C <= 1024 on our kernels.
        target: class indices [N, OH, OW]; int64, int32 or uint8. A label that is no class raises on a CPU
            and makes the loss NaN on our kernels.
        size, scale_factor, mode, align_corners: as for `upsample_cross_entropy`.
        ignore_index: the label of pixels that do not count.
        smooth: added above and below the fraction.
        eps: the least denominator.

    Returns:
        [], of the logits' dtype, float32 under autocast.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together.
        ValueError: an unknown mode, both sizes.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Milletari et al., "V-Net" (2016), equation 3 without its squares, as `DiceLoss("multiclass")` of
    segmentation_models_pytorch has it.

    Example:
        >>> import torch, segfast
        >>> logits, target = torch.zeros(1, 4, 8, 8), torch.randint(4, (1, 32, 32))
        >>> loss = segfast.functional.upsample_dice(logits, target, scale_factor=4)
    """
    resampling = resolve("upsample_dice", logits, size, scale_factor, mode, align_corners, target)
    check_labels("upsample_dice", logits, target, resampling.size)
    differentiates = torch.is_grad_enabled() and logits.requires_grad
    if _uses_operator("upsample_dice", logits, resampling, differentiates):
        sums = autograd.dice_sums(logits, target, *resampling, ignore_index)
    else:
        sums = formulas.dice_sums_of(upsample(formulas.wide(logits), *resampling), target, ignore_index)
    hits, probabilities, pixels = sums
    score = (2 * hits + smooth) / (probabilities + pixels + smooth).clamp_min(eps)
    loss = torch.where(pixels > 0, 1 - score, 0.0).mean()
    return loss.to(_result_dtype(logits))
