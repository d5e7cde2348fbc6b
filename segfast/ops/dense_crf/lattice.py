"""Gaussian filtering on the permutohedral lattice: splat, blur along each axis, slice.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010). The
arithmetic follows Kraehenbuehl's densecrf step by step, so that every point lies in the simplex it has there.

A point of D features lies in a simplex of D + 1 vertices, one of each remainder 0..D: all coordinates of a
vertex are congruent modulo D + 1. A vertex is known by one packed integer, and a step to a neighbour adds a
constant to it, so that one sort finds the vertices and one binary search an axis their neighbours. Every pass
is then a weighted sum of rows in a fixed order, which `embedding_bag` computes.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .chunks import chunks_of

_MOST_BITS = 62


class Lattice:
    """The vertices that points occupy: features [N, D], already divided by their standard deviations."""

    def __init__(self, features: Tensor):
        points, dim = features.shape
        floor, rank, self.weights = _simplices(features)
        strides, cells = _strides(floor)
        coordinates = floor - (floor.amin(1, keepdim=True) - 2)
        base = (coordinates[:-1] * strides[:-1, None]).sum(0)
        # From remainder r to r + 1, all coordinates grow by 1 but the one of rank D - r, which falls by D.
        falls = torch.empty_like(floor).scatter_(0, rank, strides[:, None].expand_as(rank)).flip(0)
        packed = torch.cat([base[None], base - falls[:-1].cumsum(0)])
        packed += torch.arange(dim + 1, device=packed.device)[:, None] * cells
        narrow = cells * (dim + 1) < 2**31
        index_type = torch.int32 if narrow else torch.int64
        keys, order = packed.T.flatten().to(index_type).sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=first[1:])
        starts = first.nonzero().flatten()

        self.dim, self.vertices, self.order = dim, starts.numel(), order
        index_type = torch.int32 if points * (dim + 1) < 2**31 else torch.int64
        # Splat: the bag of a vertex holds its points, in their order. Slice: the bag of a point its vertices.
        ends = torch.cat([starts, starts.new_tensor([order.numel()] * 2)]).to(index_type)
        self.splat = Bags(order.div(dim + 1, rounding_mode="floor").to(index_type), ends)
        vertex = torch.empty_like(self.splat.rows)
        vertex[order] = (first.cumsum(0) - 1).to(index_type)
        counting = torch.arange(max(points, self.vertices + 1) + 1, device=order.device, dtype=index_type)
        self.slice = Bags(vertex, counting[: points + 1] * (dim + 1))
        ends = counting[: self.vertices + 2] * 3
        keys = keys[starts]
        self.blurs = [
            Bags(_neighbours(keys, strides.tolist(), cells, axis).to(index_type), ends)
            for axis in range(dim + 1)
        ]
        self.blur_weights = features.new_tensor([1.0, 0.5, 0.5]).repeat(self.vertices + 1)


class Bags:
    """Which rows of a table each row of a result sums: b sums rows[ends[b]] up to rows[ends[b + 1]]."""

    def __init__(self, rows: Tensor, ends: Tensor):
        self.rows, self.count = rows, ends.numel() - 1
        self.chunks = chunks_of(self.count)
        bounds = [*ends[[chunk.start for chunk in self.chunks]].tolist(), rows.numel()]
        self._used = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._ends = [
            ends[chunk.start : chunk.stop + 1] - low for chunk, low in zip(self.chunks, bounds, strict=False)
        ]

    def sums(self, table: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """The weighted sums, a chunk of rows at a time."""
        for used, ends in zip(self._used, self._ends, strict=True):
            rows, factors = self.rows[used], weights[used]
            yield torch.embedding_bag(table, rows, ends, False, 0, False, factors, include_last_offset=True)[
                0
            ]

    def sum(self, table: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """All of them."""
        if out is None:
            out = table.new_empty(self.count, table.shape[1])
        for chunk, summed in zip(self.chunks, self.sums(table, weights), strict=True):
            out[chunk] = summed
        return out


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every point, the vertex of remainder 0, the rank of each coordinate, the barycentric weights.

    The first two are [D + 1, N] integers, the vertex in units of D + 1; the weights are [N, D + 1].
    """
    dim = features.shape[1]
    number = features.dtype
    # The blur spreads by this standard deviation (section 3.1 there); float32 constants as densecrf has them.
    spread = float(torch.tensor(math.sqrt(2 / 3) * (dim + 1), dtype=number))
    scales = [float(torch.tensor(spread / math.sqrt((i + 1) * (i + 2)), dtype=number)) for i in range(dim)]
    columns = features.T.contiguous()
    elevated = columns.new_empty(dim + 1, features.shape[0])
    total = torch.zeros_like(elevated[0])
    for i in range(dim, 0, -1):
        scaled = columns[i - 1] * scales[i - 1]
        torch.sub(total, scaled * i, out=elevated[i])
        total = total + scaled
    elevated[0] = total

    inverse = float(torch.tensor(1 / (dim + 1), dtype=number))
    floor = (elevated * inverse).round_()
    excess = floor.sum(0).to(torch.int64)
    rest = elevated - floor * (dim + 1)
    rank = torch.zeros_like(rest, dtype=torch.int64)
    for i in range(dim):
        smaller = rest[i] < rest[i + 1 :]
        rank[i] += smaller.sum(0)
        rank[i + 1 :] += ~smaller
    # The rounded vertex must lie on the plane of coordinates that sum to zero.
    rank += excess
    step = (rank < 0).to(torch.int64) - (rank > dim).to(torch.int64)
    rank += step * (dim + 1)
    floor = floor.to(torch.int64) + step

    rest = (elevated - floor * (dim + 1)) * inverse
    falling = torch.empty_like(rest).scatter_(0, dim - rank, rest)
    weights = torch.empty_like(rest)
    torch.sub(falling[1:], falling[:-1], out=weights[1:])
    torch.add(1 - falling[-1], falling[0], out=weights[0])
    return floor, rank, weights.T.contiguous()


