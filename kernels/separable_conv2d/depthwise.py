"""Depthwise convolution: y[n, c, oh, ow] = sum of x[n, c, stride oh - pad + dilation kh, ...] w[c, kh, kw].

A program computes a strip of rows, BLOCK_W columns, BLOCK_C channels. It walks down the input's rows and
adds each to all outputs it belongs to: KERNEL_H / STRIDE_H rows of sums are in the making at a time, in
registers, so that a pixel is loaded KERNEL_W times instead of KERNEL_H * KERNEL_W times. With a dilation d,
rows of equal index modulo d are walked together.

Images are channels_last in memory. The weight [C, 1, KH, KW] may lie anyhow: side by side, its channels are
loaded 16 bytes at a time, once for each strip.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .._device import architecture, bounded
from .._epilogue import _activate, _affine
from .._launch import TRITON, Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._shared import (
    Geometry,
    _load_rows,
    _mask,
    _widen,
    filter_strides,
    make_problem,
    programs,
    tap_alignment,
    tap_tiles,
    vector,
    walk_tile,
    wide_rows,
    widens_by_ptx,
)


@triton.jit
def _depthwise_conv2d_rows_kernel(
    sums_ptr, x_ptr, w_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr,
    HEIGHT, H, W, OH, OW, ROW_BLOCKS, COLUMN_BLOCKS,
    stride_xn, stride_xh, stride_xw, stride_yn, stride_yh, stride_yw, stride_kc, stride_kh, stride_kw,
    negative_slope,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, FLIP: tl.constexpr,
    ACTIVATION: tl.constexpr, PTX: tl.constexpr, AHEAD: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, ALIGN_W: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # HEIGHT rows x BLOCK_W columns x BLOCK_C channels. FLIP turns the filter round: the gradient of the input
    # at stride 1. Channels are the fastest program index: programs that run together share a pixel's lines.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    # Input row STRIDE_H * j + t belongs to the outputs j - i, through kernel row STRIDE_H * i + t.
    DEPTH: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    STEP: tl.constexpr = DILATION_H * STRIDE_H
    pid = tl.program_id(0)
    tile = pid // CHANNEL_BLOCKS
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    row_block = tile // COLUMN_BLOCKS % ROW_BLOCKS
    n = (tile // COLUMN_BLOCKS // ROW_BLOCKS).to(tl.int64)
    ow = tile % COLUMN_BLOCKS * BLOCK_W + tl.arange(0, BLOCK_W)
    # Outputs residue + DILATION_H * j: with a dilation the row blocks take its residues in turn.
    residue = row_block % DILATION_H
    first = row_block // DILATION_H * HEIGHT
    if WIDE_INDEX:
        ow = ow.to(tl.int64)
    column = ow * STRIDE_W - PAD_W

    x_base = x_ptr + tl.multiple_of(n * stride_xn, ALIGN_X)
    y_base = y_ptr + tl.multiple_of(n * stride_yn, ALIGN_Y)
    y_columns = tl.multiple_of(ow * stride_yw, ALIGN_Y)[:, None] + c[None, :]
    y_ok = (ow < OW)[:, None] & c_ok[None, :]
    weights = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        if FLIP:
            kh = KERNEL_H - 1 - tap // KERNEL_W
            kw = KERNEL_W - 1 - tap % KERNEL_W
        else:
            kh = tap // KERNEL_W
            kw = tap % KERNEL_W
        # Of constants alone, where both strides are 1, the sum is a constant: not what `multiple_of` takes.
        offset = tl.full((), kh, tl.int32) * stride_kh + kw * stride_kw
        w = tl.load(
            w_ptr + tl.multiple_of(offset, ALIGN_W) + c.to(tl.int64) * stride_kc, mask=c_ok, other=0.0
        )
        weights = weights + (w.to(tl.float32),)
    sums = ()
    for _ in tl.static_range(DEPTH):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)

    row = residue + STEP * first - PAD_H
    steps = HEIGHT + DEPTH - 1
    # The next steps' pixels are on their way while this one's are added, which is over long before its loads.
    # AHEAD = 2: in pairs of steps, so that the loads of two are waited for at a time.
    ahead = _load_rows(x_base, row, column, c, c_ok, H, W, stride_xh, stride_xw, KERNEL_W, STRIDE_H,
                       DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
    beyond = ahead
    if AHEAD == 2:
        beyond = _load_rows(x_base, tl.where(steps > 1, row + STEP, H), column, c, c_ok, H, W, stride_xh,
                            stride_xw, KERNEL_W, STRIDE_H, DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
    for start in tl.range(0, steps, AHEAD, num_stages=1):
        for part in tl.static_range(AHEAD):
            step = start + part
            pixels = ahead
            # Past the last step a row that is nowhere.
            later = tl.where(step + AHEAD < steps, row + AHEAD * STEP, H)
            if AHEAD == 1:
                ahead = _load_rows(x_base, later, column, c, c_ok, H, W, stride_xh, stride_xw, KERNEL_W,
                                   STRIDE_H, DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
            for p in tl.static_range(STRIDE_H * KERNEL_W):
                x = _widen(pixels[p], PTX)
                added = ()
                for i in tl.static_range(DEPTH):
                    if i * STRIDE_H + p // KERNEL_W < KERNEL_H:
                        added = added + (sums[i] + x * weights[i * STRIDE_H * KERNEL_W + p][None, :],)
                    else:
                        added = added + (sums[i],)
                sums = added
            oh = residue + DILATION_H * (first + step - DEPTH + 1)
            y = _affine(sums[DEPTH - 1], bias_ptr, scale_ptr, shift_ptr, c, c_ok)
            y = _activate(y, negative_slope, ACTIVATION)
            ok = _mask(y_ok & (oh < OH) & (step >= DEPTH - 1) & (step < steps))
            y_row = y_base + tl.multiple_of(oh.to(tl.int64) * stride_yh, ALIGN_Y)
            tl.store(y_row + y_columns, y.to(y_ptr.dtype.element_ty), mask=ok)
            if sums_ptr is not None:
                kept = tl.where(ok, y, 0.0)
                total += kept
                squares += kept * kept
            sums = (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),) + sums[: DEPTH - 1]
            if AHEAD == 2:
                ahead = beyond
                beyond = _load_rows(x_base, later, column, c, c_ok, H, W, stride_xh, stride_xw, KERNEL_W,
                                    STRIDE_H, DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
            row += STEP

    if sums_ptr is not None:
        # [tiles, 2, C]
        out = sums_ptr + tile.to(tl.int64) * (2 * C) + c
        tl.store(out, tl.sum(total, 0), mask=c_ok)
        tl.store(out + C, tl.sum(squares, 0), mask=c_ok)


@triton.jit
def _depthwise_conv2d_taps_kernel(
    x_ptr, w_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr,
    M, H, W, OH, OW, reciprocal_h, reciprocal_w,
    stride_xn, stride_xh, stride_xw, stride_yn, stride_yh, stride_yw, stride_kc, stride_kh, stride_kw,
    negative_slope,
    C: tl.constexpr, MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ACTIVATION: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, ALIGN_W: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Any kernel, stride, dilation and number of filters a channel. C counts the output's channels.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    m = pid // CHANNEL_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < M
    n, oh, ow = _pixel(m, OH, OW, reciprocal_h, reciprocal_w)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in tl.range(0, KERNEL_H * KERNEL_W, num_stages=1):
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        ih = oh * STRIDE_H - PAD_H + kh * DILATION_H
        iw = ow * STRIDE_W - PAD_W + kw * DILATION_W
        ok = m_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        rows = tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
        x = tl.load(x_ptr + rows[:, None] + (c // MULTIPLIER)[None, :], mask=ok[:, None] & c_ok[None, :],
                    other=0.0)  # fmt: skip
        w = tl.load(
            w_ptr + tl.multiple_of(kh * stride_kh + kw * stride_kw, ALIGN_W) + c.to(tl.int64) * stride_kc,
            mask=c_ok,
            other=0.0,
        )
        accumulator += x.to(tl.float32) * w.to(tl.float32)[None, :]
    y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, c, c_ok)
    y = _activate(y, negative_slope, ACTIVATION)
    rows = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN_Y)
    tl.store(y_ptr + rows[:, None] + c[None, :], y.to(y_ptr.dtype.element_ty),
             mask=m_ok[:, None] & c_ok[None, :])  # fmt: skip


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    # Tall blocks load their halo less often; a small image needs more of them to fill the device.
    tiles = [walk_tile(problem, arch, rows) for rows in (64, 32, 16, 8)]
    tiles.sort(key=lambda tile: programs(tile, problem) < 528)
    return [*tiles, walk_tile(problem, arch, 32, 8), walk_tile(problem, arch, 32, 32)]


register_candidates("depthwise_conv2d_forward", _candidates)
register_candidates("depthwise_conv2d_taps", tap_tiles)


def walk_launch(x, weight, y, geometry, operation, flip=False, activation=None, negative_slope=0.0,
              sums=False) -> Launch:  # fmt: skip
    """The launch of the walking kernel, for a convolution or (`flip`) for its input's gradient at stride 1.

    Called with (sums, x, weight, bias, scale, shift, y), sums None or, if `sums`, fp32 [tiles, 2, C].
    """
    tile = choose_tile(make_problem(operation, x, y, geometry), x.device)
    batch, channels, out_h, out_w = y.shape
    taps = geometry.kernel[0] * geometry.kernel[1]
    rows = triton.cdiv(out_h, geometry.dilation[0])
    height = triton.cdiv(rows, triton.cdiv(rows, tile.block_m))
    row_blocks = triton.cdiv(rows, height) * geometry.dilation[0]
    column_blocks = triton.cdiv(out_w, tile.block_k)
    most = vector(x.element_size(), taps)
    scalars = (height, *x.shape[2:], out_h, out_w, row_blocks, column_blocks, *image_strides(x),
               *image_strides(y), *filter_strides(weight), float(negative_slope))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "FLIP": flip,
        "ACTIVATION": activation,
        "PTX": widens_by_ptx(x),
        # Two steps' pixels at stride 2, or the sums beside them, would not fit the registers.
        "AHEAD": 1 if sums or geometry.stride[0] > 1 else 2,
        "ALIGN_X": min(most, pixel_alignment(x)),
        "ALIGN_Y": min(most, pixel_alignment(y)),
        "ALIGN_W": min(most, tap_alignment(weight)),
        "WIDE_INDEX": wide_rows(x, y),
        "BLOCK_W": tile.block_k,
        "BLOCK_C": tile.block_n,
    }
    grid = (batch * row_blocks * column_blocks * triton.cdiv(channels, tile.block_n),)
    launch = Launch(_depthwise_conv2d_rows_kernel, grid, scalars, constants, tile)
    if taps > 9:
        return launch
    # Triton 3.9 needs four registers more for the sums on sm_100, and would spill them.
    tight = sums and TRITON >= (3, 9) and architecture(x.device).startswith("sm_10")
    return bounded(launch, x.device, 176 if tight else 168)


def _taps_launch(x, weight, y, geometry, activation, negative_slope) -> Launch:
    tile = choose_tile(make_problem("depthwise_conv2d_taps", x, y, geometry), x.device)
    batch, channels, out_h, out_w = y.shape
    pixels = batch * out_h * out_w
    scalars = (pixels, *x.shape[2:], out_h, out_w, reciprocal(out_h), reciprocal(out_w),
               *image_strides(x), *image_strides(y), *filter_strides(weight),
               float(negative_slope))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "MULTIPLIER": geometry.multiplier,
        "ACTIVATION": activation,
        "ALIGN_X": pixel_alignment(x),
        "ALIGN_Y": pixel_alignment(y),
        "ALIGN_W": tap_alignment(weight),
        "WIDE_INDEX": needs_wide_index(x, y),
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_n,
    }
    grid = (triton.cdiv(pixels, tile.block_m) * triton.cdiv(channels, tile.block_n),)
    return Launch(_depthwise_conv2d_taps_kernel, grid, scalars, constants, tile)


def depthwise_conv2d_forward(
    x, weight, bias, scale, shift, out, statistics, stride, padding, dilation, activation, negative_slope
) -> Callable[..., None] | None:
    """out = act(scale * (conv(x, weight) + bias) + shift), and what launches it again.

    x [N, C, H, W] and out [N, C * M, OH, OW]: any strides with a channel stride of 1. weight
    [C * M, 1, KH, KW] of any strides. Vectors [C * M] contiguous, or None. `statistics`, None or fp32
    [N, 2, C * M], takes the result's sum and sum of squares over each image's pixels.

    Returns a function of (x, weight, bias, scale, shift, out), of tensors laid out alike, for a call without
    statistics; None for one with them.
    """
    operands = (x, weight, bias, scale, shift, out)
    key = (
        "depthwise_conv2d_forward",
        layout_key(*operands),
        statistics is None,  # a launch keeps the machine code of its first call
        x.device,
        stride,
        padding,
        dilation,
        activation,
        negative_slope,
    )
    geometry = Geometry(tuple(weight.shape[2:]), stride, padding, dilation, weight.shape[0] // x.shape[1])
    if not geometry.walks:
        launch = launch_for(key, lambda: _taps_launch(x, weight, out, geometry, activation, negative_slope))
        launch(*operands)
        if statistics is not None:
            torch.sum(out, (2, 3), dtype=torch.float32, out=statistics[:, 0])
            torch.sum(out.float().square(), (2, 3), out=statistics[:, 1])
        return launch if statistics is None else None
    launch = launch_for(
        key,
        lambda: walk_launch(
            x,
            weight,
            out,
            geometry,
            "depthwise_conv2d_forward",
            False,
            activation,
            negative_slope,
            statistics is not None,
        ),
    )
    if statistics is None:
        launch(None, *operands)
        return functools.partial(launch, None)
    batch, _, channels = statistics.shape
    tiles = launch.grid[0] // triton.cdiv(channels, launch.tile.block_n)
    sums = torch.empty((batch, tiles // batch, 2, channels), dtype=torch.float32, device=out.device)
    launch(sums, *operands)
    torch.sum(sums, 1, out=statistics)
    return None
