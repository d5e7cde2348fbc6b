"""The difference of two results of one model, for the commands that compare them."""

import dataclasses
import math

import torch
from torch import Tensor

from ..kernels._device import dot_precision


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference, absolute and relative to the reference's largest value, and where it is."""

    absolute: float
    relative: float
    where: str


def worst(reference: dict[str, Tensor], result: dict[str, Tensor]) -> Difference:
    """The largest relative difference; each tensor's is relative to its own largest value.

    Or to a thousandth of the largest of all: a bias before batch norm has a gradient of rounding alone.
    """
    if reference.keys() != result.keys():
        return Difference(math.nan, math.nan, f"only one has {', '.join(reference.keys() ^ result.keys())}")
    scales = {name: _largest(t[t.isfinite()]) for name, t in reference.items()}
    floor = max(scales.values(), default=0.0) / 1000
    found = []
    for name, expected in reference.items():
        actual = result[name]
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            was, became = (f"{list(t.shape)} {name_of(t.dtype)}" for t in (expected, actual))
            return Difference(math.nan, math.nan, f"{name}: {was} became {became}")
        same = (expected == actual) | (expected.isnan() & actual.isnan())
        absolute = _largest((expected.double() - actual.double()).masked_fill(same, 0))
        scale = max(scales[name], floor)
        relative = absolute / scale if scale else math.inf if absolute else 0.0
        found.append(Difference(absolute, relative, name))
    # NaN first: it compares false with everything.
    return max(found, key=lambda d: (math.isnan(d.relative), d.relative))


def _largest(t: Tensor) -> float:
    return t.detach().abs().max().item() if t.numel() else 0.0


def roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """The precision of products in this dtype."""
    if dtype == torch.float32 and device.type == "cuda" and dot_precision(dtype) == "tf32":
        return 2.0**-10  # of tf32
    return torch.finfo(dtype).eps


def error_line(what: str, difference: Difference) -> str:
    """A line on a difference."""
    size = f"{difference.absolute:.3g}, {difference.relative:.3g} of the largest value"
    return f"{what}: {size} ({difference.where})"


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as torch has it."""
    return str(dtype).removeprefix("torch.")
