"""Lists of the tiles of pairs that the exact filter computes; no point loses more than a share of its mass.

For a tile of rows, the columns' tiles are left out from the farthest inwards while
B = sum |J| exp2(-d_min(I, J)^2 / 2) stays within tolerance times a lower bound of every row's normalizer
n_i = sum_j k_ij: then each loses at most B <= tolerance n_i. d_min is the larger of the gaps between the
tiles' boxes and between their balls. The lower bound is Jensen's: the mean of exp2 over a tile is at least
exp2 of the mean, n_i >= sum_J |J| exp2(-(|g_i - mean_J|^2 + spread_J) / 2).
"""

import math

import torch
import triton
import triton.language as tl

from .._device import interpreting, processors
from .._launch import Launch, launch_for, layout_key
from .._tiles import Tile
from .sorted_points import COLUMNS, ROWS, SortedPoints

_LEVELS = 64  # distances at which leaving out may begin
_SHORTEST = 64  # column tiles that are worth a program of their own
_BLOCK = 32


@triton.jit
def _least_exponents(bounds_ptr, tile, ok, ALL_TILES, low, high, middle, radius, D: tl.constexpr):
    """Half the least squared distance between the rows' tile and each column tile, a little less."""
    box = tl.zeros(tile.shape, tl.float32)
    centers = tl.zeros(tile.shape, tl.float32)
    for d in tl.static_range(D):
        other_low = tl.load(bounds_ptr + d * ALL_TILES + tile, mask=ok, other=0.0)
        other_high = tl.load(bounds_ptr + (D + d) * ALL_TILES + tile, mask=ok, other=0.0)
        other_middle = tl.load(bounds_ptr + (2 * D + d) * ALL_TILES + tile, mask=ok, other=0.0)
        gap = tl.maximum(tl.maximum(other_low - high[d], low[d] - other_high), 0.0)
        box += gap * gap
        centers += (other_middle - middle[d]) * (other_middle - middle[d])
    other_radius = tl.load(bounds_ptr + (3 * D + 1) * ALL_TILES + tile, mask=ok, other=0.0)
    # Rounding, which grows with the distance: less than the margins here and below.
    ball = tl.maximum(tl.sqrt(centers) * 0.99999 - radius - other_radius, 0.0)
    return tl.maximum(box, ball * ball) * 0.49999


@triton.jit
def _lists_kernel(
    g_ptr, bounds_ptr, list_ptr, count_ptr,
    N, ROW_TILES, TILES, ALL_TILES, PADDED, tolerance, farthest,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)
    image = row_tile // ROW_TILES
    first = image * TILES
    lane = tl.arange(0, BLOCK_M)
    ok = (row_tile % ROW_TILES) * BLOCK_M + lane < N
    count = tl.sum(ok.to(tl.float32), 0)
    g = ()
    low = ()
    high = ()
    middle = ()
    deviation = tl.zeros((BLOCK_M,), tl.float32)
    for d in tl.static_range(D):
        value = tl.load(g_ptr + d * PADDED + row_tile * BLOCK_M + lane)
        mean = tl.sum(tl.where(ok, value, 0.0), 0) / count
        deviation += tl.where(ok, (value - mean) * (value - mean), 0.0)
        g = g + (value,)
        low = low + (tl.min(tl.where(ok, value, float("inf")), 0),)
        high = high + (tl.max(tl.where(ok, value, float("-inf")), 0),)
        middle = middle + (mean,)
    radius = tl.sqrt(tl.max(deviation, 0)) * 1.00001
    t = tl.arange(0, BLOCK_T)

    # What every row's normalizer is at least.
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, TILES, BLOCK_T):
        there = start + t < TILES
        tile = first + start + t
        exponent = tl.load(bounds_ptr + 3 * D * ALL_TILES + tile, mask=there, other=0.0)[None, :]
        for d in tl.static_range(D):
            center = tl.load(bounds_ptr + (2 * D + d) * ALL_TILES + tile, mask=there, other=0.0)
            exponent += (g[d][:, None] - center[None, :]) * (g[d][:, None] - center[None, :])
        points = tl.load(bounds_ptr + (3 * D + 2) * ALL_TILES + tile, mask=there, other=0.0)
        mass += tl.sum(points[None, :] * tl.exp2(-0.5 * exponent), 1)
    # Of NaN nothing is left out: every result is to carry it on.
    broken = tl.max((mass != mass).to(tl.int32), 0)
    budget = tolerance * 0.999 * tl.maximum(tl.min(tl.where(ok, mass, float("inf")), 0), 1.0)

    # From which distance on everything may be left out.
    level = (tl.arange(0, LEVELS) + 1) * (farthest / LEVELS)
    dropped = tl.zeros((LEVELS,), tl.float32)
    for start in tl.range(0, TILES, BLOCK_T):
        there = start + t < TILES
        tile = first + start + t
        exponent = _least_exponents(bounds_ptr, tile, there, ALL_TILES, low, high, middle, radius, D)
        points = tl.load(bounds_ptr + (3 * D + 2) * ALL_TILES + tile, mask=there, other=0.0)
        most = points * tl.exp2(-exponent)
        dropped += tl.sum(tl.where(exponent[None, :] >= level[:, None], most[None, :], 0.0), 1)
    cutoff = tl.min(tl.where(dropped <= budget, level, float("inf")), 0)

    kept = 0
    for start in tl.range(0, TILES, BLOCK_T):
        there = start + t < TILES
        tile = first + start + t
        exponent = _least_exponents(bounds_ptr, tile, there, ALL_TILES, low, high, middle, radius, D)
        # Of features whose squares overflow, some are NaN: those count.
        keep = (there & (~(exponent >= cutoff) | (broken > 0))).to(tl.int32)
        place = kept + tl.cumsum(keep, 0) - 1
        entry = (start + t).to(list_ptr.dtype.element_ty)
        tl.store(list_ptr + row_tile * TILES + place, entry, mask=keep == 1)
        kept += tl.sum(keep, 0)
    tl.store(count_ptr + row_tile, kept)


