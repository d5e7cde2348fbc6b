"""Gaussian filtering over all pairs of points that count: out_i = sum_j exp2(-|g_i - g_j|^2 / 2) v_j.

As flash attention without the softmax: two chained products, exp2 between them, nothing of size N^2 in
memory. The first product is the exponent itself (sorted_points.py); no running maximum is needed, for no
exponent is above zero. Where features outgrow fp16 ("direct") the differences are taken one dimension after
the other. Tiles of pairs that cannot count are on no list (lists.py); a long list is several programs' work,
whose partial sums a second kernel adds in a fixed order. Both forms are launched where only the device knows
which of them is needed; one of them returns at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import Launch, launch_for, layout_key
from .._tiles import Problem, Tile, choose_tile, register_candidates
from .lists import make_lists, make_units, most_slots
from .order import hilbert_keys
from .sorted_points import COLUMNS, ROWS, gather_points

OPERATION = "gaussian_filter"
_REDUCED = 16  # rows of a tile that one program of the second kernel adds up


class ExactPairs(NamedTuple):
    """The points of B images as `build_exact` sorted and listed them for every filter call on them."""

    batch: int
    points: int
    dim: int
    padded: int  # rows of all images' sorted points, padded to whole tiles
    order: torch.Tensor  # int32 [B, N]: the point at each place of the order
    rows: torch.Tensor  # int32 [B, N]: the row of each point among all sorted, padded rows
    a: torch.Tensor
    b: torch.Tensor
    g: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    units: torch.Tensor
    cuts: torch.Tensor
    outgrown: torch.Tensor | None  # int32 [1]: whether the direct form is needed; None: surely not


def build_exact(features: torch.Tensor, tolerance: float, bounded: bool = False) -> ExactPairs:
    """Order the points, bound their distances and list the tiles of pairs that count.

    Nothing is read back from the device. NaN or infinite features make all results of their image NaN.

    Args:
        features: fp32 [B, N, D], dense, D at most 8: k_ij = exp(-|f_i - f_j|^2 / 2).
        tolerance: the share of its normalizer sum_j k_ij that any point may lose; 0 for every pair.
        bounded: no feature is farther than 100 from its image's mean: the direct form is not needed.
    """
    batch, points, dim = features.shape
    order = hilbert_keys(features).sort(dim=1, stable=True).indices
    padded = triton.cdiv(points, ROWS) * ROWS
    first = padded * torch.arange(batch, dtype=torch.int32, device=features.device)[:, None]
    places = torch.arange(points, dtype=torch.int32, device=features.device) + first
    rows = torch.empty((batch, points), dtype=torch.int32, device=features.device).scatter_(1, order, places)
    order = order.int()
    gathered = gather_points(features, order, padded)
    lists, counts = make_lists(gathered, batch, points, tolerance)
    units, cuts = make_units(counts)
    outgrown = None if bounded else gathered.outgrown.amax(0, keepdim=True)
    return ExactPairs(batch, points, dim, batch * padded, order, rows, gathered.a, gathered.b, gathered.g,
                      lists, counts, units, cuts, outgrown)  # fmt: skip


@triton.jit
def _kernel_values(
    a, b_ptr, g_ptr, row, start, points, PADDED,
    D: tl.constexpr, DEPTH: tl.constexpr, DIRECT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """exp2 of the exponents of the rows with the columns from `start`, fp32; 0 past `points` of those."""
    n = tl.arange(0, BLOCK_N)
    if DIRECT:
        exponent = tl.zeros((row.shape[0], BLOCK_N), tl.float32)
        # Rolled, with its rows read again: all dimensions' values at a time do not fit the registers.
        for d in tl.range(0, D, loop_unroll_factor=1):
            mine = tl.load(g_ptr + d * PADDED + row)
            other = tl.load(g_ptr + d * PADDED + start + n)
            exponent -= (mine[:, None] - other[None, :]) * (mine[:, None] - other[None, :])
        return tl.where((n < points)[None, :], tl.exp2(0.5 * exponent), 0.0)
    else:
        # 64 bits for the tile's address, 32 for the places in it.
        b = tl.load(b_ptr + start * DEPTH + (n[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]))
        return tl.exp2(tl.dot(a, tl.trans(b)))


@triton.jit
def _work_unit(units_ptr, outgrown_ptr, unit, UNITS, DIRECT: tl.constexpr):
    """True if a unit is work in this form; its row tile, first and end of its list's part, its slot."""
    row_tile = tl.load(units_ptr + unit).to(tl.int64)
    wanted = row_tile >= 0
    if outgrown_ptr is not None:
        wanted = wanted & ((tl.load(outgrown_ptr) != 0) == DIRECT)
    begin = tl.load(units_ptr + UNITS + unit)
    end = tl.load(units_ptr + 2 * UNITS + unit)
    slot = tl.load(units_ptr + 3 * UNITS + unit).to(tl.int64)
    return wanted, row_tile, begin, end, slot


