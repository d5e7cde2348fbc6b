"""The sorted points as the exact filter's operands, and what each tile of them spans.

With g the features, centered and in units that make the kernel exp2(-|g_i - g_j|^2 / 2), a row of `a` times a
row of `b` is the exponent itself: g is split into two halves of fp16 each, -|g|^2 / 2 into three.
a = [hi, hi, lo, lo, n1, n2, n3, 1, 1, 1], b = [hi, lo, hi, lo, 1, 1, 1, n1, n2, n3], zeros to the next 32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import Launch, launch_for, layout_key
from .._tiles import Tile

ROWS, COLUMNS = 128, 64  # of a tile of pairs
SCALE = math.sqrt(math.log2(math.e))
_SCALE = tl.constexpr(SCALE)
# Above it the sum of products loses the exponent's second decimal: pairs are then taken one by one.
_LARGEST_HALF_NORM = tl.constexpr(16384.0)
_NEVER = tl.constexpr(-60000.0)  # the exponent of a pair with a padding column


class SortedPoints(NamedTuple):
    """Operands and bounds of B images' points; rows are padded to whole tiles image by image."""

    a: torch.Tensor  # fp16 [padded, depth]
    b: torch.Tensor  # fp16 [padded, depth]
    g: torch.Tensor  # fp32 [D, padded]
    bounds: torch.Tensor  # fp32 [3 D + 3, column tiles]: low, high, mean; spread, radius, points
    outgrown: torch.Tensor  # int32 [column tiles]: whether a norm does not fit the operands


@triton.jit
def _gather_points_kernel(
    features_ptr, order_ptr, mean_ptr, a_ptr, b_ptr, g_ptr, bounds_ptr, outgrown_ptr,
    N, TILES, ALL_TILES, PADDED,
    D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    image = tile // TILES
    lane = tl.arange(0, BLOCK)
    point = (tile % TILES) * BLOCK + lane
    row = tile * BLOCK + lane
    ok = point < N
    source = image * N + tl.load(order_ptr + image * N + point, mask=ok, other=0)
    count = tl.sum(ok.to(tl.float32), 0)
    divisor = tl.maximum(count, 1.0)

    k = tl.arange(0, DEPTH)[None, :]
    a = tl.zeros((BLOCK, DEPTH), tl.float32)
    b = tl.zeros((BLOCK, DEPTH), tl.float32)
    half_norm = tl.zeros((BLOCK,), tl.float32)
    rounded_half_norm = tl.zeros((BLOCK,), tl.float32)
    deviation = tl.zeros((BLOCK,), tl.float32)
    for d in tl.static_range(D):
        feature = tl.load(features_ptr + source * D + d, mask=ok, other=0.0)
        g = tl.where(ok, (feature - tl.load(mean_ptr + image * D + d)) * _SCALE, 0.0)
        tl.store(g_ptr + d * PADDED + row, g)
        high = g.to(tl.float16).to(tl.float32)
        low = (g - high).to(tl.float16).to(tl.float32)
        half_norm += 0.5 * g * g
        # Of the rounded features, or a point would not be at distance 0 from itself.
        rounded_half_norm += 0.5 * (high + low) * (high + low)
        hi, lo = high[:, None], low[:, None]
        a = tl.where((k == d) | (k == D + d), hi, tl.where((k == 2 * D + d) | (k == 3 * D + d), lo, a))
        b = tl.where((k == d) | (k == 2 * D + d), hi, tl.where((k == D + d) | (k == 3 * D + d), lo, b))
        middle = tl.sum(g, 0) / divisor
        deviation += tl.where(ok, (g - middle) * (g - middle), 0.0)
        tl.store(bounds_ptr + d * ALL_TILES + tile, tl.min(tl.where(ok, g, float("inf")), 0))
        tl.store(bounds_ptr + (D + d) * ALL_TILES + tile, tl.max(tl.where(ok, g, float("-inf")), 0))
        tl.store(bounds_ptr + (2 * D + d) * ALL_TILES + tile, middle)
    tl.store(bounds_ptr + 3 * D * ALL_TILES + tile, tl.sum(deviation, 0) / divisor)
    tl.store(bounds_ptr + (3 * D + 1) * ALL_TILES + tile, tl.sqrt(tl.max(deviation, 0)))
    tl.store(bounds_ptr + (3 * D + 2) * ALL_TILES + tile, count)
    tl.store(outgrown_ptr + tile, tl.max((half_norm > _LARGEST_HALF_NORM).to(tl.int32), 0))

    rest = -rounded_half_norm
    for piece in tl.static_range(3):
        part = rest.to(tl.float16).to(tl.float32)
        rest -= part
        in_column = part if piece > 0 else tl.where(ok, part, _NEVER)
        a = tl.where(k == 4 * D + piece, part[:, None], tl.where(k == 4 * D + 3 + piece, 1.0, a))
        b = tl.where(k == 4 * D + 3 + piece, in_column[:, None], tl.where(k == 4 * D + piece, 1.0, b))
    offsets = row[:, None] * DEPTH + k
    tl.store(a_ptr + offsets, a.to(tl.float16))
    tl.store(b_ptr + offsets, b.to(tl.float16))


def gather_points(features: torch.Tensor, order: torch.Tensor, padded: int) -> SortedPoints:
    """features: fp32 [B, N, D], dense; order: int32 [B, N], the points of each image in their new order."""
    batch, points, dim = features.shape
    device = features.device
    depth = 32 if 4 * dim + 6 <= 32 else 64
    tiles = batch * padded // COLUMNS
    made = SortedPoints(
        torch.empty((batch * padded, depth), dtype=torch.float16, device=device),
        torch.empty((batch * padded, depth), dtype=torch.float16, device=device),
        torch.empty((dim, batch * padded), dtype=torch.float32, device=device),
        torch.empty((3 * dim + 3, tiles), dtype=torch.float32, device=device),
        torch.empty((tiles,), dtype=torch.int32, device=device),
    )

    def make() -> Launch:
        scalars = (points, padded // COLUMNS, tiles, batch * padded)
        constants = {"D": dim, "DEPTH": depth, "BLOCK": COLUMNS}
        tile = Tile(COLUMNS, depth, 1, 4, 1)
        return Launch(_gather_points_kernel, (tiles,), scalars, constants, tile)

    launch = launch_for(("dense_crf_points", device, layout_key(features)), make)
    launch(features, order, features.mean(1), *made)
    return made
