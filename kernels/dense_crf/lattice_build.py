"""Gaussian filtering on the permutohedral lattice (Adams, Baek and Davis 2010): splat, blur each axis, slice.

A point of D features lies in a simplex of D + 1 vertices, one of each remainder 0..D modulo D + 1. A vertex
is known by one int64 key: image, remainder and coordinates packed by the ranges they have in the batch, in
that order. No hash table: one stable sort of the keys of all points finds the vertices, numbers them and
lists what each receives, one binary search an axis finds neighbors, and every sum has a fixed order. No
size but the number of vertices is read back, and under CUDA-graph capture not even that one.

Values are rows of C channels, tables one row a vertex. The filter's kernels give a lane (a thread's place in
a tile) one channel of one row, so that any C loads whole cache lines and leaves few lanes idle.

Here: which vertices the points of a batch touch, with which weights, and which are neighbors.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import Launch, launch_for, layout_key
from .._tiles import Tile

MOST_BITS = 62  # of a packed key
_SEARCH_STEPS = 30  # of a binary search among all vertices there can be
_TILE = Tile(256, 1, 1, 8, 1)  # points, contributions or vertices of a program
_ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds |x| < 2**22 to the nearest even integer
_FARTHEST = tl.constexpr(2.0**22)  # past it fp32 no longer tells a point's weights apart
_MOST = tl.constexpr(2**30)


class Permutohedral(NamedTuple):
    """The vertices that the points of a batch of images touch; all tensors are dense.

    Rows of a table are vertices, those of an image side by side; `capacity` of them have room, the first
    `count` are in use. A contribution is one of the D + 1 parts of a point, in the order of the vertices that
    receive them.
    """

    batch: int
    points: int  # N, of one image
    dim: int
    capacity: int
    vertex: torch.Tensor  # int32 [B, N, D + 1]: the rows of a point's vertices
    weights: (
        torch.Tensor
    )  # fp32 [B, N, D + 1]: barycentric, times alpha = 1 / (1 + 2**-D), which slicing needs
    count: torch.Tensor  # int32 [1]: vertices
    row: torch.Tensor  # int32 [B N (D + 1)]: the vertex of a contribution, ascending
    point: torch.Tensor  # int32 [B N (D + 1)]: the point it comes from, in 0..B N
    share: torch.Tensor  # fp32 [B N (D + 1)]: its barycentric weight
    first: torch.Tensor  # int32 [B N (D + 1)]: a vertex's first contribution
    neighbors: tuple[torch.Tensor, ...]  # D + 1 times int32 [capacity, 2]: along an axis; -1 where none is


@triton.jit
def _simplex(x_ptr, ok, SCALES: tl.constexpr, D: tl.constexpr):
    """Of each point the vertex of remainder 0 (in units of D + 1) and the ranks of its coordinates.

    Also its barycentric weights, and whether its features are finite and near enough to be told apart.
    All in fp32, the integers too: they are small enough to be exact.
    """
    elevated = ()
    total = tl.zeros(ok.shape, tl.float32)
    good = ok
    for i in tl.static_range(D, 0, -1):
        scaled = tl.load(x_ptr + (i - 1), mask=ok, other=0.0) * SCALES[i - 1]
        # From the last coordinate to the first.
        elevated = (total - scaled * i,) + elevated
        total += scaled
    elevated = (total,) + elevated
    for i in tl.static_range(D + 1):
        good &= tl.abs(elevated[i]) < _FARTHEST

    inverse: tl.constexpr = 1 / (D + 1)
    near = ()
    floor = ()
    rest = ()
    excess = tl.zeros(ok.shape, tl.float32)
    for i in tl.static_range(D + 1):
        near = near + (tl.where(good, elevated[i], 0.0),)
        rounded = (near[i] * inverse + _ROUND) - _ROUND
        rest = rest + (near[i] - rounded * (D + 1),)
        floor = floor + (rounded,)
        excess += rounded
    rank = ()
    moved = ()
    fraction = ()
    for i in tl.static_range(D + 1):
        # The rounded vertex must lie on the plane of coordinates that sum to zero: hence the excess.
        place = excess + i
        for j in tl.static_range(D + 1):
            if j < i:
                place -= tl.where(rest[j] < rest[i], 1.0, 0.0)
            elif j > i:
                place += tl.where(rest[i] < rest[j], 1.0, 0.0)
        step = tl.where(place < 0, 1.0, tl.where(place > D, -1.0, 0.0))
        rank = rank + (place + step * (D + 1),)
        moved = moved + (floor[i] + step,)
        fraction = fraction + ((near[i] - moved[i] * (D + 1)) * inverse,)

    # The weights are the differences of the fractions in falling order.
    falling = ()
    for r in tl.static_range(D + 1):
        value = tl.zeros(ok.shape, tl.float32)
        for i in tl.static_range(D + 1):
            value = tl.where(rank[i] == D - r, fraction[i], value)
        falling = falling + (value,)
    weights = ((1 - falling[D]) + falling[0],)
    for r in tl.static_range(1, D + 1):
        weights = weights + (falling[r] - falling[r - 1],)
    return moved, rank, weights, good


@triton.jit
def _permutohedral_bounds_kernel(
    x_ptr, bounds_ptr, N, SCALES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    # bounds [B, programs, 2 D + 1]: least and negated largest coordinates; -1 if a feature is not to be used.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    ok = n < N
    floor, _, _, good = _simplex(x_ptr + (image * N + n) * D, ok, SCALES, D)
    bounds_ptr += (image * tl.num_programs(0) + tl.program_id(0)) * (2 * D + 1)
    for i in tl.static_range(D):
        tl.store(bounds_ptr + i, tl.min(tl.where(good, floor[i].to(tl.int32), _MOST), 0))
        tl.store(bounds_ptr + D + i, tl.min(tl.where(good, -floor[i].to(tl.int32), _MOST), 0))
    tl.store(bounds_ptr + 2 * D, tl.min(tl.where(ok & ~good, -1, 0), 0))


@triton.jit
def _permutohedral_keys_kernel(
    x_ptr, origin_ptr, spans_ptr, keys_ptr, weights_ptr,
    N, SCALES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # origin [B, D + 1]: least coordinates, and whether an image can be filtered. spans [D + 1]: keys of a
    # remainder, then how far apart the keys of neighboring coordinates are.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    ok = n < N
    floor, rank, weights, _ = _simplex(x_ptr + (image * N + n) * D, ok, SCALES, D)
    origin_ptr += image * (D + 1)
    usable = tl.load(origin_ptr + D) != 0
    cells = tl.load(spans_ptr)
    key = tl.zeros((BLOCK,), tl.int64) + image * (D + 1) * cells
    for i in tl.static_range(D):
        # Room for a neighbor of a vertex on either side. What cannot be filtered gets keys all the same.
        coordinate = tl.where(usable, floor[i].to(tl.int64) - tl.load(origin_ptr + i) + 2, 2)
        key += coordinate * tl.load(spans_ptr + 1 + i)
    out = (image * N + n) * (D + 1)
    for r in tl.static_range(D + 1):
        tl.store(keys_ptr + out + r, key, mask=ok)
        tl.store(weights_ptr + out + r, tl.where(usable, weights[r], float("nan")), mask=ok)
        # To the next remainder all coordinates grow by 1 but the one of rank D - r, which falls by D.
        key += cells
        for i in tl.static_range(D):
            key -= tl.where(rank[i] == D - r, tl.load(spans_ptr + 1 + i), 0)


@triton.jit
def _permutohedral_rows_kernel(
    keys_ptr, order_ptr, row_ptr, weights_ptr,
    vertex_ptr, point_ptr, share_ptr, unique_ptr, first_ptr,
    M, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Contributions in the order of their vertices: tells points where theirs went, lists the vertices.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < M
    source = tl.load(order_ptr + at, mask=ok, other=0)
    row = tl.load(row_ptr + at, mask=ok, other=0)
    tl.store(vertex_ptr + source, row, mask=ok)
    tl.store(point_ptr + at, (source // (D + 1)).to(tl.int32), mask=ok)
    tl.store(share_ptr + at, tl.load(weights_ptr + source, mask=ok, other=0.0), mask=ok)
    new = ok & (row != tl.load(row_ptr + at - 1, mask=ok & (at > 0), other=-1))
    tl.store(unique_ptr + row, tl.load(keys_ptr + at, mask=new, other=0), mask=new)
    tl.store(first_ptr + row, at, mask=new)


@triton.jit
def _permutohedral_neighbors_kernel(
    unique_ptr, count_ptr, spans_ptr, neighbors_ptr,
    capacity, steps, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # neighbors [D + 1, capacity, 2], full of -1. Whoever is found has found who looked.
    axis = tl.program_id(1)
    neighbors_ptr += axis.to(tl.int64) * capacity * 2
    count = tl.load(count_ptr)
    cells = tl.load(spans_ptr)
    rise = tl.load(spans_ptr + 1 + axis, mask=axis < D, other=0)
    wrap = (D + 1) * cells
    for i in tl.static_range(D):
        wrap -= tl.load(spans_ptr + 1 + i)
    for start in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=1):
        row = start + tl.arange(0, BLOCK)
        ok = row < count
        key = tl.load(unique_ptr + row, mask=ok, other=0)
        # One axis grows by D, the others fall by 1: from remainder r to r - 1, and from 0 to D.
        wanted = key + (rise - cells) + tl.where(key % ((D + 1) * cells) < cells, wrap, 0)
        low = tl.zeros((BLOCK,), tl.int32)
        high = low + count
        for _ in tl.range(0, steps, num_stages=1):
            middle = low + (high - low) // 2
            less = tl.load(unique_ptr + middle, mask=low < high, other=0) < wanted
            low = tl.where((low < high) & less, middle + 1, low)
            high = tl.where((low < high) & ~less, middle, high)
        found = ok & (low < count)
        found &= tl.load(unique_ptr + low, mask=found, other=0) == wanted
        tl.store(neighbors_ptr + row.to(tl.int64) * 2, low, mask=found)
        tl.store(neighbors_ptr + low.to(tl.int64) * 2 + 1, row, mask=found)


def _scales(dim: int) -> tuple[float, ...]:
    """The factors of features: the blur spreads by this standard deviation (section 3.1 there)."""
    spread = torch.tensor(math.sqrt(2 / 3) * (dim + 1), dtype=torch.float32, device="cpu").item()
    divisors = [math.sqrt((i + 1) * (i + 2)) for i in range(dim)]
    scales = torch.tensor([spread / divisor for divisor in divisors], dtype=torch.float32, device="cpu")
    return tuple(scales.tolist())


def _bounds(features: torch.Tensor) -> torch.Tensor:
    """int32 [B, programs, 2 D + 1], as the kernel says."""
    batch, points, dim = features.shape
    grid = (triton.cdiv(points, _TILE.block_m), batch)
    bounds = torch.empty((batch, grid[0], 2 * dim + 1), dtype=torch.int32, device=features.device)

    def make() -> Launch:
        constants = {"SCALES": _scales(dim), "D": dim, "BLOCK": _TILE.block_m}
        return _unfused(Launch(_permutohedral_bounds_kernel, grid, (points,), constants, _TILE))

    launch_for(("permutohedral_bounds", features.device, layout_key(features)), make)(features, bounds)
    return bounds


def _packing(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`origin` and `spans` of the keys kernel, int64."""
    batch, _, width = bounds.shape
    dim = width // 2
    least = bounds.amin(1).long()
    sizes = (-least[:, dim:-1] - least[:, :dim]).amax(0).clamp_(min=0) + 4
    bits = sizes.double().log2().sum() + math.log2(batch * (dim + 1))
    fits = bits < MOST_BITS
    spans = torch.where(fits, sizes, 4).flip(0).cumprod(0).flip(0)
    usable = fits & (least[:, -1:] == 0)
    return torch.cat([least[:, :dim], usable], 1), torch.cat([spans, torch.ones_like(spans[:1])])