@triton.jit
def _store_sums(
    out_ptr, partial_ptr, row_tile, slot, acc, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if slot < 0:
        tl.store(out_ptr + row_tile * BLOCK_M * WIDTH + offsets, acc)
    else:
        tl.store(partial_ptr + slot * BLOCK_M * WIDTH + offsets, acc)


@triton.jit
def _gaussian_filter_kernel(
    a_ptr, b_ptr, g_ptr, values_ptr, out_ptr, partial_ptr, list_ptr, units_ptr, outgrown_ptr,
    N, ROW_TILES, TILES, UNITS, PADDED,
    D: tl.constexpr, DEPTH: tl.constexpr, DIRECT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    wanted, row_tile, begin, end, slot = _work_unit(units_ptr, outgrown_ptr, unit, UNITS, DIRECT)
    if wanted:
        n = tl.arange(0, BLOCK_N)
        c = tl.arange(0, BLOCK_C)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        a = tl.load(a_ptr + row[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])
        first = (row_tile // ROW_TILES) * TILES
        list_ptr += row_tile * TILES
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for t in tl.range(begin, end, num_stages=STAGES):
            local = tl.load(list_ptr + t).to(tl.int64)
            start = (first + local) * BLOCK_N
            p = _kernel_values(a, b_ptr, g_ptr, row, start, N - local * BLOCK_N, PADDED, D, DEPTH, DIRECT,
                               BLOCK_N)  # fmt: skip
            values = tl.load(values_ptr + start * BLOCK_C + (n[:, None] * BLOCK_C + c[None, :]))
            acc = tl.dot(p.to(tl.float16), values, acc)
        _store_sums(out_ptr, partial_ptr, row_tile, slot, acc, BLOCK_M, BLOCK_C)


@triton.jit
def _add_partial_sums_kernel(
    partial_ptr, out_ptr, cuts_ptr, CUTS,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cut = tl.program_id(0).to(tl.int64)
    units = tl.load(cuts_ptr + 2 * CUTS + cut)
    if units > 1:
        row_tile = tl.load(cuts_ptr + cut).to(tl.int64)
        slot = tl.load(cuts_ptr + CUTS + cut).to(tl.int64)
        m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offsets = m[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for part in tl.range(0, units):
            total += tl.load(partial_ptr + (slot + part) * TILE * BLOCK_C + offsets)
        tl.store(out_ptr + row_tile * TILE * BLOCK_C + offsets, total)


def filter_candidates(problem: Problem, arch: str) -> list[Tile]:
    """Warps and stages: the tile of pairs is the lists'. block_k stands for the operands' bytes."""
    operands = (problem.depth + problem.channels_in) // 2
    found = [Tile(ROWS, COLUMNS, operands, 8, stages) for stages in (3, 2, 4)]
    if problem.channels_in < 128:
        found += [Tile(ROWS, COLUMNS, operands, 4, stages) for stages in (3, 2)]
    return found


register_candidates(OPERATION, filter_candidates)


def exact_filter(pairs: ExactPairs, values: torch.Tensor) -> torch.Tensor:
    """fp32 [padded, width]: the sums for every sorted row; values fp16 of the same shape, dense.

    The width is a power of two from 16 to 256; the padding's rows of values are finite.
    """
    return tile_sums(pairs, OPERATION, _gaussian_filter_kernel, values.shape[1], values)


def tile_sums(
    pairs: ExactPairs, operation: str, kernel, width: int, *operands: torch.Tensor, **constants: int
) -> torch.Tensor:
    """fp32 [padded, width]: what `kernel` sums over the listed tiles, in either form that may be needed.

    operands: fp16 [padded, columns], dense; the first one's columns are BLOCK_C.
    """
    operand, device = operands[0], operands[0].device
    channels, depth = operand.shape[1], pairs.a.shape[1]
    row_tiles, columns = pairs.lists.shape
    units = pairs.units.shape[1]
    out = torch.empty((pairs.padded, width), dtype=torch.float32, device=device)
    slots = most_slots(row_tiles, columns, device)
    partial = torch.empty((slots * ROWS, width), dtype=torch.float32, device=device)

    def make(direct: bool) -> Launch:
        problem = Problem(operation, channels, channels, pairs.dim, 1, torch.float16,
                          pairs.points * pairs.batch, pairs.padded, channels, depth)  # fmt: skip
        tile = choose_tile(problem, device)
        shared = {
            "D": pairs.dim,
            "DEPTH": depth,
            "DIRECT": direct,
            # The direct form's loops are within each other: nothing to overlap.
            "STAGES": 1 if direct else tile.num_stages,
            "BLOCK_M": ROWS,
            "BLOCK_N": COLUMNS,
            "BLOCK_C": channels,
        }
        scalars = (pairs.points, columns * COLUMNS // ROWS, columns, units, pairs.padded)
        return Launch(kernel, (units,), scalars, shared | constants, tile)

    lists = (pairs.lists, pairs.units, pairs.outgrown)
    for direct in (False,) if pairs.outgrown is None else (False, True):
        key = (operation, device, direct, pairs.batch, pairs.points, layout_key(operand, pairs.g, *lists))
        launch = launch_for(key, lambda direct=direct: make(direct))
        launch(pairs.a, pairs.b, pairs.g, *operands, out, partial, *lists)
    _add_partial_sums(pairs, partial, out)
    return out


def _add_partial_sums(pairs: ExactPairs, partial: torch.Tensor, out: torch.Tensor) -> None:
    """Sum the parts of every row tile that several programs worked on."""
    width = out.shape[1]

    def make() -> Launch:
        constants = {"TILE": ROWS, "BLOCK_M": _REDUCED, "BLOCK_C": width}
        grid = (pairs.cuts.shape[1], ROWS // _REDUCED)
        return Launch(_add_partial_sums_kernel, grid, (pairs.cuts.shape[1],), constants,
                    Tile(_REDUCED, width, 1, 4, 1))  # fmt: skip

    launch_for(("add_partial_sums", out.device, width, tuple(pairs.cuts.shape)), make)(
        partial, out, pairs.cuts
    )