def make_lists(
    gathered: SortedPoints, batch: int, points: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column tiles of each row tile, counted from the image's first, [row tiles, column tiles an image].

    And how many there are, int32 [row tiles]. tolerance 0 keeps all.
    """
    dim, all_rows = gathered.g.shape
    padded = all_rows // batch
    rows, columns = padded // ROWS, padded // COLUMNS
    device = gathered.g.device
    narrow = torch.int16 if columns < 2**15 else torch.int32
    lists = torch.empty((batch * rows, columns), dtype=narrow, device=device)
    counts = torch.empty((batch * rows,), dtype=torch.int32, device=device)

    def make() -> Launch:
        # Everything beyond the last level together is less than the tolerance.
        farthest = math.log2(points / tolerance) if tolerance else 1.0
        budget = tolerance if tolerance else -1.0
        scalars = (points, rows, columns, batch * columns, all_rows, float(budget), float(farthest))
        constants = {"D": dim, "BLOCK_M": ROWS, "BLOCK_T": _BLOCK, "LEVELS": _LEVELS}
        tile = Tile(ROWS, _BLOCK, 1, 8, 1)
        return Launch(_lists_kernel, (batch * rows,), scalars, constants, tile)

    key = (
        "dense_crf_lists",
        device,
        batch,
        points,
        tolerance,
        layout_key(gathered.g, gathered.bounds, lists),
    )
    launch_for(key, make)(gathered.g, gathered.bounds, lists, counts)
    return lists, counts


def extra_units(device: torch.device) -> int:
    """By how many work units at most there are more than row tiles."""
    # The interpreter takes as long for a program without work as for another.
    return 8 * (1 if interpreting() else processors(device))


def most_slots(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """How many partial sums there can be: a unit of a list that is cut is at least half the longest."""
    return min(2 * extra_units(device), row_tiles * triton.cdiv(column_tiles, _SHORTEST))


def make_units(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows' lists cut into work units of about equal length, longest first.

    Returns int32 [4, row tiles + extra]: the row tile (-1: no such unit), the first and the end of its part
    of the list, and the slot of its partial sums (-1: it is the only one, and writes the result); and
    int32 [3, extra]: row tile, first slot and number of units of the rows that are cut (1: not cut).
    """
    extra = extra_units(counts.device)
    length, tile = counts.long().sort(descending=True, stable=True)
    longest = ((length.sum() + extra - 1) // extra).clamp_(min=_SHORTEST)
    units = ((length + longest - 1) // longest).clamp_(min=1)
    ends = units.cumsum(0)
    slots = torch.where(units > 1, units, 0)
    first_slot = slots.cumsum(0) - slots

    number = torch.arange(counts.numel() + extra, device=counts.device)
    index = torch.searchsorted(ends, number, right=True).clamp_(max=counts.numel() - 1)
    part = number - (ends - units)[index]
    here = length[index]
    cut = units[index]
    slot = torch.where(cut > 1, first_slot[index] + part, -1)
    owner = torch.where(number < ends[-1], tile[index], -1)
    table = torch.stack([owner, part * here // cut, (part + 1) * here // cut, slot])
    return table.int(), torch.stack([tile, first_slot, units])[:, :extra].int().contiguous()