def _keys(features: torch.Tensor, origin: torch.Tensor, spans: torch.Tensor):
    """The keys of every point's vertices, int64 [B, N, D + 1], and its barycentric weights."""
    batch, points, dim = features.shape
    keys = torch.empty((batch, points, dim + 1), dtype=torch.int64, device=features.device)
    weights = torch.empty((batch, points, dim + 1), dtype=torch.float32, device=features.device)

    def make() -> Launch:
        constants = {"SCALES": _scales(dim), "D": dim, "BLOCK": _TILE.block_m}
        grid = (triton.cdiv(points, _TILE.block_m), batch)
        return _unfused(Launch(_permutohedral_keys_kernel, grid, (points,), constants, _TILE))

    pointers = (features, origin, spans, keys, weights)
    launch_for(("permutohedral_keys", features.device, layout_key(features)), make)(*pointers)
    return keys, weights


def _unfused(launch: Launch) -> Launch:
    """`launch` without fused multiply-adds: a point must lie in the simplex that a CPU finds."""
    launch.options["enable_fp_fusion"] = False
    return launch


def _rows(keys, order, row, weights, vertex, point, share, unique, first) -> None:
    """All [B, N, D + 1] or flat, those from `vertex` on are written."""

    def make() -> Launch:
        grid = (triton.cdiv(row.numel(), _TILE.block_m),)
        constants = {"D": vertex.shape[-1] - 1, "BLOCK": _TILE.block_m}
        return Launch(_permutohedral_rows_kernel, grid, (row.numel(),), constants, _TILE)

    pointers = (keys, order, row, weights, vertex, point, share, unique, first)
    launch_for(("permutohedral_rows", row.device, layout_key(vertex)), make)(*pointers)


