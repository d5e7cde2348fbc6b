"""Checks of the arguments of the dense CRF's functions and classes, one clear error a mistake."""

import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .._operator import is_traced
from .exact import Theta
from .filters import METHODS, NORMALIZATIONS
from .inference import Compatibility


def compute_dtype(values: Tensor) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_real(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {values.dtype}")


def check_sizes(other: Tensor, values: Tensor, name: str, axis: str = "D") -> None:
    """[B, D, ...] beside [B, C, ...], D at least 1; `axis` is what the message calls it."""
    sizes = [(t.dim(), *t.shape[:1], *t.shape[2:]) for t in (other, values)]
    if sizes[0] != sizes[1] or other.shape[1] == 0 or other.device != values.device:
        batch, *places = values.shape[:1] + values.shape[2:]
        shape = ", ".join(map(str, (batch, axis, *places)))
        raise ValueError(
            f"{name} must be [{shape}] on {values.device}, {axis} at least 1, "
            f"got {list(other.shape)} on {other.device}"
        )


def is_readable(tensor: Tensor) -> bool:
    """True if a check may look at values: on a GPU it would wait for them, tracing has none."""
    return tensor.is_cpu and not is_traced() and not is_fake(tensor)


def check_finite(values: Tensor, requirement: str) -> None:
    if is_readable(values) and not values.isfinite().all():
        raise ValueError(f"{requirement}, got NaN or infinity in it")


def check_energies(energies: Tensor, labels: int, name: str) -> None:
    """Check that of each point's energies, along dimension `labels`, one is finite and none NaN or -inf."""
    if not is_readable(energies) or energies.numel() == 0:
        return
    least = energies.amin(labels)
    if not (least > -math.inf).all():
        raise ValueError(f"{name} holds NaN or -inf")
    if not (least < math.inf).all():
        raise ValueError(f"{name} is +inf for all labels of a point: one of them must be possible")


def warn_of_one_label(labels: int) -> None:
    if labels == 1 and not is_traced():
        message = "one label, so that every probability is 1: a mask takes two, its background's as well"
        warnings.warn(message, stacklevel=3)


# A difference of all that an image in 0..1 has is half a standard deviation then.
_LARGEST_OF_0_TO_1 = 2.0


def warn_of_colors(image: Tensor, theta: Theta, name: str, theta_name: str) -> None:
    """Warn of floating-point colors so close that a standard deviation meant for 0..255 sees one color."""
    if not (is_readable(image) and image.is_floating_point() and image.numel()) or isinstance(theta, Tensor):
        return
    low, high = torch.aminmax(image.detach())
    if 0 <= low < high <= 1 and min(theta) > _LARGEST_OF_0_TO_1:
        message = (
            f"{name} is in 0..1, where {theta_name} {min(theta):g} sees one color: it is in the image's "
            f"units, so multiply the image by 255 or divide {theta_name} by it"
        )
        warnings.warn(message, stacklevel=3)


# So many standard deviations from zero, float32 is off by up to 2**-12 of one.
_FAR = 2.0**12


def far_offset(features: Tensor, points: tuple[int, ...], theta: float | Tensor = 1.0) -> Tensor:
    """The offset to take from features before they become float32, which has few digits for large numbers.

    Their mean over the dimensions that count points where they are float64 and far from zero; else zero, so
    that the places of ordinary features in a lattice stay what they are. Nothing waits for a device.
    """
    shape = [1 if i in points else n for i, n in enumerate(features.shape)]
    if features.dtype != torch.float64 or features.numel() == 0:
        return features.new_zeros(shape)
    places = features.detach()
    is_far = places.abs().amax(points, keepdim=True) > _FAR * theta
    return torch.where(is_far, places.mean(points, keepdim=True), 0)


def rounded(features: Tensor, dtype: torch.dtype, theta: float | Tensor = 1.0) -> Tensor:
    """Features [B, D, ...] in the dtype of the computation, an image's moved near zero if they lose by it."""
    wide = not features.is_floating_point() and features.dtype.itemsize > 2
    if features.dtype == dtype or not (wide or features.dtype == torch.float64):
        return features.to(dtype)
    if features.device.type == "mps":  # which has no float64
        return features.to(dtype)
    features = features.double()
    return (features - far_offset(features, tuple(range(2, features.dim())), theta)).to(dtype)


def check_not_complex(features: Tensor, name: str) -> Tensor:
    if features.is_complex():
        raise ValueError(f"{name} must be real, got {features.dtype}")
    return features


def check_features(features: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The features in the dtype of the computation."""
    features = check_not_complex(features, name).to(dtype)
    check_finite(features, f"{name} must be finite")
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


def check_tolerance(tolerance: float) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be a number of at least 0 and less than 1, got {tolerance!r}")
    return float(tolerance)


def positive(value: float | Sequence[float], name: str, count: int) -> tuple[float, ...]:
    """One positive number for all, or one for each."""
    # Of an array or a tensor [] too.
    several = isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0
    try:
        numbers = tuple(float(v) for v in (value if several else [value] * count))  # type: ignore[union-attr, arg-type]
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(0 < v < math.inf for v in numbers):
        raise ValueError(f"{name} must be one positive number or {count} of them, got {value!r}")
    return numbers


def check_theta(value: float | Theta, name: str, count: int, like: Tensor) -> Theta:
    """`count` standard deviations: numbers, or of a tensor [] or [count] a tensor [count] in like's dtype."""
    if not isinstance(value, Tensor):
        return positive(value, name, count)
    fits = value.dim() <= 1 and all(size == count for size in value.shape)
    if not fits or value.is_complex() or value.device != like.device:
        raise ValueError(
            f"{name} must be a number, [] or [{count}] on {like.device}, "
            f"got {list(value.shape)}, {value.dtype} on {value.device}"
        )
    if is_readable(value) and not (value.isfinite() & (value > 0)).all():
        raise ValueError(f"{name} must be positive and finite, got {value.tolist()}")
    return value.to(like.dtype).expand(count)


def check_compatibility(
    value: Compatibility, labels: int, name: str, dtype: torch.dtype, device: torch.device
) -> Compatibility:
    """A number as a float, a tensor in the dtype of the computation."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be a finite number or a tensor, got {value!r}")
        return float(value)
    fits = value.dim() <= 2 and all(size == labels for size in value.shape)
    if not fits or value.is_complex() or value.device != device:
        raise ValueError(
            f"{name} must be a number, [{labels}] or [{labels}, {labels}] (labels) on {device}, "
            f"got {list(value.shape)}, {value.dtype} on {value.device}"
        )
    return value.to(dtype)
