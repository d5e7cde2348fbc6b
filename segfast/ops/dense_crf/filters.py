"""The filter that serves a term, and its normalization."""

from typing import Protocol

import torch
from torch import Tensor

from .chunks import Passes
from .exact import AllPairsFilter, SeparableFilter, Theta
from .lattice import Lattice, LatticeFilter
from .lattice_gradient import FeatureLatticeFilter

METHODS = ("auto", "lattice", "exact")
NORMALIZATIONS = ("symmetric", "before", "after", None)


class Filter(Protocol):
    """A linear map of values [N, C], differentiable in them and in what it was made from."""

    method: str

    def __call__(self, values: Tensor) -> Tensor: ...

    def passes(self, values: Tensor) -> Passes:
        """The same result outside of autograd."""

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "Filter": ...


def feature_filter(
    features: Tensor, method: str, normalization: str | None, *, with_origin: bool = False
) -> Filter:
    """The Gaussian filter of points with features [N, D], already divided by their standard deviations.

    Differentiable in the features where they ask for it. `with_origin` is `Lattice`'s.
    """
    if choose_method(method, *features.shape) == "exact":
        return normalized(AllPairsFilter(features), features, normalization)
    learns = torch.is_grad_enabled() and features.requires_grad
    plain = (
        FeatureLatticeFilter(features) if learns else LatticeFilter(Lattice(features.detach(), with_origin))
    )
    return normalized(plain, features, normalization)


def grid_filter(
    size: tuple[int, int], theta: Theta, method: str, normalization: str | None, like: Tensor
) -> Filter:
    """The spatial Gaussian filter of an image; theta is (along x, along y) in pixels, numbers or a tensor."""
    if choose_grid_method(method, size) == "exact":
        separable = SeparableFilter(size, theta, like)
        return normalized(separable, like.new_empty(size[0] * size[1], 0), normalization)
    return feature_filter(grid_features(size, theta, like), "lattice", normalization)


def grid_features(size: tuple[int, int], theta: Theta, like: Tensor) -> Tensor:
    """[H W, 2]: (x / theta_x, y / theta_y) of the pixels in raster order."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in size)
    y, x = torch.meshgrid(rows / theta[1], columns / theta[0], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def normalized(plain: Filter, like: Tensor, normalization: str | None) -> Filter:
    """The filter with the row sums n = K 1 divided out, as `normalizers` says."""
    if normalization is None:
        return plain
    sums = plain(like.new_ones(like.shape[0], 1)).squeeze(1)
    return plain.scaled(*normalizers(sums, normalization))


def normalizers(sums: Tensor, normalization: str | None) -> tuple[Tensor | None, Tensor | None]:
    """The factors of values before and after a filter with these row sums.

    "symmetric" scales by n^-1/2 on both sides, "before" and "after" by 1/n on one side, None not at all.
    """
    if normalization is None:
        return None, None
    if normalization == "symmetric":
        factors = (sums + 1e-20).rsqrt()
        return factors, factors
    factors = (sums + 1e-20).reciprocal()
    return (factors, None) if normalization == "before" else (None, factors)


def choose_method(method: str, points: int, dim: int) -> str:
    """ "lattice" or "exact": as asked for, or with "auto" the cheaper one by the modeled cost."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method != "auto":
        return method
    return "exact" if _all_pairs_seconds(points) <= _lattice_seconds(points, dim) else "lattice"


def choose_grid_method(method: str, size: tuple[int, int]) -> str:
    """The same for the spatial Gaussian, whose exact form costs the sum of the sides a pixel."""
    if method != "auto":
        return choose_method(method, 1, 2)
    points = size[0] * size[1]
    return "exact" if _separable_seconds(points, sum(size)) <= _lattice_seconds(points, 2) else "lattice"


# A model of what ten filters of 21 channels take with their setup on one core. Only their order counts.
def _all_pairs_seconds(points: int) -> float:
    return 2e-8 * points**2


def _separable_seconds(points: int, sides: int) -> float:
    return 7e-9 * points * sides


def _lattice_seconds(points: int, dim: int) -> float:
    return 1e-3 + 7e-8 * points * (dim + 1) ** 2
