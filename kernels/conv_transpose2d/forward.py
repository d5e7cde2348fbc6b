"""Forward by sub-pixel phases: output pixels with equal (oh + pad) mod stride use the same taps.

Two GEMMs, both with input positions as rows and channels as depth. `_wide` (kernel divisible by stride,
dilation 1) puts all phases side by side in its columns and reads the input once for them; with kernel ==
stride it is one plain matrix product whose rows are scattered. `_phase` (phases.py) serves everything else.
"""

import triton
import triton.language as tl

from .._device import dot_precision
from .._epilogue import _activate, _affine
from .._fold import can_fold, fold_alignment
from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tf32 import _rounded, multiplies_in_tf32
from .._tiles import (
    Problem,
    Tile,
    choose_tile,
    fit_operands,
    fit_registers,
    operands_in_registers,
    register_candidates,
)
from .phases import _conv_transpose2d_forward_phase_kernel, _copy_skip, phase_constants


@triton.jit
def _conv_transpose2d_forward_wide_kernel(
    x_ptr, w_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, skip_ptr, y_ptr,
    M, H, W, OH, OW, GRID_H, GRID_W, reciprocal_h, reciprocal_w, tiles, negative_slope,
    stride_xn, stride_xh, stride_xw, stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    skip_pixels, reciprocal_oh, reciprocal_ow, top, left, stride_sn, stride_sh, stride_sw,
    CI: tl.constexpr, CO: tl.constexpr, SKIP: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, EXACT: tl.constexpr, FOLD: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TF32: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Row (n, j_h, j_w) stands for the output pixels stride * j - pad + phase, all phases of it; M = N *
    # GRID_H * GRID_W. Column (phase_h, phase_w, c). Tap t of a phase reads input pixel j - t, whatever the
    # phase.
    pid = tl.program_id(0)
    group = tl.program_id(1)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    if SKIP > 0 and pid >= tiles:
        _copy_skip(skip_ptr, y_ptr, pid - tiles, skip_pixels, OH, OW, reciprocal_oh, reciprocal_ow, top, left,
                   stride_sn, stride_sh, stride_sw, stride_yn, stride_yh, stride_yw,
                   SKIP, ALIGN=ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)  # fmt: skip
    else:
        # Columns whose addresses follow each other: a phase's channels, and with FOLD, where pixels lie side
        # by side, those of a row of phases, as if the stride were 1 and the channels STRIDE_W times as many.
        RUN: tl.constexpr = STRIDE_W * CO if FOLD else CO
        PHASES_W: tl.constexpr = 1 if FOLD else STRIDE_W
        # One run a tile, or several. Written so that the channel stays a plain range: its contiguity is what
        # the 16-byte stores come from.
        ONE_RUN: tl.constexpr = FOLD or CO % BLOCK_N == 0
        if ONE_RUN:
            BLOCKS: tl.constexpr = (RUN + BLOCK_N - 1) // BLOCK_N
            TILES_N: tl.constexpr = STRIDE_H * PHASES_W * BLOCKS
            tile_n = pid % TILES_N
            tile_m = pid // TILES_N
            phase = tile_n // BLOCKS
            c = tile_n % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
            column_ok = c < RUN
            phase_h = phase // PHASES_W
            phase_w = phase % PHASES_W
        else:
            COLUMNS: tl.constexpr = STRIDE_H * STRIDE_W * CO
            TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
            tile_n = pid % TILES_N
            tile_m = pid // TILES_N
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            column_ok = column < COLUMNS
            c = column % CO
            phase_h = column // CO // STRIDE_W
            phase_w = column // CO % STRIDE_W

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n, j_h, j_w = _pixel(m, GRID_H, GRID_W, reciprocal_h, reciprocal_w)
        j_h += PAD_H // STRIDE_H
        j_w += PAD_W // STRIDE_W
        row_ok = m < M

        TAPS_H: tl.constexpr = KERNEL_H // STRIDE_H
        TAPS_W: tl.constexpr = KERNEL_W // STRIDE_W
        DEPTH_TILES: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
        k = tl.arange(0, BLOCK_K)
        x_rows = x_ptr + tl.multiple_of(n * stride_xn, ALIGN_X) + group * CI
        w_columns = (
            w_ptr
            + group.to(tl.int64) * (CI * KERNEL_H * KERNEL_W * CO)
            + (phase_h * KERNEL_W + phase_w) * CO
            + c
        )
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, TAPS_H * TAPS_W * DEPTH_TILES):
            tap = step // DEPTH_TILES
            tap_h = tap // TAPS_W
            tap_w = tap % TAPS_W
            ci = step % DEPTH_TILES * BLOCK_K + k
            ih = j_h - tap_h
            iw = j_w - tap_w
            if EXACT:
                ok = row_ok
            else:
                ok = row_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            offsets = tl.multiple_of(ih * stride_xh + iw * stride_xw, ALIGN_X)
            a = tl.load((x_rows + offsets)[:, None] + ci[None, :],
                        mask=ok[:, None] & (ci < CI)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]  # fmt: skip
            tap_offset = (tap_h * STRIDE_H * KERNEL_W + tap_w * STRIDE_W) * CO
            b = tl.load(w_columns[None, :] + ci[:, None] * (KERNEL_H * KERNEL_W * CO) + tap_offset,
                        mask=(ci < CI)[:, None] & column_ok[None, :], other=0.0)  # fmt: skip
            accumulator = tl.dot(_rounded(a, TF32), _rounded(b, TF32), accumulator, input_precision=PRECISION)

        if FOLD:
            channel = c
            y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, c % CO, column_ok)
        else:
            channel = group * CO + c
            y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, channel, column_ok)
        row_h = j_h * STRIDE_H - PAD_H
        row_w = j_w * STRIDE_W - PAD_W
        ok = row_ok[:, None] & column_ok[None, :]
        if FOLD:
            oh = row_h + phase_h
            position = tl.multiple_of(row_w * CO, ALIGN)[:, None] + c[None, :]
            # Not a product with the width alone: of images one pixel wide that is a constant.
            end = tl.multiple_of(tl.full((), CO, tl.int32) * OW, ALIGN)
            ok = ok & ((oh >= 0) & (oh < OH))[:, None] & (position >= 0) & (position < end)
        elif not EXACT:
            if ONE_RUN:
                oh = row_h + phase_h
                ow = row_w + phase_w
                ok = ok & ((oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW))[:, None]
            else:
                oh = row_h[:, None] + phase_h[None, :]
                ow = row_w[:, None] + phase_w[None, :]
                ok = ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        # A pixel's address is that of its row plus that of its phase; both are multiples of the pixel stride.
        if residual_ptr is not None:
            rows = tl.multiple_of(n * stride_rn + row_h * stride_rh + row_w * stride_rw, ALIGN)
            columns = tl.multiple_of(phase_h * stride_rh + phase_w * stride_rw, ALIGN) + channel
            y += tl.load(residual_ptr + rows[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
        y = _activate(y, negative_slope, ACTIVATION)
        rows = tl.multiple_of(n * stride_yn + row_h * stride_yh + row_w * stride_yw, ALIGN)
        columns = tl.multiple_of(phase_h * stride_yh + phase_w * stride_yw, ALIGN) + channel + SKIP
        tl.store(y_ptr + rows[:, None] + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    if arch.startswith("gfx"):
        return [Tile(128, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)]
    passes = operands_in_registers(problem.dtype.itemsize, arch)
    depth = 64 if problem.dtype.itemsize == 2 else 32
    depth = max(16, min(depth, triton.next_power_of_2(problem.channels_in // problem.groups)))
    if problem.channels_out // problem.groups * problem.dtype.itemsize % 16 != 0:
        # Odd channel counts (21 classes): short runs, and narrow accesses that want few to a thread. With 4
        # warps each has more rows and columns for the same divisions: to be timed, for some compilers spill.
        found = [Tile(64, 256, depth, 8, 3), Tile(128, 128, depth, 8, 3), Tile(128, 64, depth, 8, 3)]
        if arch == "sm_90":
            found.insert(1, Tile(64, 256, depth, 4, 3))
        return [fit_registers(tile, 32 // passes) for tile in found] if passes else found
    wide = max(16, min(256, triton.next_power_of_2(problem.columns)))
    found = []
    if wide >= 256 and not passes:
        found.append(Tile(128, 256, depth, 8, 3))
    if wide >= 128:
        found.append(Tile(128, 128, depth, 8, 4))
        found.append(Tile(64, 128, depth, 4, 4))
    narrow = min(wide, 64)
    found += [Tile(128, narrow, depth, 4, 4), Tile(64, narrow, depth, 4, 4)]
    # Few rows leave processors idle: prefer small tiles until there are two waves of them on a large GPU.
    programs = (problem.columns * problem.rows) // (found[0].block_m * found[0].block_n)
    if programs < 264:
        found.sort(key=lambda tile: tile.block_m * tile.block_n)
    return [fit_operands(tile, problem.dtype.itemsize, arch) for tile in found]


register_candidates("conv_transpose2d_forward", _candidates)


def _grid_of_phases(out: int, stride: int, padding: int) -> int:
    return (out - 1 + padding) // stride - padding // stride + 1


def _make(
    x, w, bias, scale, shift, residual, skip, out, stride, padding, dilation, groups, crop, activation, slope,
    tile: Tile | None,
) -> Launch:  # fmt: skip
    # Long, as it lists the scalars and constants of two kernels in their order; run once for each layout.
    batch, channels_in, height, width = x.shape
    channels_out, kernel = w.shape[1], w.shape[2:]
    skip_channels = 0 if skip is None else skip.shape[1]
    out_size = out.shape[2:]
    wide = tuple(dilation) == (1, 1) and all(k % s == 0 for k, s in zip(kernel, stride, strict=True))
    if wide:
        grid_size = [_grid_of_phases(o, s, p) for o, s, p in zip(out_size, stride, padding, strict=True)]
    else:
        grid_size = [triton.cdiv(o, s) for o, s in zip(out_size, stride, strict=True)]
    rows = batch * grid_size[0] * grid_size[1]
    columns = channels_out * (stride[0] * stride[1] if wide else 1)
    problem = Problem(
        "conv_transpose2d_forward",
        channels_in,
        channels_out * groups,
        kernel[0] * kernel[1],
        groups,
        x.dtype,
        batch * height * width,
        rows,
        columns,
        channels_in // groups,
    )
    tile = tile or choose_tile(problem, x.device)
    fold = wide and can_fold(channels_out, groups, dilation, out, residual)
    if fold:
        align = fold_alignment(channels_out, stride, padding, out, residual)
    else:
        align = pixel_alignment(residual, skip, out)
    if (align if fold else min(align, pixel_alignment(x))) * x.element_size() < 8:
        tile = fit_registers(tile, 32)  # as many addresses beside them
    elif residual is not None or activation == "gelu":
        tile = fit_registers(tile, 64 if x.element_size() == 2 else 32)
    if fold:
        tiles_n = stride[0] * triton.cdiv(stride[1] * channels_out, tile.block_n)
    else:
        tiles_n = triton.cdiv(columns, tile.block_n)
    tiles = triton.cdiv(rows, tile.block_m) * tiles_n
    if not wide:
        tiles *= stride[0] * stride[1]
    copies = skip_pixels = 0
    if skip is not None:
        skip_pixels = batch * out_size[0] * out_size[1]
        copies = triton.cdiv(skip_pixels, tile.block_m) * triton.cdiv(skip_channels, tile.block_n)

    scalars = (
        rows,
        height,
        width,
        *out_size,
        *grid_size,
        *map(reciprocal, grid_size),
        tiles,
        float(slope),
        *image_strides(x),
        *image_strides(residual),
        *image_strides(out),
        skip_pixels,
        *map(reciprocal, out_size),
        *crop,
        *image_strides(skip),
    )
    constants = {
        "CI": channels_in // groups,
        "CO": channels_out,
        "SKIP": skip_channels,
        "ACTIVATION": activation,
        "PRECISION": dot_precision(x.dtype),
        "TF32": multiplies_in_tf32(x.dtype),
        "ALIGN_X": pixel_alignment(x),
        "ALIGN": align,
        "WIDE_INDEX": needs_wide_index(x, residual, skip, out),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    for axis, k, s, p in zip("HW", kernel, stride, padding, strict=True):
        constants |= {f"KERNEL_{axis}": k, f"STRIDE_{axis}": s, f"PAD_{axis}": p}
    if wide:
        exact = (
            tuple(kernel) == tuple(stride)
            and tuple(grid_size) == (height, width)
            and tuple(padding) == (0, 0)
            and tuple(out_size) == (height * stride[0], width * stride[1])
        )
        constants |= {"EXACT": exact, "FOLD": fold}
        function = _conv_transpose2d_forward_wide_kernel
    else:
        constants |= phase_constants(stride, dilation)
        function = _conv_transpose2d_forward_phase_kernel
    # Groups share the skip: its tiles belong to group 0, which up_concat has alone.
    return Launch(function, (tiles + copies, groups), scalars, constants, tile)


def conv_transpose2d_forward(
    x, w, bias, scale, shift, residual, skip, out, stride, padding, dilation, groups, crop, activation,
    negative_slope, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """out = cat([skip[crop:], act(scale * (convT(x, w) + bias) + shift + residual)], 1).

    x [N, CI, H, W], residual and out [N, SKIP + CO, OH, OW], skip: any strides with a channel stride of 1. w
    [CI, CO/groups, KH, KW] dense in channels_last. bias, scale, shift [CO] dense. With a skip there is one
    group and no residual. `tile` in place of the operation's own serves another that launches this one.

    Returns the launch, which the caller may call again with other pointers of the same layout and alignment.
    """
    operands = (x, w, bias, scale, shift, residual, skip, out)
    options = (stride, padding, dilation, groups, crop, activation, negative_slope, tile)
    key = ("conv_transpose2d_forward", layout_key(*operands), x.device, options, dot_precision(x.dtype))
    launch = launch_for(key, lambda: _make(*operands, *options))
    launch(*operands)
    return launch
