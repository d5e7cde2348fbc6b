"""Shared by the depthwise kernels: conversion, vector widths, how a problem is cut into tiles."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._device import inline_ptx
from .._tiles import Problem, Tile, geometry_variant

Pair = tuple[int, int]


@triton.jit
def _widen(x, PTX: tl.constexpr):
    # bfloat16 to float32 in one instruction an element: the compiler takes two, one to part a pair and one to
    # shift. PTX on NVIDIA GPUs only.
    if PTX:
        x = tl.inline_asm_elementwise(
            "{.reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, 0xffff0000;"
            " mov.b32 $0, lo; mov.b32 $1, hi;}",
            "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x.to(tl.float32)


@triton.jit
def _mask(ok):
    # Of a block's and scalars' comparisons: Triton 3.9's interpreter makes integers of these together, and
    # takes no mask but booleans. For the compiler this is `ok` itself.
    return ok != 0


@triton.jit
def _load_rows(
    x_base, first_row, column, c, c_ok, H, W, stride_xh, stride_xw,
    KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN_X: tl.constexpr,
):  # fmt: skip
    # STRIDE_H rows from first_row on, at KERNEL_W columns each: a tuple of [BLOCK_W, BLOCK_C].
    pixels = ()
    for p in tl.static_range(STRIDE_H * KERNEL_W):
        row = first_row + DILATION_H * (p // KERNEL_W)
        iw = column + DILATION_W * (p % KERNEL_W)
        ok = _mask((iw >= 0) & (iw < W) & (row >= 0) & (row < H))
        x_row = x_base + tl.multiple_of(row.to(tl.int64) * stride_xh, ALIGN_X)
        x = tl.load(x_row + tl.multiple_of(iw * stride_xw, ALIGN_X)[:, None] + c[None, :],
                    mask=ok[:, None] & c_ok[None, :], other=0.0)  # fmt: skip
        pixels = pixels + (x,)
    return pixels


def widens_by_ptx(t: torch.Tensor) -> bool:
    """True if `_widen` converts a value of `t`'s dtype by NVIDIA's assembler."""
    return t.dtype == torch.bfloat16 and inline_ptx()


def vector(itemsize: int, taps: int) -> int:
    """Channels a thread takes at a time: 16 bytes' worth, fewer where filters would fill its registers."""
    return max(1, (16 if taps <= 9 else 8 if taps <= 25 else 4) // itemsize)


class Geometry(NamedTuple):
    """Kernel, stride, padding and dilation, each (height, width), and the filters a channel has."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    multiplier: int = 1

    @property
    def walks(self) -> bool:
        """True if the kernels that walk along rows serve it; the others go tap by tap."""
        fits = max(self.kernel) <= 7 and max(self.stride) <= 2 and self.multiplier == 1
        return fits and (self.stride[0] == 1 or self.dilation[0] == 1)

    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        names = ("KERNEL", "STRIDE", "PAD", "DILATION")
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        return {f"{name}_{axis}": pair[i] for name, pair in zip(names, pairs, strict=True)
                for i, axis in enumerate("HW")}  # fmt: skip


def make_problem(operation: str, x: torch.Tensor, y: torch.Tensor, geometry: Geometry) -> Problem:
    """The problem of a convolution of `x` to `y`, or of one of its gradients."""
    batch, channels, height, width = x.shape
    taps = geometry.kernel[0] * geometry.kernel[1]
    variant = geometry_variant(geometry.stride, geometry.dilation, geometry.kernel)
    return Problem(
        operation, channels, y.shape[1], taps, channels, x.dtype, batch * height * width,
        rows=y.shape[2], columns=y.shape[3], depth=batch, variant=variant,
    )  # fmt: skip


def channel_block(channels: int) -> int:
    """The widest block of channels that leaves few of its lanes empty."""
    blocks = (64, 32, 16)
    waste = {block: triton.cdiv(channels, block) * block / channels for block in blocks}
    return next(block for block in blocks if waste[block] <= min(waste.values()) * 1.12)


def walk_tile(problem: Problem, arch: str, rows: int, columns: int = 16) -> Tile:
    """A tile of the kernels that walk along rows: one vector of channels a thread."""
    channels = channel_block(problem.channels_out)
    columns = min(columns, max(4, triton.next_power_of_2(problem.columns)))
    threads = columns * channels // vector(problem.dtype.itemsize, problem.taps)
    warp = 64 if arch.startswith("gfx") else 32
    return Tile(rows, channels, columns, max(1, min(8, threads // warp)), 1)


def programs(tile: Tile, problem: Problem) -> int:
    """How many programs a tile of rows x channels x columns makes of a problem."""
    return (
        problem.depth
        * triton.cdiv(problem.rows, tile.block_m)
        * triton.cdiv(problem.columns, tile.block_k)
        * triton.cdiv(problem.channels_out, tile.block_n)
    )


def tap_tiles(problem: Problem, arch: str) -> list[Tile]:
    """Tiles of pixels x channels for the kernels that go tap by tap."""
    channels = min(64, max(16, triton.next_power_of_2(problem.channels_out)))
    return [Tile(pixels, channels, 1, warps, 1) for pixels, warps in ((32, 4), (16, 2), (64, 4))]


def tap_alignment(weight: torch.Tensor) -> int:
    """The largest power of two, at most 16, that divides the offset of every tap of [C, 1, KH, KW]."""
    return math.gcd(16, *(weight.stride(axis) for axis in (2, 3) if weight.shape[axis] > 1))


def filter_strides(weight: torch.Tensor) -> tuple[int, int, int]:
    """Strides of channel, row and column of [C, 1, KH, KW]."""
    return weight.stride(0), weight.stride(2), weight.stride(3)


def wide_rows(*tensors: torch.Tensor) -> bool:
    """True if an offset within one row can pass 2**31 elements; rows and images are always counted wide."""
    return any(t.shape[3] * t.stride(3) >= 2**31 - 2**24 for t in tensors)
