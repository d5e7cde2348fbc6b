"""Gradient of a depthwise convolution's input: each output's gradient spread over the taps it came from.

gx[n, c, ih, iw] = sum over (kh, kw) of gy[n, c, (ih + pad - dilation kh) / stride, ...] w[c, kh, kw], where
the division leaves no rest. At stride 1 that is the convolution with the filter turned round. At stride 2 the
input's pixels fall into phases, each with its own taps; a program computes all phases of its pixels, so that
a gradient is loaded once for all of them.
"""

import triton
import triton.language as tl

from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._shared import (
    Geometry,
    _mask,
    _widen,
    filter_strides,
    make_problem,
    tap_alignment,
    tap_tiles,
    vector,
    walk_tile,
    wide_rows,
    widens_by_ptx,
)
from .depthwise import walk_launch


@triton.jit
def _depthwise_conv2d_phases_kernel(
    gy_ptr, w_ptr, gx_ptr,
    H, W, OH, OW, ROW_BLOCKS, COLUMN_BLOCKS,
    stride_gn, stride_gh, stride_gw, stride_xn, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PTX: tl.constexpr, ALIGN_G: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr,
    WIDE_INDEX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Pixels (STRIDE_H * j + ph, STRIDE_W * i + pw) of all phases (ph, pw), for BLOCK_H rows j and BLOCK_W
    # columns i. Output row j + o reaches phase ph through kernel row ph + PAD_H - STRIDE_H * o.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    LEAST_H: tl.constexpr = -((KERNEL_H - 1 - PAD_H) // STRIDE_H)
    LEAST_W: tl.constexpr = -((KERNEL_W - 1 - PAD_W) // STRIDE_W)
    ROWS: tl.constexpr = (STRIDE_H - 1 + PAD_H) // STRIDE_H - LEAST_H + 1
    COLUMNS: tl.constexpr = (STRIDE_W - 1 + PAD_W) // STRIDE_W - LEAST_W + 1
    pid = tl.program_id(0)
    tile = pid // CHANNEL_BLOCKS
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    first = tile // COLUMN_BLOCKS % ROW_BLOCKS * BLOCK_H
    n = (tile // COLUMN_BLOCKS // ROW_BLOCKS).to(tl.int64)
    i = tile % COLUMN_BLOCKS * BLOCK_W + tl.arange(0, BLOCK_W)
    if WIDE_INDEX:
        i = i.to(tl.int64)
    g_base = gy_ptr + tl.multiple_of(n * stride_gn, ALIGN_G)
    x_base = gx_ptr + tl.multiple_of(n * stride_xn, ALIGN_X)
    weights = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        # Of constants alone, where both strides are 1, the sum is a constant: not what `multiple_of` takes.
        offset = tl.full((), tap // KERNEL_W, tl.int32) * stride_kh + tap % KERNEL_W * stride_kw
        w = tl.load(
            w_ptr + tl.multiple_of(offset, ALIGN_W) + c.to(tl.int64) * stride_kc, mask=c_ok, other=0.0
        )
        weights = weights + (w.to(tl.float32),)

    for j in tl.range(first, first + BLOCK_H, num_stages=1):
        sums = ()
        for _ in tl.static_range(STRIDE_H * STRIDE_W):
            sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),)
        gradients = ()
        for o in tl.static_range(ROWS * COLUMNS):
            oh = j + (o // COLUMNS + LEAST_H)
            ow = i + (o % COLUMNS + LEAST_W)
            ok = _mask((ow >= 0) & (ow < OW) & (oh >= 0) & (oh < OH))
            g_row = g_base + tl.multiple_of(oh.to(tl.int64) * stride_gh, ALIGN_G)
            g = tl.load(g_row + tl.multiple_of(ow * stride_gw, ALIGN_G)[:, None] + c[None, :],
                        mask=ok[:, None] & c_ok[None, :], other=0.0)  # fmt: skip
            gradients = gradients + (_widen(g, PTX),)
        for tap in tl.static_range(KERNEL_H * KERNEL_W):
            added = ()
            for phase in tl.static_range(STRIDE_H * STRIDE_W):
                # Each tap serves one phase, with the gradient of one output.
                if (
                    phase // STRIDE_W == (tap // KERNEL_W - PAD_H) % STRIDE_H
                    and phase % STRIDE_W == (tap % KERNEL_W - PAD_W) % STRIDE_W
                ):
                    g = gradients[
                        ((phase // STRIDE_W + PAD_H - tap // KERNEL_W) // STRIDE_H - LEAST_H) * COLUMNS
                        + (phase % STRIDE_W + PAD_W - tap % KERNEL_W) // STRIDE_W
                        - LEAST_W
                    ]
                    added = added + (sums[phase] + g * weights[tap][None, :],)
                else:
                    added = added + (sums[phase],)
            sums = added
        for phase in tl.static_range(STRIDE_H * STRIDE_W):
            ih = STRIDE_H * j + phase // STRIDE_W
            iw = STRIDE_W * i + phase % STRIDE_W
            x_row = x_base + tl.multiple_of(ih.to(tl.int64) * stride_xh, ALIGN_X)
            tl.store(x_row + tl.multiple_of(iw * stride_xw, ALIGN_X)[:, None] + c[None, :],
                     sums[phase].to(gx_ptr.dtype.element_ty),
                     mask=_mask((iw < W) & (ih < H))[:, None] & c_ok[None, :])  # fmt: skip


@triton.jit
def _depthwise_conv2d_grad_input_taps_kernel(
    gy_ptr, w_ptr, gx_ptr,
    M, H, W, OH, OW, reciprocal_h, reciprocal_w,
    stride_gn, stride_gh, stride_gw, stride_xn, stride_xh, stride_xw, stride_kc, stride_kh, stride_kw,
    C: tl.constexpr, MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN_G: tl.constexpr, ALIGN_X: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Any kernel, stride, dilation and number of filters a channel. C counts the input's channels.
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    c = pid % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    m = pid // CHANNEL_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < M
    n, ih, iw = _pixel(m, H, W, reciprocal_h, reciprocal_w)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in tl.range(0, KERNEL_H * KERNEL_W * MULTIPLIER, num_stages=1):
        kh = tap // MULTIPLIER // KERNEL_W
        kw = tap // MULTIPLIER % KERNEL_W
        channel = c * MULTIPLIER + tap % MULTIPLIER
        up_h = ih + PAD_H - kh * DILATION_H
        up_w = iw + PAD_W - kw * DILATION_W
        oh = up_h // STRIDE_H
        ow = up_w // STRIDE_W
        ok = m_ok & (up_h >= 0) & (up_w >= 0) & (up_h % STRIDE_H == 0) & (up_w % STRIDE_W == 0)
        ok = ok & (oh < OH) & (ow < OW)
        rows = tl.multiple_of(n * stride_gn + oh * stride_gh + ow * stride_gw, ALIGN_G)
        g = tl.load(gy_ptr + rows[:, None] + channel[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
        w = tl.load(w_ptr + kh * stride_kh + kw * stride_kw + channel * stride_kc, mask=c_ok, other=0.0)
        accumulator += g.to(tl.float32) * w.to(tl.float32)[None, :]
    rows = tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
    tl.store(gx_ptr + rows[:, None] + c[None, :], accumulator.to(gx_ptr.dtype.element_ty),
             mask=m_ok[:, None] & c_ok[None, :])  # fmt: skip


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    return [walk_tile(problem, arch, rows) for rows in (16, 8, 4, 32)]


register_candidates("depthwise_conv2d_grad_input", _candidates)
register_candidates("depthwise_conv2d_grad_input_taps", tap_tiles)


def _phases_launch(gy, weight, gx, geometry) -> Launch:
    tile = choose_tile(make_problem("depthwise_conv2d_grad_input", gx, gy, geometry), gx.device)
    batch, channels, height, width = gx.shape
    taps = geometry.kernel[0] * geometry.kernel[1]
    row_blocks = triton.cdiv(triton.cdiv(height, geometry.stride[0]), tile.block_m)
    column_blocks = triton.cdiv(triton.cdiv(width, geometry.stride[1]), tile.block_k)
    most = vector(gx.element_size(), taps)
    scalars = (height, width, *gy.shape[2:], row_blocks, column_blocks, *image_strides(gy),
               *image_strides(gx), *filter_strides(weight))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "PTX": widens_by_ptx(gx),
        "ALIGN_G": min(most, pixel_alignment(gy)),
        "ALIGN_X": min(most, pixel_alignment(gx)),
        "ALIGN_W": min(most, tap_alignment(weight)),
        "WIDE_INDEX": wide_rows(gx, gy),
        "BLOCK_H": tile.block_m,
        "BLOCK_W": tile.block_k,
        "BLOCK_C": tile.block_n,
    }
    grid = (batch * row_blocks * column_blocks * triton.cdiv(channels, tile.block_n),)
    return Launch(_depthwise_conv2d_phases_kernel, grid, scalars, constants, tile)


def _taps_launch(gy, weight, gx, geometry) -> Launch:
    tile = choose_tile(make_problem("depthwise_conv2d_grad_input_taps", gx, gy, geometry), gx.device)
    batch, channels, height, width = gx.shape
    pixels = batch * height * width
    scalars = (pixels, height, width, *gy.shape[2:], reciprocal(height), reciprocal(width),
               *image_strides(gy), *image_strides(gx), *filter_strides(weight))  # fmt: skip
    constants = geometry.constants() | {
        "C": channels,
        "MULTIPLIER": geometry.multiplier,
        "ALIGN_G": pixel_alignment(gy),
        "ALIGN_X": pixel_alignment(gx),
        "WIDE_INDEX": needs_wide_index(gx, gy),
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_n,
    }
    grid = (triton.cdiv(pixels, tile.block_m) * triton.cdiv(channels, tile.block_n),)
    return Launch(_depthwise_conv2d_grad_input_taps_kernel, grid, scalars, constants, tile)


def depthwise_conv2d_grad_input(gy, weight, out, stride, padding, dilation) -> None:
    """out = gradient of the depthwise convolution's input.

    gy [N, C * M, OH, OW] and out [N, C, H, W]: any strides with a channel stride of 1. weight
    [C * M, 1, KH, KW]: any strides.
    """
    geometry = Geometry(tuple(weight.shape[2:]), stride, padding, dilation, weight.shape[0] // out.shape[1])
    key = ("depthwise_conv2d_grad_input", layout_key(gy, weight, out), out.device, stride, padding, dilation)
    if geometry.walks and stride == (1, 1):
        reach = tuple(d * (k - 1) - p for k, p, d in zip(geometry.kernel, padding, dilation, strict=True))
        turned = geometry._replace(padding=reach)
        launch = launch_for(
            key, lambda: walk_launch(gy, weight, out, turned, "depthwise_conv2d_grad_input", flip=True)
        )
        launch(None, gy, weight, None, None, None, out)
        return
    phases = geometry.walks and dilation == (1, 1)
    make = _phases_launch if phases else _taps_launch
    launch_for(key, lambda: make(gy, weight, out, geometry))(gy, weight, out)