def _neighbors(unique: torch.Tensor, count: torch.Tensor, spans: torch.Tensor, capacity: int):
    """int32 [D + 1, capacity, 2]; `unique` are the vertices' keys, ascending."""
    dim = spans.numel() - 1
    neighbors = torch.full((dim + 1, capacity, 2), -1, dtype=torch.int32, device=unique.device)

    def make() -> Launch:
        grid = (min(triton.cdiv(capacity, _TILE.block_m), 1024), dim + 1)
        # Not from the capacity, which capture changes: so would what is compiled in.
        scalars = (capacity, _SEARCH_STEPS)
        constants = {"D": dim, "BLOCK": _TILE.block_m}
        return Launch(_permutohedral_neighbors_kernel, grid, scalars, constants, _TILE)

    key = ("permutohedral_neighbors", unique.device, layout_key(neighbors))
    launch_for(key, make)(unique, count, spans, neighbors)
    return neighbors


def _room(count: torch.Tensor, bound: int) -> int:
    """Rows for the vertices: `bound` where a GPU's number cannot be read.

    Rounded up to one of eight sizes an octave: launches planned for one image serve the next.
    """
    device = count.device.type
    if device == "meta" or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
        vertices = bound
    else:
        vertices = int(count)
    step = max(16, 1 << max(vertices.bit_length() - 4, 0))
    return triton.cdiv(vertices, step) * step


