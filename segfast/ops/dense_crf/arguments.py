"""What the functions and classes of the dense CRF ask of their arguments, one clear error a mistake."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from .filters import METHODS, NORMALIZATIONS
from .inference import Compatibility


def compute_dtype(values: Tensor) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_real(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {values.dtype}")


def check_sizes(other: Tensor, values: Tensor, name: str) -> None:
    """[B, D, ...] beside [B, C, ...], D at least 1."""
    sizes = [(t.dim(), *t.shape[:1], *t.shape[2:]) for t in (other, values)]
    if sizes[0] != sizes[1] or other.shape[1] == 0 or other.device != values.device:
        batch, *places = values.shape[:1] + values.shape[2:]
        raise ValueError(
            f"{name} must be {[batch, 'D', *places]} on {values.device}, D at least 1, "
            f"got {list(other.shape)} on {other.device}"
        )


def check_features(features: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The features in the dtype of the computation."""
    if features.is_complex():
        raise ValueError(f"{name} must be real, got {features.dtype}")
    if features.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient here: pass {name}.detach()")
    features = features.to(dtype)
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return features


def check_options(method: str, normalization: str | None) -> None:
    for name, value, known in (("method", method, METHODS), ("normalization", normalization, NORMALIZATIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_iterations(iterations: int) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or iterations < 0:
        raise ValueError(f"the number of iterations must be an int of at least 0, got {iterations!r}")


def check_count(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return int(value)


def positive(value: float | Sequence[float], name: str, count: int) -> tuple[float, ...]:
    """One positive number for all, or one for each."""
    given = value if np.iterable(value) else [value] * count
    numbers = tuple(float(v) for v in given)
    if len(numbers) != count or not all(math.isfinite(v) and v > 0 for v in numbers):
        raise ValueError(f"{name} must be one positive number or {count} of them, got {value!r}")
    return numbers


def check_compatibility(
    value: Compatibility, labels: int, name: str, dtype: torch.dtype, device: torch.device
) -> Compatibility:
    """A number as a float, a tensor in the dtype of the computation."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number or a tensor, got {value!r}")
        return float(value)
    if tuple(value.shape) not in ((), (labels,), (labels, labels)) or value.device != device:
        raise ValueError(
            f"{name} must be a number, [{labels}] or [{labels}, {labels}] (labels) on {device}, "
            f"got {list(value.shape)} on {value.device}"
        )
    return value.to(dtype)
