"""Gaussian filtering on the permutohedral lattice: splat, blur along each axis, slice.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010). The
arithmetic follows Kraehenbuehl's densecrf step by step, so that every point lies in the simplex it has there.

A point of D features lies in a simplex of D + 1 vertices, one of each remainder 0..D: all coordinates of a
vertex are congruent modulo D + 1. A vertex is known by one packed integer, and a step to a neighbor adds a
constant to it, so that one sort finds the vertices and one binary search an axis their neighbors. Every pass
is then a weighted sum of rows in a fixed order, which `embedding_bag` computes.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._threads import Task, each, on_threads
from .chunks import Passes, chunks_of
from .simplices import check_digits, simplices

_MOST_BITS = 62


class Lattice:
    """The vertices that points occupy: features [N, D], already divided by their standard deviations.

    Args:
        with_origin: the vertices around the point zero belong to the lattice as well. densecrf, which takes
            points by fours, has them where N is no multiple of four.
    """

    def __init__(self, features: Tensor, with_origin: bool = False):
        on_threads(features, functools.partial(self._build, features, with_origin))

    def _build(self, features: Tensor, with_origin: bool) -> None:
        points, dim = features.shape
        check_digits(features)
        floor, rank, self.weights = simplices(features)
        packing = _Packing(floor, with_origin)
        # One row a remainder, and the remainder is the highest part of a key.
        keys = torch.empty_like(floor)
        each(functools.partial(packing.vertices, floor, rank, keys, rows) for rows in chunks_of(points))
        remainders = [_Remainder(row, packing.cells * (dim + 1)) for row in keys]
        each(remainder.sort for remainder in remainders)
        del floor, rank, keys
        firsts = [remainder.starts.numel() for remainder in remainders]
        keys = torch.cat([remainder.keys for remainder in remainders])
        starts = torch.cat([remainder.starts + i * points for i, remainder in enumerate(remainders)])
        index_type = torch.int32 if points * (dim + 1) < 2**31 else torch.int64
        moved = torch.arange(keys.numel(), device=keys.device, dtype=index_type)
        if with_origin:
            keys, starts, moved = _inserted(keys, starts, packing.origin(), points * (dim + 1))
            moved = moved.to(index_type)

        self.dim, self.vertices = dim, starts.numel()
        # Where in the weights, taken as one row, those of the sorted vertices are.
        self.order = torch.empty(dim + 1, points, device=keys.device, dtype=torch.int64)
        splat = torch.empty(dim + 1, points, device=keys.device, dtype=index_type)
        vertex = torch.empty(points, dim + 1, device=keys.device, dtype=index_type)
        neighbors = [
            torch.empty(self.vertices + 1, 3, device=keys.device, dtype=index_type) for _ in range(dim + 1)
        ]
        each(
            [functools.partial(packing.neighbors, keys, i, out) for i, out in enumerate(neighbors)]
            + [
                functools.partial(remainder.place, i, of, splat[i], self.order[i], vertex[:, i])
                for i, (remainder, of) in enumerate(zip(remainders, moved.split(firsts), strict=True))
            ]
        )
        self.order = self.order.flatten()
        # Splat: the bag of a vertex holds its points, in their order. Slice: the bag of a point its vertices.
        ends = torch.cat([starts, starts.new_tensor([self.order.numel()] * 2)]).to(index_type)
        self.splat = Bags(splat.flatten(), ends)
        counting = torch.arange(max(points, self.vertices + 1) + 1, device=keys.device, dtype=index_type)
        self.slice = EqualBags(vertex.flatten(), counting[: points + 1] * (dim + 1))
        ends = counting[: self.vertices + 2] * 3
        self.blurs = [EqualBags(rows.flatten(), ends) for rows in neighbors]
        self.blur_weights = features.new_tensor([1.0, 0.5, 0.5]).repeat(self.vertices + 1)


class _Remainder:
    """The vertices of one remainder: keys [N], one a point, which `sort` overwrites."""

    def __init__(self, keys: Tensor, most: int):
        self.keys, self._most = keys, most

    def sort(self) -> None:
        """The keys in ascending order, each once; where its points start, which are in their order."""
        keys, self._points = sorted_keys(self.keys, self._most)
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=first[1:])
        self.starts = first.nonzero().flatten()
        self._vertex = first.cumsum(0).sub_(1)
        self.keys = keys[self.starts]

    def place(self, remainder: int, moved: Tensor, splat: Tensor, order: Tensor, vertex: Tensor) -> None:
        """Writes [N] each: the points by vertices, where their weights are, and of each point the vertex.

        moved: the places of the vertices among all.
        """
        splat.copy_(self._points)
        torch.add(self._points * vertex.stride(0), remainder, out=order)
        vertex[self._points] = moved[self._vertex]


class Bags:
    """The rows of a table that each row of a result sums: b sums rows[ends[b]] up to rows[ends[b + 1]]."""

    def __init__(self, rows: Tensor, ends: Tensor):
        self.rows, self.count = rows, ends.numel() - 1
        chunks = chunks_of(self.count)
        bounds = [*ends[[chunk.start for chunk in chunks]].tolist(), rows.numel()]
        self._chunks = [
            _Chunk(chunk, slice(low, high), ends[chunk.start : chunk.stop + 1] - low)
            for chunk, (low, high) in zip(chunks, itertools.pairwise(bounds), strict=True)
        ]

    def chunks(self) -> Sequence["_Chunk"]:
        """All bags."""
        return self._chunks

    def parts(self, table: Tensor, weights: Tensor, out: Tensor) -> list[Task]:
        """The tasks after which all weighted sums are in `out`."""
        return [functools.partial(self._write, chunk, table, weights, out) for chunk in self.chunks()]

    def sum(self, table: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """All of them."""
        if out is None:
            out = table.new_empty(self.count, table.shape[1])
        each(self.parts(table, weights, out))
        return out

    def _sums(self, chunk: "_Chunk", table: Tensor, weights: Tensor) -> Tensor:
        _, used, ends = chunk
        rows, factors = self.rows[used], weights[used]
        return torch.embedding_bag(table, rows, ends, False, 0, False, factors, include_last_offset=True)[0]

    def _write(self, chunk: "_Chunk", table: Tensor, weights: Tensor, out: Tensor) -> None:
        out[chunk.bags] = self._sums(chunk, table, weights)


class EqualBags(Bags):
    """Those that all hold the same number of rows: any of them can be summed at once."""

    def __init__(self, rows: Tensor, ends: Tensor):
        self.rows, self.count, self._ends = rows, ends.numel() - 1, ends
        self._size = rows.numel() // self.count

    def chunks(self) -> Sequence["_Chunk"]:
        return [self._chunk(bags) for bags in chunks_of(self.count)]

    def part(self, bags: slice, table: Tensor, weights: Tensor) -> Tensor:
        """The weighted sums of some bags."""
        return self._sums(self._chunk(bags), table, weights)

    def _chunk(self, bags: slice) -> "_Chunk":
        used = slice(bags.start * self._size, bags.stop * self._size)
        return _Chunk(bags, used, self._ends[: bags.stop - bags.start + 1])


class _Chunk(NamedTuple):
    """Some bags, the rows that they hold, and where among these each begins, and the last one ends."""

    bags: slice
    used: slice
    ends: Tensor


class _Packing:
    """Vertices as integers: key = remainder * cells + sum of (coordinate - lowest) * stride.

    Coordinates are in units of D + 1, the remainder apart. The last one follows from the others and has
    stride 0. There is room for one neighbor on either side.
    """

    def __init__(self, floor: Tensor, with_origin: bool):
        low, high = floor.amin(1), floor.amax(1)
        if with_origin:
            low, high = low.clamp(max=0), high.clamp(min=0)
        self.dim = floor.shape[0] - 1
        self.cells, self.strides = 1, [0]
        # In integers of any size.
        for least, most in reversed([*zip(low.tolist(), high.tolist(), strict=True)][:-1]):
            self.strides.insert(0, self.cells)
            self.cells *= most - least + 4
        bits = math.log2(self.cells * (self.dim + 1))
        if bits >= _MOST_BITS:
            raise ValueError(
                f"features: they span 2**{bits:.0f} lattice cells, at most 2**{_MOST_BITS} can be told "
                "apart: larger standard deviations, fewer features, or method='exact'"
            )
        self._stride = floor.new_tensor(self.strides)[:, None]
        self._lowest = low[:, None] - 2

    def vertices(self, floor: Tensor, rank: Tensor, out: Tensor, rows: slice) -> None:
        """Writes [D + 1, N] keys: the vertices of all remainders of simplices as `simplices` has them."""
        floor, rank, keys = floor[:, rows], rank[:, rows], out[:, rows]
        torch.sum((floor - self._lowest) * self._stride, 0, out=keys[0])
        # From remainder r to r + 1, all coordinates grow by 1 but the one of rank D - r, which falls by D.
        falls = torch.empty_like(floor).scatter_(0, rank, (self._stride - self.cells).expand_as(rank))
        for remainder in range(self.dim):
            torch.sub(keys[remainder], falls[self.dim - remainder], out=keys[remainder + 1])

    def origin(self) -> Tensor:
        """[D + 1] keys, ascending: the vertices of the simplex that the point zero lies in."""
        floor = torch.zeros_like(self._lowest)
        keys = torch.empty_like(floor)
        self.vertices(floor, torch.arange(self.dim + 1, device=floor.device)[:, None], keys, slice(0, 1))
        return keys.flatten()

    def neighbors(self, keys: Tensor, axis: int, rows: Tensor) -> None:
        """Writes [V + 1, 3]: each vertex and its two neighbors along an axis; where none is, V: zeros."""
        count = keys.numel()
        # One axis grows by D, the others fall by 1: from remainder r to r - 1, and from 0 to D.
        wanted = keys + (self.strides[axis] - self.cells)
        lowest = int(torch.searchsorted(keys, self.cells))
        wanted[:lowest] += self.cells * (self.dim + 1) - sum(self.strides)
        position = _places(keys, wanted).clamp_(max=count - 1)
        position = torch.where(keys.index_select(0, position) == wanted, position, count)
        own = torch.arange(count, device=keys.device, dtype=rows.dtype)
        rows.fill_(count)
        rows[:-1, 0] = own
        rows[:-1, 1] = position
        rows[:, 2].scatter_(0, position, own)
        # Those without a neighbor wrote here.
        rows[-1, 2] = count


def sorted_keys(keys: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The keys [N] below `most` in ascending order, and where each was; equal ones in that order.

    Overwrites the keys.
    """
    bits = (keys.numel() - 1).bit_length()
    if keys.device.type != "cpu" or (most - 1).bit_length() + bits > 63:
        return keys.sort(stable=True)
    # NumPy has a faster sort of plain integers than PyTorch has of integers with their places.
    keys <<= bits
    keys |= torch.arange(keys.numel(), device=keys.device)
    keys.numpy().sort()
    places = keys & ((1 << bits) - 1)
    keys >>= bits
    return keys, places


