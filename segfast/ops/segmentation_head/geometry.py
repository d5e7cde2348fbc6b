"""The arguments of an interpolation, as torch.nn.functional.interpolate takes them, resolved and applied."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODES = ("bilinear", "nearest")


class Resampling(NamedTuple):
    """An interpolation as ATen's operators take it; `scales` are the factors where factors were given."""

    size: tuple[int, int]
    mode: str
    align_corners: bool
    scales: tuple[float, float] | None


def resolve(
    operation: str,
    logits: Tensor,
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None,
    target: Tensor | None = None,
) -> Resampling:
    """Check the logits and the interpolation's arguments; with a target its size serves where none is given.

    Raises what torch.nn.functional.interpolate raises.
    """
    if logits.dim() != 4 or logits.shape[1] == 0 or logits.shape[2] == 0 or logits.shape[3] == 0:
        raise RuntimeError(
            f"{operation}: logits must be [N, C, H, W] with C, H, W > 0, got {list(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise RuntimeError(f"{operation}: logits must be floating point, got {logits.dtype}")
    if mode not in MODES:
        raise ValueError(f"{operation}: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "nearest" and align_corners:
        raise ValueError(f'{operation}: align_corners goes with mode "bilinear" only')
    if size is not None and scale_factor is not None:
        raise ValueError(f"{operation}: only one of size or scale_factor should be defined")
    scales = None
    if scale_factor is not None:
        factor_h, factor_w = _two(operation, "scale_factor", scale_factor, (int, float))
        if not (0 < factor_h < math.inf and 0 < factor_w < math.inf):
            raise ValueError(f"{operation}: scale_factor must be positive, got {scale_factor}")
        scales = (float(factor_h), float(factor_w))
        size = [math.floor(n * f) for n, f in zip(logits.shape[2:], scales, strict=True)]
    elif size is None:
        if target is None:
            raise ValueError(f"{operation}: either size or scale_factor should be defined")
        _check_class_indices(operation, target)
        size = target.shape[1:]
    height, width = _two(operation, "size", size, (int, torch.SymInt))
    if height < 1 or width < 1:
        raise RuntimeError(f"{operation}: the output's size must be positive, got {height}x{width}")
    return Resampling((height, width), mode, bool(align_corners), scales)


def _two(operation: str, name: str, value: Any, kinds: tuple[type, ...]) -> list:
    values = [value, value] if isinstance(value, kinds) else list(value)
    if len(values) != 2 or not all(isinstance(v, kinds) for v in values):
        raise ValueError(f"{operation}: {name} must be a number or two, got {value!r}")
    return values


def _check_class_indices(operation: str, target: Tensor) -> None:
    """Raise unless `target` is three-dimensional and of an integer dtype."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(
            f"{operation}: target must hold class indices (int64, int32 or uint8), got {target.dtype} "
            f"of shape {list(target.shape)}"
        )
    if target.dim() != 3:
        raise RuntimeError(f"{operation}: target must be [N, H, W], got {list(target.shape)}")


def check_labels(
    operation: str, logits: Tensor, target: Tensor, size: Any, weight: Tensor | None = None
) -> None:
    """Raise unless `target` holds a class index for each output pixel, `weight` a number for each class."""
    _check_class_indices(operation, target)
    if target.shape[0] != logits.shape[0] or tuple(target.shape[1:]) != tuple(size):
        expected = [logits.shape[0], *size]
        raise RuntimeError(f"{operation}: target must be [N, H, W] = {expected}, got {list(target.shape)}")
    classes = logits.shape[1]
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        raise RuntimeError(
            f"{operation}: weight must be [{classes}] (classes) and floating point, "
            f"got {list(weight.shape)} of {weight.dtype}"
        )
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise RuntimeError(
                f"{operation}: logits and {name} must share a device, got {logits.device} and {tensor.device}"
            )


def upsample(logits: Tensor, size, mode: str, align_corners: bool, scales) -> Tensor:
    """`torch.nn.functional.interpolate`, from resolved arguments; differentiable any number of times."""
    scale_h, scale_w = (None, None) if scales is None else scales
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest2d(logits, size, scale_h, scale_w)
    return torch.ops.aten.upsample_bilinear2d(logits, size, align_corners, scale_h, scale_w)


def upsample_adjoint(grad: Tensor, shape, mode: str, align_corners: bool, scales) -> Tensor:
    """The gradient of `upsample` for an input of `shape`."""
    scale_h, scale_w = (None, None) if scales is None else scales
    size = grad.shape[2:]
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest2d_backward(grad, size, shape, scale_h, scale_w)
    return torch.ops.aten.upsample_bilinear2d_backward(grad, size, shape, align_corners, scale_h, scale_w)


def planar(logits: Tensor) -> Tensor:
    """`logits` itself if pixels of a row lie side by side, else a copy, class plane after class plane.

    The kernels' threads own neighboring cells of a row. Low-resolution logits are small beside what is
    computed from them: a copy costs less than gathering a class from all over channels_last memory. Written
    once, a gradient needs no such copy.
    """
    return logits if logits.stride(3) == 1 or logits.shape[3] == 1 else logits.contiguous()
