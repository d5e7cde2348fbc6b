"""Forward by sub-pixel phases, one a program: any kernel, stride and dilation. And the copy of a skip image.

A program walks the taps of its own phase only and multiplies no zeros.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from .._epilogue import _activate, _affine
from .._pixels import _pixel
from .._tf32 import _rounded


@triton.jit
def _copy_skip(skip_ptr, y_ptr, tile, M, H, W, reciprocal_h, reciprocal_w, top, left,
               stride_sn, stride_sh, stride_sw, stride_yn, stride_yh, stride_yw, SKIP: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    # One [BLOCK_M pixels, BLOCK_N channels] tile of the cropped skip into the first channels of the output.
    TILES_N: tl.constexpr = (SKIP + BLOCK_N - 1) // BLOCK_N
    m = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (m < M)[:, None] & (c < SKIP)[None, :]
    n, h, w = _pixel(m, H, W, reciprocal_h, reciprocal_w)
    source = tl.multiple_of(n * stride_sn + (h + top) * stride_sh + (w + left) * stride_sw, ALIGN)
    target = tl.multiple_of(n * stride_yn + h * stride_yh + w * stride_yw, ALIGN)
    values = tl.load(skip_ptr + source[:, None] + c[None, :], mask=ok, other=0.0)
    tl.store(y_ptr + target[:, None] + c[None, :], values, mask=ok)


@triton.jit
def _conv_transpose2d_forward_phase_kernel(
    x_ptr, w_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, skip_ptr, y_ptr,
    M, H, W, OH, OW, PHASE_H, PHASE_W, reciprocal_h, reciprocal_w, tiles, negative_slope,
    stride_xn, stride_xh, stride_xw, stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    skip_pixels, reciprocal_oh, reciprocal_ow, top, left, stride_sn, stride_sh, stride_sw,
    CI: tl.constexpr, CO: tl.constexpr, SKIP: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GCD_H: tl.constexpr, GCD_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TF32: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI and CO are the channels of one group; M = N * PHASE_H * PHASE_W, the pixels of the largest phase.
    pid = tl.program_id(0)
    group = tl.program_id(1)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    if SKIP > 0 and pid >= tiles:
        _copy_skip(skip_ptr, y_ptr, pid - tiles, skip_pixels, OH, OW, reciprocal_oh, reciprocal_ow, top, left,
                   stride_sn, stride_sh, stride_sw, stride_yn, stride_yh, stride_yw,
                   SKIP, ALIGN=ALIGN, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)  # fmt: skip
    else:
        TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
        # Phase fastest, then columns: programs that run together read the same input rows, through L2.
        phase_w = pid % STRIDE_W
        phase_h = pid // STRIDE_W % STRIDE_H
        tile_n = pid // (STRIDE_W * STRIDE_H) % TILES_N
        tile_m = pid // (STRIDE_W * STRIDE_H * TILES_N)

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n, i_h, i_w = _pixel(m, PHASE_H, PHASE_W, reciprocal_h, reciprocal_w)
        oh = i_h * STRIDE_H + phase_h
        ow = i_w * STRIDE_W + phase_w
        row_ok = (m < M) & (oh < OH) & (ow < OW)

        # Taps with (kh * dilation) = (phase + pad) mod stride: first, first + step, ... ; none if the gcd of
        # stride and dilation does not divide the right side. INVERSE is that of dilation / gcd modulo step =
        # stride / gcd.
        STEP_H: tl.constexpr = STRIDE_H // GCD_H
        STEP_W: tl.constexpr = STRIDE_W // GCD_W
        shifted_h = phase_h + PAD_H
        shifted_w = phase_w + PAD_W
        first_h = (shifted_h // GCD_H * INVERSE_H) % STEP_H
        first_w = (shifted_w // GCD_W * INVERSE_W) % STEP_W
        taps_h = tl.where(
            shifted_h % GCD_H == 0, tl.maximum((KERNEL_H - first_h + STEP_H - 1) // STEP_H, 0), 0
        )
        taps_w = tl.where(
            shifted_w % GCD_W == 0, tl.maximum((KERNEL_W - first_w + STEP_W - 1) // STEP_W, 0), 0
        )
        # Exact divisions where there are taps; a tap further on reads dilation / gcd input pixels back.
        top_h = i_h + (shifted_h - first_h * DILATION_H) // STRIDE_H
        top_w = i_w + (shifted_w - first_w * DILATION_W) // STRIDE_W

        c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        channel_ok = c < CO
        k = tl.arange(0, BLOCK_K)
        x_rows = x_ptr + tl.multiple_of(n * stride_xn, ALIGN_X) + group * CI
        w_group = w_ptr + group.to(tl.int64) * (CI * KERNEL_H * KERNEL_W * CO)
        DEPTH_TILES: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, taps_h * taps_w * DEPTH_TILES):
            tap = step // DEPTH_TILES
            tap_h = tap // taps_w
            tap_w = tap % taps_w
            ci = step % DEPTH_TILES * BLOCK_K + k
            ih = top_h - tap_h * (DILATION_H // GCD_H)
            iw = top_w - tap_w * (DILATION_W // GCD_W)
            ok = row_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            offsets = tl.multiple_of(ih * stride_xh + iw * stride_xw, ALIGN_X)
            a = tl.load((x_rows + offsets)[:, None] + ci[None, :],
                        mask=ok[:, None] & (ci < CI)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]  # fmt: skip
            kernel_tap = (first_h + tap_h * STEP_H) * KERNEL_W + first_w + tap_w * STEP_W
            b = tl.load(w_group + ci[:, None] * (KERNEL_H * KERNEL_W * CO) + kernel_tap * CO + c[None, :],
                        mask=(ci < CI)[:, None] & channel_ok[None, :], other=0.0)  # fmt: skip
            accumulator = tl.dot(_rounded(a, TF32), _rounded(b, TF32), accumulator, input_precision=PRECISION)

        channel = group * CO + c
        y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, channel, channel_ok)
        ok = row_ok[:, None] & channel_ok[None, :]
        if residual_ptr is not None:
            offsets = tl.multiple_of(n * stride_rn + oh * stride_rh + ow * stride_rw, ALIGN)
            y += tl.load(residual_ptr + offsets[:, None] + channel[None, :], mask=ok, other=0.0).to(
                tl.float32
            )
        y = _activate(y, negative_slope, ACTIVATION)
        offsets = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN)
        tl.store(y_ptr + offsets[:, None] + (SKIP + channel)[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def phase_constants(stride: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    """The constants by which a phase finds its taps: see STEP_H and STEP_W in the kernel."""
    constants: dict[str, int] = {}
    for axis, s, d in zip("HW", stride, dilation, strict=True):
        gcd = math.gcd(s, d)
        inverse = pow(d // gcd, -1, s // gcd) if s > gcd else 0
        constants |= {f"DILATION_{axis}": d, f"GCD_{axis}": gcd, f"INVERSE_{axis}": inverse}
    return constants
