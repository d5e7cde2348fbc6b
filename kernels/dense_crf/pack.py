"""Between images' rows [B, N, C] and the exact filter's sorted, padded, half-precision ones.

Up to 64 channels are split into two halves of fp16 each, the second in the second half of the columns. One
alone is off by up to 2**-12 of a value, and in the same way all over a flat region, which mean field
amplifies from iteration to iteration. The kernel values' own rounding averages out.
"""

import torch
import triton
import triton.language as tl

from .._launch import Launch, launch_for, layout_key
from .._tiles import Tile
from .exact import ExactPairs

_ELEMENTS = 4096  # of a program's block
_MOST_SPLIT = 64  # channels; with more the product would take longer than the exponentials


@triton.jit
def _exact_pack_kernel(
    values_ptr, order_ptr, before_ptr, scale_ptr, packed_ptr,
    ROWS, N, PADDED, C,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    image = row // PADDED
    place = row % PADDED
    there = row < ROWS
    ok = there & (place < N)
    point = image * N + tl.load(order_ptr + image * N + place, mask=ok, other=0)
    both = ok[:, None] & (c < C)[None, :]
    values = tl.load(values_ptr + point[:, None] * C + c[None, :], mask=both, other=0.0)
    if before_ptr is not None:
        values *= tl.load(before_ptr + point, mask=ok, other=0.0)[:, None]
    if scale_ptr is not None:
        values /= tl.load(scale_ptr + image[:, None] * C + c[None, :], mask=both, other=1.0)
    high = values.to(tl.float16)
    place = packed_ptr + row[:, None] * WIDTH + c[None, :]
    tl.store(place, high, mask=there[:, None])
    if SPLIT:
        low = (values - high.to(tl.float32)).to(tl.float16)
        tl.store(place + BLOCK_C, low, mask=there[:, None])


@triton.jit
def _exact_unpack_kernel(
    sums_ptr, rows_ptr, after_ptr, scale_ptr, out_ptr,
    POINTS, N, C,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    ok = point < POINTS
    both = ok[:, None] & (c < C)[None, :]
    row = tl.load(rows_ptr + point, mask=ok, other=0).to(tl.int64)
    place = sums_ptr + row[:, None] * WIDTH + c[None, :]
    sums = tl.load(place, mask=both, other=0.0)
    if SPLIT:
        sums += tl.load(place + WIDTH // 2, mask=both, other=0.0)
    if after_ptr is not None:
        sums *= tl.load(after_ptr + point, mask=ok, other=0.0)[:, None]
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + (point // N)[:, None] * C + c[None, :], mask=both, other=0.0)
    tl.store(out_ptr + point[:, None] * C + c[None, :], sums, mask=both)


def is_split(channels: int) -> bool:
    """True if so many channels are packed in two halves."""
    return channels <= _MOST_SPLIT


def packed_width(channels: int, split: bool | None = None) -> int:
    """Columns of packed values: a power of two that the matrix unit takes; split as `is_split` says."""
    split = is_split(channels) if split is None else split
    return max(16, triton.next_power_of_2(channels) * (1 + split))


def exact_pack(
    pairs: ExactPairs,
    values: torch.Tensor,
    before: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    split: bool | None = None,
) -> torch.Tensor:
    """fp16 [padded, width]: values fp32 [B, N, C], dense, times before [B, N], divided by scale [B, C].

    Zeros where there is no point or no channel. What fp16 cannot hold must have been scaled down.
    """
    channels = values.shape[2]
    split = is_split(channels) if split is None else split
    width = packed_width(channels, split)
    packed = torch.empty((pairs.padded, width), dtype=torch.float16, device=values.device)

    def make() -> Launch:
        columns = width // (1 + split)
        block = max(1, _ELEMENTS // columns)
        scalars = (pairs.padded, pairs.points, pairs.padded // pairs.batch, channels)
        grid = (triton.cdiv(pairs.padded, block),)
        constants = {"SPLIT": split, "WIDTH": width, "BLOCK_M": block, "BLOCK_C": columns}
        return Launch(_exact_pack_kernel, grid, scalars, constants, Tile(block, columns, 1, 4, 1))

    key = ("exact_pack", values.device, pairs.padded, split, layout_key(values, before, scale))
    launch_for(key, make)(values, pairs.order, before, scale, packed)
    return packed


def exact_unpack(
    pairs: ExactPairs,
    sums: torch.Tensor,
    channels: int,
    after: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    split: bool | None = None,
) -> torch.Tensor:
    """fp32 [B, N, C]: each point's row of sums [padded, width], times after [B, N] and scale [B, C].

    split: whether the sums are of values in two halves; by default as `exact_pack` packs so many channels.
    """
    split = is_split(channels) if split is None else split
    out = torch.empty((pairs.batch, pairs.points, channels), dtype=torch.float32, device=sums.device)

    def make() -> Launch:
        wide = triton.next_power_of_2(channels)
        block = max(1, _ELEMENTS // wide)
        points = pairs.batch * pairs.points
        constants = {"SPLIT": split, "WIDTH": sums.shape[1], "BLOCK_M": block, "BLOCK_C": wide}
        grid = (triton.cdiv(points, block),)
        scalars = (points, pairs.points, channels)
        return Launch(_exact_unpack_kernel, grid, scalars, constants, Tile(block, wide, 1, 4, 1))

    key = (
        "exact_unpack",
        sums.device,
        channels,
        split,
        layout_key(sums, after, scale),
        tuple(pairs.rows.shape),
    )
    launch_for(key, make)(sums, pairs.rows, after, scale, out)
    return out
