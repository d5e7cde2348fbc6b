"""Batch norm in training: mean and variance in one pass, then norm, addition and activation in another.

Images [N, C, H, W], dense in channels_last, are matrices of pixels by channels here. The statistics survive
means far from zero (Chan et al. 1979): a program has the mean and the sum of squares about it of the pixels
it has seen, and merges a block's with them; a second kernel merges the programs', in their order. All of it
of the distances from the first pixel, so that a mean far from zero costs no digits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._epilogue import _activate
from ._launch import Launch, launch_for, layout_key
from ._tiles import Problem, Tile, choose_tile, register_candidates

PROGRAMS = 1024  # that sum over rows: several waves of them on the largest GPU


@triton.jit
def _normalized(x_ptr, mean_ptr, var_ptr, offsets, ok, c, c_ok, eps):
    # (x - mean) / sqrt(var + eps), [BLOCK_M, BLOCK_N] and the last factor [BLOCK_N].
    mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0)
    invstd = tl.rsqrt(tl.load(var_ptr + c, mask=c_ok, other=1.0) + eps)
    x = tl.load(x_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    return (x - mean[None, :]) * invstd[None, :], invstd


@triton.jit
def _before_activation(normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok):
    z = normalized
    if weight_ptr is not None:
        z *= tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    return z


class Rows(NamedTuple):
    """A tile, the pixels and channels of an image, and how many blocks of pixels a program goes through."""

    tile: Tile
    pixels: int
    channels: int
    steps: int

    @property
    def chunks(self) -> int:
        """Programs that share out the pixels of a block of channels."""
        return triton.cdiv(self.pixels, self.steps * self.tile.block_m)

    @property
    def grid(self) -> tuple[int, int]:
        return self.chunks, triton.cdiv(self.channels, self.tile.block_n)


def rows_of(operation: str, x: torch.Tensor, sums: bool) -> Rows:
    """The rows of x [N, C, H, W]; of `sums` a program goes through many blocks, else through one."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    problem = Problem(operation, channels, channels, 1, 1, x.dtype, pixels, pixels, channels, depth=1)
    tile = choose_tile(problem, x.device)
    blocks = triton.cdiv(pixels, tile.block_m)
    chunks = max(1, PROGRAMS // triton.cdiv(channels, tile.block_n)) if sums else blocks
    return Rows(tile, pixels, channels, triton.cdiv(blocks, chunks))


def row_candidates(problem: Problem, arch: str) -> list[Tile]:
    """Blocks of pixels by channels, as many of these as there are and a cache line has."""
    wide = min(64, triton.next_power_of_2(problem.channels_in))
    return [Tile(size // wide, wide, 1, warps, 1) for size, warps in ((2048, 4), (4096, 4), (4096, 8))]


@triton.jit
def _batch_norm_statistics_kernel(
    x_ptr, means_ptr, squares_ptr, pixels, C, steps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    first = chunk * steps * BLOCK_M
    origin = tl.load(x_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    seen = 0.0
    for step in tl.range(0, steps):
        row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = (row < pixels)[:, None] & c_ok[None, :]
        x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, x - origin[None, :], 0.0)
        count = tl.minimum(tl.maximum(pixels - first - step * BLOCK_M, 0), BLOCK_M).to(tl.float32)
        block_mean = tl.sum(x, 0) / tl.maximum(count, 1.0)
        d = tl.where(ok, x - block_mean[None, :], 0.0)
        apart = block_mean - mean
        share = count / tl.maximum(seen + count, 1.0)
        squares += tl.sum(d * d, 0) + apart * apart * (seen * share)
        mean += apart * share
        seen += count
    tl.store(means_ptr + chunk * C + c, mean, mask=c_ok)
    tl.store(squares_ptr + chunk * C + c, squares, mask=c_ok)


@triton.jit
def _batch_norm_merge_kernel(
    x_ptr, means_ptr, squares_ptr, mean_ptr, var_ptr, pixels, C, chunks, chunk_pixels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    mean = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    seen = 0.0
    for first in tl.range(0, chunks, BLOCK_M):
        chunk = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        ok = (chunk < chunks)[:, None] & c_ok[None, :]
        offsets = chunk[:, None] * C + c[None, :]
        means = tl.load(means_ptr + offsets, mask=ok, other=0.0)
        inner = tl.load(squares_ptr + offsets, mask=ok, other=0.0)
        count = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels).to(tl.float32)
        block = tl.sum(count, 0)
        weight = (count / block)[:, None]
        block_mean = tl.sum(weight * means, 0)
        d = tl.where(ok, means - block_mean[None, :], 0.0)
        block_squares = tl.sum(inner + count[:, None] * d * d, 0)
        apart = block_mean - mean
        share = block / (seen + block)
        squares += block_squares + apart * apart * (seen * share)
        mean += apart * share
        seen += block
    origin = tl.load(x_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    tl.store(mean_ptr + c, origin + mean, mask=c_ok)
    tl.store(var_ptr + c, squares / pixels, mask=c_ok)


def batch_norm_statistics(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
    """mean, var = of each channel of x [N, C, H, W], dense in channels_last; fp32 [C], var biased."""

    def make():
        rows = rows_of("batch_norm_statistics", x, sums=True)
        tile, chunks, channels = rows.tile, rows.chunks, rows.channels
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        sizes = (rows.pixels, channels, rows.steps)
        partial = Launch(_batch_norm_statistics_kernel, rows.grid, sizes, blocks, tile)
        sizes = (rows.pixels, channels, chunks, rows.steps * tile.block_m)
        narrow = Tile(32, 16, 1, 4, 1)
        blocks = {"BLOCK_M": narrow.block_m, "BLOCK_N": narrow.block_n}
        merge = Launch(_batch_norm_merge_kernel, (triton.cdiv(channels, 16),), sizes, blocks, narrow)
        return partial, merge, (chunks, channels)

    key = ("batch_norm_statistics", x.device, layout_key(x, mean, var))
    partial, merge, shape = launch_for(key, make)
    means, squares = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    partial(x, means, squares)
    merge(x, means, squares, mean, var)


@triton.jit
def _batch_norm_apply_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, pixels, C, eps, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    ok = (row < pixels)[:, None] & c_ok[None, :]
    offsets = row[:, None] * C + c[None, :]
    normalized, _ = _normalized(x_ptr, mean_ptr, var_ptr, offsets, ok, c, c_ok, eps)
    z = _before_activation(normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok)
    y = _activate(z, negative_slope, ACTIVATION)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=ok)


def batch_norm_apply(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> None:
    """out = act(norm(x) + residual): these [N, C, H, W] dense in channels_last, the rest [C] contiguous."""

    def make() -> Launch:
        rows = rows_of("batch_norm_apply", x, sums=False)
        blocks = {"BLOCK_M": rows.tile.block_m, "BLOCK_N": rows.tile.block_n}
        scalars = (rows.pixels, rows.channels, float(eps), float(negative_slope))
        constants = {"ACTIVATION": activation, **blocks}
        return Launch(_batch_norm_apply_kernel, rows.grid, scalars, constants, rows.tile)

    tensors = (x, mean, var, weight, bias, residual, out)
    key = ("batch_norm_apply", x.device, layout_key(*tensors), eps, activation, negative_slope)
    launch_for(key, make)(*tensors)


register_candidates("batch_norm_statistics", row_candidates)
register_candidates("batch_norm_apply", row_candidates)
