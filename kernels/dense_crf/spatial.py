"""The Gaussian filter of an image's pixels by their places: along rows, then along columns.

K_ij = exp(-dx^2 / 2 theta_x^2 - dy^2 / 2 theta_y^2) is a product, and so is its normalization. An axis is a
band matrix times the image on the matrix units; the band is computed where it is needed and never stored.
"""

import math

import torch
import triton
import triton.language as tl

from .._device import fp32_precision
from .._launch import Launch, launch_for, layout_key
from .._tiles import Problem, Tile, choose_tile, register_candidates

# Standard deviations, rounded up to whole pixels, to which weights are summed at least: beyond, a share of
# erfc(5.43 / sqrt(2)) < 2**-24 is left of an infinite row on that side, less than rounding its sum to fp32.
REACH = 5.43


@triton.jit
def _spatial_gaussian_kernel(
    values_ptr, before_ptr, after_ptr, out_ptr,
    length, inner, columns, blocks, radius, exponent,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # values and out are [columns / inner, length, inner]; a column is a pair of outer and inner index.
    pid = tl.program_id(0)
    # Programs side by side take neighboring stretches of the same columns, whose values they share.
    first = pid % blocks * BLOCK_M
    column = (pid // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = (column < columns)[None, :]
    place = (column // inner * length * inner + column % inner)[None, :]
    target = first + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = tl.maximum(first - radius, 0)
    for source in tl.range(start, tl.minimum(first + BLOCK_M + radius, length), BLOCK_K):
        source = source + tl.arange(0, BLOCK_K)
        source_ok = source < length
        distance = (target[:, None] - source[None, :]).to(tl.float32)
        weight = tl.exp2(distance * distance * exponent)
        if before_ptr is not None:
            weight *= tl.load(before_ptr + source, mask=source_ok, other=0.0)[None, :]
        offset = (source.to(tl.int64) * inner)[:, None] + place
        values = tl.load(values_ptr + offset, mask=source_ok[:, None] & column_ok, other=0.0)
        total = tl.dot(weight, values, total, input_precision=PRECISION)
    target_ok = target < length
    if after_ptr is not None:
        total *= tl.load(after_ptr + target, mask=target_ok, other=0.0)[:, None]
    offset = (target.to(tl.int64) * inner)[:, None] + place
    tl.store(out_ptr + offset, total, mask=target_ok[:, None] & column_ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    return [
        Tile(64, 64, 32, 4, 2),
        Tile(64, 128, 32, 4, 2),
        Tile(32, 64, 32, 4, 2),
        Tile(64, 64, 16, 4, 3),
        Tile(128, 64, 32, 8, 2),
    ]


register_candidates("spatial_gaussian", _candidates)

# (along x, along y)
Pair = tuple[torch.Tensor | None, torch.Tensor | None]


def spatial_gaussian(
    values: torch.Tensor,
    size: tuple[int, int],
    theta: tuple[float, float],
    before: Pair = (None, None),
    after: Pair = (None, None),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """after K before values: values fp32 [B, H W, C], contiguous, pixels in raster order; size is (H, W).

    theta: the standard deviations in pixels, (along x, along y). before and after are factors of columns and
    rows, fp32 ([W], [H]), whose products are the pixels'. Sums in fp32, any theta: one past the image costs
    its length.
    """
    batch, _, channels = values.shape
    height, width = size
    between = torch.empty_like(values)
    out = torch.empty_like(values) if out is None else out
    _along(values, between, (batch * height, width, channels), theta[0], before[0], after[0])
    _along(between, out, (batch, height, width * channels), theta[1], before[1], after[1])
    return out


def _along(
    values: torch.Tensor,
    out: torch.Tensor,
    shape: tuple[int, int, int],
    theta: float,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
) -> None:
    """Filter the middle dimension of values seen in `shape`."""
    pointers = (values, before, after, out)
    key = ("spatial_gaussian", values.device, shape, theta, layout_key(*pointers))

    def make() -> Launch:
        outer, length, inner = shape
        columns = outer * inner
        radius = min(length, math.ceil(REACH * theta))
        problem = Problem(
            "spatial_gaussian", inner, inner, 2 * radius + 1, 1, values.dtype, outer * length,
            rows=length, columns=columns, depth=2 * radius + 1,
        )  # fmt: skip
        tile = choose_tile(problem, values.device)
        blocks = triton.cdiv(length, tile.block_m)
        # Bounded, or a pixel's distance 0 to itself would be NaN.
        exponent = max(-math.log2(math.e) / 2 / theta / theta, -1e30)
        constants = {
            "PRECISION": fp32_precision(),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        }
        grid = (blocks * triton.cdiv(columns, tile.block_n),)
        scalars = (length, inner, columns, blocks, radius, exponent)
        return Launch(_spatial_gaussian_kernel, grid, scalars, constants, tile)

    launch_for(key, make)(*pointers)
