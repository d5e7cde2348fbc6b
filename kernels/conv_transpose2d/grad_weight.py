"""Gradient of the weight: x transposed times the output's gradient, the pixels of the whole batch as depth.

gw[k, (kh, kw, c)] = sum over (n, ih, iw) of x[n, k, ih, iw] gy[n, c, stride ih - pad + dilation kh, ...].
Columns run over (tap, channel), the weight's own order. Where a program has one tap, its pixels are the
rectangle that the tap brings onto the gradient: none is multiplied by padding, of which large dilations are
full. The depth is long and the matrix small, so it is cut into SPLIT parts whose fp32 results go to a
workspace and are summed in a fixed order.

A convolution's weight has the same gradient with image and gradient exchanged.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._device import architecture, bounded, dot_precision
from .._fold import can_fold, fold_alignment, taps_inside
from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._split import reduce_partials
from .._tf32 import _rounded, multiplies_in_tf32
from .._tiles import (
    Problem,
    Tile,
    choose_tile,
    fit_operands,
    fit_registers,
    geometry_variant,
    operands_in_registers,
    register_candidates,
)


@triton.jit
def _conv_transpose2d_grad_weight_kernel(
    x_ptr, gy_ptr, gw_ptr,
    N, H, W, OH, OW,
    stride_xn, stride_xh, stride_xw, stride_gn, stride_gh, stride_gw,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    FOLD: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr, TF32: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, WIDE_INDEX: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # BLOCK_M input channels x BLOCK_N columns, over a part of the pixels. gw [SPLIT, GROUPS * CI, COLUMNS].
    pid = tl.program_id(0)
    split = tl.program_id(1)
    group = tl.program_id(2)
    if WIDE_INDEX:
        split = split.to(tl.int64)
    COLUMNS: tl.constexpr = KERNEL_H * KERNEL_W * CO
    # Columns whose addresses follow each other, as in grad_input: a tap's channels, with FOLD a row of taps.
    RUN: tl.constexpr = KERNEL_W * CO if FOLD else CO
    TAPS_W: tl.constexpr = 1 if FOLD else KERNEL_W
    ONE_RUN: tl.constexpr = FOLD or CO % BLOCK_N == 0
    BLOCKS: tl.constexpr = (RUN + BLOCK_N - 1) // BLOCK_N
    ci = pid % ((CI + BLOCK_M - 1) // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Columns slowest: the taps of one part share its gradient through L2.
    tile_n = pid // ((CI + BLOCK_M - 1) // BLOCK_M)
    if ONE_RUN:
        tap = tile_n // BLOCKS
        c = tile_n % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tap * RUN + c
        column_ok = c < RUN
    else:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = column < COLUMNS
        tap = column // CO
        c = column % CO
    tap_h = tap // TAPS_W * DILATION_H - PAD_H
    tap_w = tap % TAPS_W * DILATION_W - PAD_W
    if WIDE_INDEX:
        tap_h = tap_h.to(tl.int64)
        tap_w = tap_w.to(tl.int64)
    # Not through `group` where there is one: its product with an odd CO would hide the alignment.
    g_columns = (
        gy_ptr
        + tl.multiple_of(tap_h * stride_gh + tap_w * stride_gw, ALIGN)
        + (0 if FOLD else group * CO)
        + c
    )

    # The pixels whose tap lies on the gradient: from (top, left) on, this many rows and columns of an image.
    RECTANGLE: tl.constexpr = ONE_RUN and not FOLD and not INSIDE
    top, left, rows, columns = 0, 0, H, W
    if RECTANGLE:
        top = tl.maximum(-tap_h + STRIDE_H - 1, 0) // STRIDE_H
        left = tl.maximum(-tap_w + STRIDE_W - 1, 0) // STRIDE_W
        rows = tl.minimum(H, tl.maximum(OH - tap_h + STRIDE_H - 1, 0) // STRIDE_H) - top
        columns = tl.minimum(W, tl.maximum(OW - tap_w + STRIDE_W - 1, 0) // STRIDE_W) - left
        rows = tl.maximum(rows, 0)
        columns = tl.maximum(columns, 0)
    M = N * rows * columns
    rows = tl.maximum(rows, 1)
    columns = tl.maximum(columns, 1)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    chunk = ((M + SPLIT - 1) // SPLIT + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    first = split * chunk
    # Pixels as digits (n, ih, iw): those of a step's first one are carried from step to step, those of the
    # others found by adding with carry. A division for each pixel would cost more than the matrix product.
    k = tl.arange(0, BLOCK_K)
    k_w = k % columns
    k_h = k // columns % rows
    k_n = k // columns // rows
    first_w = first % columns
    first_h = first // columns % rows
    first_n = first // columns // rows
    for start in tl.range(first, tl.minimum(first + chunk, M), BLOCK_K):
        pixel_ok = start + k < M
        iw = first_w + k_w
        carry = iw >= columns
        iw = left + tl.where(carry, iw - columns, iw)
        ih = first_h + k_h + carry.to(tl.int32)
        carry = ih >= rows
        ih = top + tl.where(carry, ih - rows, ih)
        n = first_n + k_n + carry.to(tl.int32)
        x_rows = tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
        a = tl.load(x_ptr + x_rows[:, None] + (group * CI + ci)[None, :],
                    mask=pixel_ok[:, None] & (ci < CI)[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]  # fmt: skip
        g_rows = tl.multiple_of(n * stride_gn + ih * STRIDE_H * stride_gh + iw * STRIDE_W * stride_gw, ALIGN)
        if FOLD:
            oh = ih * STRIDE_H + tap_h
            ow = iw * STRIDE_W + tap_w
            ok = pixel_ok if INSIDE else pixel_ok & (oh >= 0) & (oh < OH)
            position = tl.multiple_of(ow * CO, ALIGN)[:, None] + c[None, :]
            # Not a product with the width alone: of images one pixel wide that is a constant.
            end = tl.multiple_of(tl.full((), CO, tl.int32) * OW, ALIGN)
            ok = ok[:, None] & (position >= 0) & (position < end) & column_ok[None, :]
        elif ONE_RUN:
            ok = pixel_ok[:, None]
        else:
            oh = (ih * STRIDE_H)[:, None] + tap_h[None, :]
            ow = (iw * STRIDE_W)[:, None] + tap_w[None, :]
            ok = pixel_ok[:, None] & column_ok[None, :]
            if not INSIDE:
                ok = ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        b = tl.load(g_columns[None, :] + g_rows[:, None], mask=ok, other=0.0)  # [BLOCK_K, BLOCK_N]
        a, b = tl.trans(_rounded(a, TF32)), _rounded(b, TF32)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        first_w += BLOCK_K % columns
        carry_w = first_w >= columns
        first_w = tl.where(carry_w, first_w - columns, first_w)
        first_h += BLOCK_K // columns % rows + carry_w.to(tl.int32)
        carry_h = first_h >= rows
        first_h = tl.where(carry_h, first_h - rows, first_h)
        first_n += BLOCK_K // columns // rows + carry_h.to(tl.int32)

    gw_rows = (split.to(tl.int64) * GROUPS + group) * CI + ci
    tl.store(gw_ptr + gw_rows[:, None] * COLUMNS + column[None, :], accumulator.to(gw_ptr.dtype.element_ty),
             mask=(ci < CI)[:, None] & column_ok[None, :])  # fmt: skip


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    if arch.startswith("gfx"):
        tiles = [Tile(64, 64, 32, 4, 2)]
    else:
        passes = operands_in_registers(problem.dtype.itemsize, arch)
        depth = 64 if problem.dtype.itemsize == 2 else 32 // max(passes, 1)
        rows = max(16, min(128, triton.next_power_of_2(problem.rows)))
        columns = max(16, min(128, triton.next_power_of_2(problem.columns)))
        tiles = [Tile(rows, columns, depth, 8 if rows * columns >= 128 * 128 or passes == 2 else 4, 3)]
        tiles.append(Tile(min(rows, 64), min(columns, 128), depth, 4, 4))
        if problem.columns >= 256 and rows == 128 and not passes:
            tiles.append(Tile(128, 256, depth, 8, 3))
    tiles = [fit_operands(tile, problem.dtype.itemsize, arch) for tile in tiles]
    if problem.dtype.itemsize == 4:
        tiles = [fit_registers(tile, 32) for tile in tiles]  # beside the digits of every pixel
    found = []
    for tile in tiles:
        programs = (
            triton.cdiv(problem.rows, tile.block_m)
            * triton.cdiv(problem.columns, tile.block_n)
            * problem.groups
        )
        # Two waves of programs on 132 processors, but at least eight steps for each.
        most = max(1, problem.depth // (8 * tile.block_k))
        for waves in (264, 528):
            split = min(triton.cdiv(waves, programs), most, 128)
            found.append(
                Tile(tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, split)
            )
    return found


register_candidates("conv_transpose2d_grad_weight", _candidates)
register_candidates("conv2d_grad_weight", _candidates, uses=("conv2d",))


def _problem(operation, x, gy, channels_out: int, kernel, stride, dilation, groups: int) -> Problem:
    batch, channels_in, height, width = x.shape
    taps, pixels = kernel[0] * kernel[1], batch * height * width
    sizes = {"rows": channels_in // groups, "columns": taps * channels_out, "depth": pixels}
    if operation == "conv2d_grad_weight":
        # Its image is what is the gradient here.
        variant = geometry_variant(stride, dilation, kernel)
        pixels = batch * gy.shape[2] * gy.shape[3]
        return Problem(
            operation,
            channels_out * groups,
            channels_in,
            taps,
            groups,
            x.dtype,
            pixels,
            **sizes,
            variant=variant,
        )
    return Problem(operation, channels_in, channels_out * groups, taps, groups, x.dtype, pixels, **sizes)


def _make(x, gy, w_shape, stride, padding, dilation, groups, operation) -> Launch:
    batch, channels_in, height, width = x.shape
    channels_out, kernel = w_shape[1], w_shape[2:]
    rows, columns = channels_in // groups, kernel[0] * kernel[1] * channels_out
    problem = _problem(operation, x, gy, channels_out, kernel, stride, dilation, groups)
    tile = choose_tile(problem, x.device)
    fold = can_fold(channels_out, groups, dilation, gy)
    align = fold_alignment(channels_out, stride, padding, gy) if fold else pixel_alignment(gy)
    wide = needs_wide_index(x, gy)
    if min(align, pixel_alignment(x)) * gy.element_size() < 8 or (wide and gy.element_size() == 4):
        # Fewer of the many narrow loads, or of the long addresses, to a thread.
        tile = fit_registers(replace(tile, num_warps=8), 16)
    runs, run = (kernel[0], kernel[1] * channels_out) if fold else (1, columns)
    scalars = (batch, height, width, *gy.shape[2:], *image_strides(x), *image_strides(gy))
    constants = {
        "CI": rows,
        "CO": channels_out,
        "GROUPS": groups,
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PRECISION": dot_precision(x.dtype),
        "TF32": multiplies_in_tf32(x.dtype),
        "FOLD": fold,
        "INSIDE": taps_inside((height, width), gy.shape[2:], kernel, stride, padding, dilation),
        "ALIGN": align,
        "ALIGN_X": pixel_alignment(x),
        "WIDE_INDEX": wide,
        "SPLIT": tile.split_k,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    tiles = triton.cdiv(rows, tile.block_m) * runs * triton.cdiv(run, tile.block_n)
    grid = (tiles, tile.split_k, groups)
    launch = Launch(_conv_transpose2d_grad_weight_kernel, grid, scalars, constants, tile)
    # mma.sync takes its operands from registers, of which ptxas would rather spill some than use all.
    tight = operands_in_registers(x.element_size(), architecture(x.device))
    return bounded(launch, x.device, 255) if tight else launch


def conv_transpose2d_grad_weight(
    x, gy, out, stride, padding, dilation, groups, operation: str = "conv_transpose2d_grad_weight"
) -> None:
    """out = gradient of the transposed convolution's weight.

    x [N, CI, H, W] and gy [N, CO, OH, OW]: any strides with a channel stride of 1. out [CI, CO/groups, KH,
    KW] dense in channels_last.
    """
    key = (operation, layout_key(x, gy, out), x.device, stride, padding, dilation, groups,
           dot_precision(x.dtype))  # fmt: skip
    launch = launch_for(key, lambda: _make(x, gy, out.shape, stride, padding, dilation, groups, operation))
    if launch.tile.split_k == 1:
        launch(x, gy, out)
        return
    partials = torch.empty((launch.tile.split_k, out.numel()), dtype=torch.float32, device=out.device)
    launch(x, gy, partials)
    reduce_partials(partials, out)