def _places(keys: Tensor, wanted: Tensor) -> Tensor:
    """Where in ascending keys the wanted ones are, or would be."""
    if keys.device.type != "cpu":
        return torch.searchsorted(keys, wanted)
    # NumPy's search goes on from where the one before ended, and the wanted ones are all but in order.
    return torch.from_numpy(np.searchsorted(keys.numpy(), wanted.numpy()))


def _inserted(keys: Tensor, starts: Tensor, others: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending keys and the starts of their bags, with other keys, whose bags are empty, where missing.

    `end` is the end of the last bag. Third, where each of the keys went.
    """
    after = torch.searchsorted(keys, others)
    missing = keys[after.clamp(max=keys.numel() - 1)] != others
    after, others = after[missing], others[missing]
    keys, order = torch.cat([keys, others]).sort()
    starts = torch.cat([starts, torch.cat([starts, starts.new_tensor([end])])[after]])[order]
    return keys, starts, order.argsort()[: order.numel() - others.numel()]


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
        self._splat_weights = splat.flatten().index_select(0, lattice.order)
        alpha = 1 / (1 + 2.0**-lattice.dim)
        self._slice_weights = (weights * (alpha if after is None else after[:, None] * alpha)).flatten()
        self._transposed: LatticeFilter | None = None
        # Tables kept from call to call, since fresh memory has to be mapped first: a pair for each call that
        # there was at once.
        self._kept: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _kept=[])

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "LatticeFilter":
        return LatticeFilter(self.lattice, before, after, self.reverse)

    @property
    def transposed(self) -> "LatticeFilter":
        if self._transposed is None:
            self._transposed = LatticeFilter(self.lattice, self.after, self.before, not self.reverse)
        return self._transposed

    def __call__(self, values: Tensor) -> Tensor:
        return _LatticeFilter.apply(values, self)

    def passes(self, values: Tensor) -> Passes:
        lattice = self.lattice
        tables = self._kept.pop() if self._kept else None
        if tables is None or tables.shape[2] != values.shape[1]:
            # The vertices' values [V + 1, C], the last row zero.
            tables = values.new_empty(2, lattice.vertices + 1, values.shape[1])
        now, spare = tables
        stages = [lattice.splat.parts(values.contiguous(), self._splat_weights, now)]
        for blur in reversed(lattice.blurs) if self.reverse else lattice.blurs:
            stages.append(blur.parts(now, lattice.blur_weights, spare))
            now, spare = spare, now
        part = functools.partial(lattice.slice.part, table=now, weights=self._slice_weights)
        return Passes(stages, part, functools.partial(self._kept.append, tables))

    def compute(self, values: Tensor) -> Tensor:
        def run() -> Tensor:
            stages, part, end = self.passes(values)
            for stage in stages:
                each(stage)
            out = torch.empty_like(values, memory_format=torch.contiguous_format)

            def write(rows: slice) -> None:
                out[rows] = part(rows)

            each(functools.partial(write, rows) for rows in chunks_of(out.shape[0]))
            end()
            return out

        return on_threads(values, run)


class _LatticeFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, lattice_filter):
        ctx.lattice_filter = lattice_filter
        return lattice_filter.compute(values)

    @staticmethod
    def backward(ctx, grad):
        return _LatticeFilter.apply(grad, ctx.lattice_filter.transposed), None
