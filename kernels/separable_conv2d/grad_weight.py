"""Gradient of a depthwise filter: for each channel and tap a dot product over all pixels of the batch.

gw[c, kh, kw] = sum over (n, oh, ow) of gy[n, c, oh, ow] x[n, c, stride oh - pad + dilation kh, ...]. A
program walks down strips of rows with one fp32 sum for each tap, channel and column in registers; the last
rows of gy are kept there too, so that x is loaded KERNEL_W times and gy once. The sums of each program go to
a workspace [SPLIT, taps, C], which a second kernel adds up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._shared import (
    Geometry,
    _load_rows,
    _mask,
    _widen,
    make_problem,
    tap_tiles,
    vector,
    walk_tile,
    wide_rows,
    widens_by_ptx,
)


@triton.jit
def _depthwise_conv2d_grad_weight_rows_kernel(
    x_ptr, gy_ptr, partials_ptr,
    STRIPS, HEIGHT, H, W, OH, OW, ROW_BLOCKS, COLUMN_BLOCKS,
    stride_xn, stride_xh, stride_xw, stride_gn, stride_gh, stride_gw,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PTX: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_G: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Strips of HEIGHT rows x BLOCK_W columns, every SPLIT-th of them for one program.
    DEPTH: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    split = tl.program_id(1)
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
    for strip in tl.range(split, STRIPS, tl.num_programs(1), num_stages=1):
        row_block = strip // COLUMN_BLOCKS % ROW_BLOCKS
        n = (strip // COLUMN_BLOCKS // ROW_BLOCKS).to(tl.int64)
        ow = strip % COLUMN_BLOCKS * BLOCK_W + tl.arange(0, BLOCK_W)
        residue = row_block % DILATION_H
        first = row_block // DILATION_H * HEIGHT
        if WIDE_INDEX:
            ow = ow.to(tl.int64)
        x_base = x_ptr + tl.multiple_of(n * stride_xn, ALIGN_X)
        g_base = gy_ptr + tl.multiple_of(n * stride_gn, ALIGN_G)
        g_columns = tl.multiple_of(ow * stride_gw, ALIGN_G)[:, None] + c[None, :]
        g_ok = (ow < OW)[:, None] & c_ok[None, :]
        recent = ()
        for _ in tl.static_range(DEPTH):
            recent = recent + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
        oh = residue + DILATION_H * first
        row = residue + DILATION_H * STRIDE_H * first - PAD_H
        column = ow * STRIDE_W - PAD_W
        steps = HEIGHT + DEPTH - 1
        # The next step's rows are on their way while this one's are multiplied.
        g_ahead = tl.load(g_base + tl.multiple_of(oh.to(tl.int64) * stride_gh, ALIGN_G) + g_columns,
                          mask=_mask(g_ok & (oh < OH)), other=0.0)  # fmt: skip
        ahead = _load_rows(x_base, row, column, c, c_ok, H, W, stride_xh, stride_xw, KERNEL_W, STRIDE_H,
                           DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
        for step in tl.range(0, steps, num_stages=1):
            # recent[i] is row step - i of the strip's gradients; past its end come zeros.
            recent = (_widen(g_ahead, PTX),) + recent[: DEPTH - 1]
            pixels = ahead
            oh += DILATION_H
            row += DILATION_H * STRIDE_H
            g_ahead = tl.load(g_base + tl.multiple_of(oh.to(tl.int64) * stride_gh, ALIGN_G) + g_columns,
                              mask=_mask(g_ok & (oh < OH) & (step + 1 < HEIGHT)), other=0.0)  # fmt: skip
            ahead = _load_rows(x_base, tl.where(step + 1 < steps, row, H), column, c, c_ok, H, W, stride_xh,
                               stride_xw, KERNEL_W, STRIDE_H, DILATION_H, DILATION_W, ALIGN_X)  # fmt: skip
            for p in tl.static_range(STRIDE_H * KERNEL_W):
                x = _widen(pixels[p], PTX)
                added = ()
                for tap in tl.static_range(TAPS):
                    if tap % (STRIDE_H * KERNEL_W) == p:
                        added = added + (sums[tap] + x * recent[tap // (STRIDE_H * KERNEL_W)],)
                    else:
                        added = added + (sums[tap],)
                sums = added
    out = partials_ptr + split.to(tl.int64) * (TAPS * C) + c
    for tap in tl.static_range(TAPS):
        tl.store(out + tap * C, tl.sum(sums[tap], 0), mask=c_ok)


@triton.jit
def _depthwise_conv2d_grad_weight_taps_kernel(
    x_ptr, gy_ptr, partials_ptr,
    M, CHUNK, H, W, OH, OW, reciprocal_h, reciprocal_w,
    stride_xn, stride_xh, stride_xw, stride_gn, stride_gh, stride_gw,
    C: tl.constexpr, MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_G: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One tap and BLOCK_C filters over CHUNK pixels: any kernel, stride, dilation and filters a channel.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    tap = pid // CHANNEL_BLOCKS
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(split * CHUNK, tl.minimum((split + 1) * CHUNK, M), BLOCK_M, num_stages=1):
        m = start + tl.arange(0, BLOCK_M)
        m_ok = m < M
        m = m.to(tl.int64 if WIDE_INDEX else tl.int32)
        n, oh, ow = _pixel(m, OH, OW, reciprocal_h, reciprocal_w)
        ih = oh * STRIDE_H - PAD_H + tap // KERNEL_W * DILATION_H
        iw = ow * STRIDE_W - PAD_W + tap % KERNEL_W * DILATION_W
        ok = m_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        g_rows = tl.multiple_of(n * stride_gn + oh * stride_gh + ow * stride_gw, ALIGN_G)
        g = tl.load(gy_ptr + g_rows[:, None] + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
        x_rows = tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
        x = tl.load(x_ptr + x_rows[:, None] + (c // MULTIPLIER)[None, :], mask=ok[:, None] & c_ok[None, :],
                    other=0.0)  # fmt: skip
        total += x.to(tl.float32) * g.to(tl.float32)
    tl.store(partials_ptr + (split * TAPS + tap) * C + c, tl.sum(total, 0), mask=c_ok)


@triton.jit
def _depthwise_conv2d_grad_weight_reduce_kernel(
    partials_ptr, gw_ptr, SPLIT, stride_wc, stride_wh, stride_ww,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = pid // CHANNEL_BLOCKS
    c_ok = c < C
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in tl.range(0, SPLIT, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = partials_ptr + (s.to(tl.int64) * (KERNEL_H * KERNEL_W) + tap) * C
        total += tl.load(rows[:, None] + c[None, :], mask=(s < SPLIT)[:, None] & c_ok[None, :], other=0.0)
    out = gw_ptr + c.to(tl.int64) * stride_wc + tap // KERNEL_W * stride_wh + tap % KERNEL_W * stride_ww
    tl.store(out, tl.sum(total, 0).to(gw_ptr.dtype.element_ty), mask=c_ok)


def _split(programs: int, pieces: int, waves: int) -> int:
    """Parts to cut the pixels into: `waves` programs on the device, at least a piece for each."""
    return max(1, min(triton.cdiv(waves, programs), pieces, 256))


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    found = []
    tiles = [(32, 16, 528), (32, 16, 1056), (64, 16, 528), (32, 8, 528), (16, 32, 1056)]
    if problem.taps > 9:
        # A thread's sums leave no room for a second column's, in fp32 hardly for the addresses.
        tiles = [tile for tile in tiles if tile[1] < 32]
        if problem.dtype.itemsize == 4:
            tiles = [(32, 8, 528), (64, 8, 528)]
    for height, columns, waves in tiles:
        tile = walk_tile(problem, arch, height, columns)
        blocks = triton.cdiv(problem.channels_out, tile.block_n)
        strips = (
            problem.depth * triton.cdiv(problem.rows, height) * triton.cdiv(problem.columns, tile.block_k)
        )
        split = _split(blocks, strips, waves)
        found.append(Tile(height, tile.block_n, tile.block_k, tile.num_warps, 1, split))
    return found


def _tap_candidates(problem: Problem, arch: str) -> list[Tile]:
    found = []
    for tile in tap_tiles(problem, arch):
        programs = problem.taps * triton.cdiv(problem.channels_out, tile.block_n)
        pixels = problem.depth * problem.rows * problem.columns
        split = _split(programs, triton.cdiv(pixels, 8 * tile.block_m), 1056)
        found.append(Tile(tile.block_m, tile.block_n, 1, tile.num_warps, 1, split))
    return found


register_candidates("depthwise_conv2d_grad_weight", _candidates)
register_candidates("depthwise_conv2d_grad_weight_taps", _tap_candidates)


def _rows_launch(x, gy, geometry) -> Launch:
    tile = choose_tile(make_problem("depthwise_conv2d_grad_weight", x, gy, geometry), x.device)
    batch, channels, out_h, out_w = gy.shape
    rows = triton.cdiv(out_h, geometry.dilation[0])
    height = triton.cdiv(rows, triton.cdiv(rows, tile.block_m))
    row_blocks = triton.cdiv(rows, height) * geometry.dilation[0]
    column_blocks = triton.cdiv(out_w, tile.block_k)
    strips = batch * row_blocks * column_blocks
    most = vector(x.element_size(), geometry.kernel[0] * geometry.kernel[1])
    scalars = (strips, height, *x.shape[2:], out_h, out_w, row_blocks, column_blocks, *image_strides(x),
               *image_strides(gy))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "PTX": widens_by_ptx(x),
        "ALIGN_X": min(most, pixel_alignment(x)),
        "ALIGN_G": min(most, pixel_alignment(gy)),
        "WIDE_INDEX": wide_rows(x, gy),
        "BLOCK_W": tile.block_k,
        "BLOCK_C": tile.block_n,
    }
    grid = (triton.cdiv(channels, tile.block_n), min(tile.split_k, strips))
    return Launch(_depthwise_conv2d_grad_weight_rows_kernel, grid, scalars, constants, tile)


def _taps_launch(x, gy, geometry) -> Launch:
    tile = choose_tile(make_problem("depthwise_conv2d_grad_weight_taps", x, gy, geometry), x.device)
    batch, channels, out_h, out_w = gy.shape
    pixels = batch * out_h * out_w
    chunk = triton.cdiv(triton.cdiv(pixels, tile.split_k), tile.block_m) * tile.block_m
    scalars = (pixels, chunk, *x.shape[2:], out_h, out_w, reciprocal(out_h), reciprocal(out_w),
               *image_strides(x), *image_strides(gy))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "MULTIPLIER": geometry.multiplier,
        "ALIGN_X": pixel_alignment(x),
        "ALIGN_G": pixel_alignment(gy),
        "WIDE_INDEX": needs_wide_index(x, gy) or pixels >= 2**31 - 2**16,
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_n,
    }
    taps = geometry.kernel[0] * geometry.kernel[1]
    grid = (taps * triton.cdiv(channels, tile.block_n), triton.cdiv(pixels, chunk))
    return Launch(_depthwise_conv2d_grad_weight_taps_kernel, grid, scalars, constants, tile)


def _reduce_launch(partials, gw) -> Launch:
    split, channels = partials.shape[0], gw.shape[0]
    constants = {
        "C": channels,
        "KERNEL_H": gw.shape[2],
        "KERNEL_W": gw.shape[3],
        "BLOCK_S": 32,
        "BLOCK_C": 64,
    }
    strides = (gw.stride(0), gw.stride(2), gw.stride(3))
    grid = (triton.cdiv(channels, 64) * gw.shape[2] * gw.shape[3],)
    tile = Tile(32, 64, 1, 4, 2)
    return Launch(_depthwise_conv2d_grad_weight_reduce_kernel, grid, (split, *strides), constants, tile)


def depthwise_conv2d_grad_weight(x, gy, out, stride, padding, dilation) -> None:
    """out = gradient of the depthwise convolution's weight.

    x [N, C, H, W] and gy [N, C * M, OH, OW]: any strides with a channel stride of 1. out [C * M, 1, KH, KW]:
    any strides.
    """
    geometry = Geometry(tuple(out.shape[2:]), stride, padding, dilation, out.shape[0] // x.shape[1])
    make = _rows_launch if geometry.walks else _taps_launch
    options = (x.device, stride, padding, dilation)
    key = ("depthwise_conv2d_grad_weight", layout_key(x, gy, out), *options)
    launch = launch_for(key, lambda: make(x, gy, geometry))
    shape = (launch.grid[1], out.shape[2] * out.shape[3], out.shape[0])
    partials = torch.empty(shape, dtype=torch.float32, device=out.device)
    launch(x, gy, partials)
    reduce_key = ("depthwise_conv2d_grad_weight_reduce", layout_key(partials, out), x.device)
    launch_for(reduce_key, lambda: _reduce_launch(partials, out))(partials, out)