def build_permutohedral(features: torch.Tensor) -> Permutohedral:
    """The lattice of fp32 features [B, N, D], dense, divided by their standard deviations; D is 1 to 8.

    An image whose features are not finite, or pass some 2**18 standard deviations, gets weights of NaN, and
    so does every image of a batch that spans more than 2**62 lattice cells: reading that back would stall.
    Raises ValueError for shapes that are not served.
    """
    batch, points, dim = features.shape
    bound = batch * points * (dim + 1)
    if not 0 < bound < 2**30 or not 1 <= dim <= 8:
        raise ValueError(
            f"features must be [B, N, D] with D from 1 to 8 and 0 < B N (D + 1) < 2**30, "
            f"got {list(features.shape)}"
        )
    origin, spans = _packing(_bounds(features))
    keys, weights = _keys(features, origin, spans)
    keys, order = keys.flatten().sort(stable=True)
    changes = torch.zeros(bound, dtype=torch.bool, device=features.device)
    torch.ne(keys[1:], keys[:-1], out=changes[1:])
    row = changes.cumsum(0, dtype=torch.int32)
    vertex = torch.empty((batch, points, dim + 1), dtype=torch.int32, device=features.device)
    point, first = torch.empty_like(row), torch.empty_like(row)
    share, unique = torch.empty_like(weights).flatten(), torch.empty_like(keys)
    _rows(keys, order, row, weights, vertex, point, share, unique, first)
    count = row[-1:] + 1
    capacity = _room(count, bound)
    neighbors = _neighbors(unique, count, spans, capacity)
    weights *= 1 / (1 + 2.0**-dim)
    return Permutohedral(
        batch, points, dim, capacity, vertex, weights, count, row, point, share, first, neighbors.unbind(0)
    )
