"""The simplex of the permutohedral lattice that each point lies in, and which points are too far for one."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from .._threads import each
from .chunks import chunks_of


def check_digits(features: Tensor) -> None:
    """Raises ValueError for features [N, D], divided by their standard deviations, that are too large."""
    dim, dtype = features.shape[1], features.dtype
    farthest, most = features.abs().amax().item(), _farthest(dim, dtype)
    if not farthest < most:
        raise ValueError(
            f"features: one is {farthest:.3g} standard deviations from zero, and {dtype} tells points of "
            f"{dim} features apart only where all are less than {most:.3g} from it: larger standard "
            "deviations, features nearer zero, or method='exact'"
        )


def _farthest(dim: int, dtype: torch.dtype) -> float:
    """How many standard deviations from zero features must stay for a simplex to be found.

    Elevated coordinates are then less than M = 1 / (2 eps), 2**22 in float32, which our kernels ask too, and
    a quarter of one is told apart. Each rounds by 3 M eps / 2 at most, and their sum, which should be zero,
    is off by (3 D + D (D - 1) / 2) / 4 at most. Rounded to multiples of D + 1, each by less than D / 2 + 1,
    they sum to less than D + 2 of these, which one step of `_simplices` undoes: ranks are a permutation. That
    holds up to 2 M. Beyond, weights are wrong first, and farther out ranks are no permutation.
    """
    reach = sum([1 / math.sqrt((i + 1) * (i + 2)) for i in range(dim)])
    return 1 / (2 * torch.finfo(dtype).eps) / (_spread(dim) * reach)


def _spread(dim: int) -> float:
    """The standard deviation by which the blur spreads (section 3.1 there)."""
    return math.sqrt(2 / 3) * (dim + 1)


def simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every point, the vertex of remainder 0, the rank of each coordinate, the barycentric weights.

    The first two are [D + 1, N] integers, the vertex in units of D + 1; the weights are [N, D + 1].
    """
    points, dim = features.shape
    floor = torch.empty(dim + 1, points, device=features.device, dtype=torch.int64)
    rank, weights = torch.empty_like(floor), features.new_empty(points, dim + 1)

    def write(rows: slice) -> None:
        floor[:, rows], rank[:, rows], weights[rows] = _simplices(features[rows])

    each(functools.partial(write, rows) for rows in chunks_of(points))
    return floor, rank, weights


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`simplices`, of a chunk of points."""
    dim = features.shape[1]
    rounded = np.float64 if features.dtype == torch.float64 else np.float32
    # Float32 constants as densecrf has them.
    spread = float(rounded(_spread(dim)))
    columns = features.new_empty(dim, features.shape[0])
    for i in range(dim):
        scale = float(rounded(spread / math.sqrt((i + 1) * (i + 2))))
        torch.mul(features[:, i], scale, out=columns[i])
    elevated = columns.new_empty(dim + 1, features.shape[0])
    total = torch.zeros_like(elevated[0])
    for i in range(dim, 0, -1):
        torch.sub(total, columns[i - 1] * i, out=elevated[i])
        total += columns[i - 1]
    elevated[0] = total

    inverse = float(rounded(1 / (dim + 1)))
    floor = (elevated * inverse).round_()
    rest = elevated - floor * (dim + 1)
    # How many coordinates come before each: all of a lower index but those that are smaller ...
    rank = torch.arange(dim + 1, device=rest.device, dtype=torch.int16)[:, None].repeat(1, rest.shape[1])
    for i in range(dim):
        smaller = (rest[i] < rest[i + 1 :]).view(torch.int8)
        rank[i + 1 :] -= smaller
        for one in smaller:
            rank[i] += one
    # ... turned round, as the rounded vertex must lie on the plane of coordinates that sum to zero.
    rank += floor.sum(0).to(torch.int16)
    step = (rank < 0).view(torch.int8) - (rank > dim).view(torch.int8)
    rank += step * (dim + 1)
    floor += step
    # Of features that are too large, which only `Lattice` refuses, a rank is still an index.
    rank.clamp_(0, dim)

    torch.sub(elevated, floor * (dim + 1), out=rest).mul_(inverse)
    place = rank.to(torch.int64)
    falling = torch.empty_like(rest).scatter_(0, dim - place, rest)
    torch.sub(falling[1:], falling[:-1], out=rest[1:])
    torch.add(1 - falling[-1], falling[0], out=rest[0])
    return floor, place, rest.T