def _strides(floor: Tensor) -> tuple[Tensor, int]:
    """How far apart the packed integers of neighbouring coordinates are, and how many integers there are.

    The last coordinate follows from the others and has stride 0. Room for one neighbour on either side.
    """
    ranges = (floor.amax(1) - floor.amin(1) + 4).tolist()[:-1]
    strides = [0]
    cells = 1
    for size in reversed(ranges):
        strides.insert(0, cells)
        cells *= size
    bits = math.log2(cells * len(strides))
    if bits >= _MOST_BITS:
        raise ValueError(
            f"features: they span 2**{bits:.0f} lattice cells, at most 2**{_MOST_BITS} can be told apart: "
            "larger standard deviations, fewer features, or method='exact'"
        )
    return floor.new_tensor(strides), cells


def _neighbours(keys: Tensor, strides: list[int], cells: int, axis: int) -> Tensor:
    """[3 (V + 1)]: each vertex and its two neighbours along an axis; where none is V, a row of zeros."""
    count = keys.numel()
    # One axis grows by D, the others fall by 1: from remainder r to r - 1, and from 0 to D.
    wanted = keys + (strides[axis] - cells)
    lowest = int(torch.searchsorted(keys, cells))
    wanted[:lowest] += cells * len(strides) - sum(strides)
    position = torch.searchsorted(keys, wanted).clamp_(max=count - 1)
    everyone = torch.arange(count + 1, device=keys.device)
    after = torch.full_like(everyone, count)
    after[:-1] = torch.where(keys[position] == wanted, position, count)
    before = torch.full_like(everyone, count)
    before[after] = everyone
    # Several had no neighbour and wrote the last place.
    before[-1] = count
    return torch.stack([everyone, after, before], 1).flatten()


class LatticeFilter:
    """diag(after) L diag(before), L the lattice's approximation of exp(-|f_i - f_j|^2 / 2); values [N, C].

    `before` and `after` are [N] or None.
    """

    method = "lattice"

    def __init__(
        self,
        lattice: Lattice,
        before: Tensor | None = None,
        after: Tensor | None = None,
        reverse: bool = False,
    ):
        self.lattice, self.before, self.after, self.reverse = lattice, before, after, reverse
        weights = lattice.weights
        splat = weights if before is None else weights * before[:, None]
        self._splat_weights = splat.flatten()[lattice.order]
        alpha = 1 / (1 + 2.0**-lattice.dim)
        self._slice_weights = (weights * (alpha if after is None else after[:, None] * alpha)).flatten()
        self._transposed: LatticeFilter | None = None
        self._tables: Tensor | None = None

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "LatticeFilter":
        return LatticeFilter(self.lattice, before, after, self.reverse)

    @property
    def transposed(self) -> "LatticeFilter":
        if self._transposed is None:
            self._transposed = LatticeFilter(self.lattice, self.after, self.before, not self.reverse)
        return self._transposed

    def __call__(self, values: Tensor) -> Tensor:
        return _LatticeFilter.apply(values, self)

    def chunks(self, values: Tensor) -> Iterator[Tensor]:
        return self.lattice.slice.sums(self._blurred(values), self._slice_weights)

    def compute(self, values: Tensor) -> Tensor:
        return self.lattice.slice.sum(self._blurred(values), self._slice_weights)

    def _blurred(self, values: Tensor) -> Tensor:
        """The vertices' values [V + 1, C], the last row zero."""
        lattice = self.lattice
        if self._tables is None or self._tables.shape[2] != values.shape[1]:
            # Kept from call to call: fresh memory would cost as much as the blur.
            self._tables = values.new_empty(2, lattice.vertices + 1, values.shape[1])
        now, spare = self._tables
        lattice.splat.sum(values.contiguous(), self._splat_weights, now)
        for blur in reversed(lattice.blurs) if self.reverse else lattice.blurs:
            blur.sum(now, lattice.blur_weights, spare)
            now, spare = spare, now
        return now


class _LatticeFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, lattice_filter):
        ctx.lattice_filter = lattice_filter
        return lattice_filter.compute(values)

    @staticmethod
    def backward(ctx, grad):
        return _LatticeFilter.apply(grad, ctx.lattice_filter.transposed), None
