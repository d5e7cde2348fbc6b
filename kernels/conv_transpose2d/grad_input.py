"""Gradient of the input: a strided convolution of the output's gradient, as an implicit GEMM.

gx[n, k, ih, iw] = sum over taps and c of gy[n, c, stride ih - pad + dilation kh, ...] w[k, c, kh, kw]. Rows
are input pixels, columns input channels, depth is (tap, output channel): the weight's own order in memory, so
that few channels (21 classes) fill the depth tiles without padding.
"""

from dataclasses import replace

import triton
import triton.language as tl

from .._configs import (
    Config,
    Problem,
    choose_config,
    fit_operands,
    operands_in_registers,
    register_candidates,
)
from .._device import dot_precision
from .._launch import Plan, image_strides, layout_key, needs_wide_index, pixel_alignment, planned
from ._fold import can_fold, fold_alignment, taps_inside


@triton.jit
def _conv_transpose2d_grad_input_kernel(
    gy_ptr, w_ptr, gx_ptr,
    M, H, W, OH, OW,
    stride_gn, stride_gh, stride_gw, stride_xn, stride_xh, stride_xw,
    CI: tl.constexpr, CO: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    FOLD: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_X: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI and CO are the channels of one group; M = N * H * W. INSIDE: no tap of any pixel leaves the gradient.
    pid = tl.program_id(0)
    group = tl.program_id(1)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    m = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    ci = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    iw = m % W
    ih = m // W % H
    n = m // W // H
    row_ok = m < M
    row_h = ih * STRIDE_H - PAD_H
    row_w = iw * STRIDE_W - PAD_W

    # Depth whose addresses follow each other: a tap's channels, and with FOLD, where pixels lie side by side,
    # those of a row of taps, as if the kernel had width 1 and KERNEL_W times the channels.
    RUN: tl.constexpr = KERNEL_W * CO if FOLD else CO
    TAPS_W: tl.constexpr = 1 if FOLD else KERNEL_W
    ONE_RUN: tl.constexpr = FOLD or CO % BLOCK_K == 0
    BLOCKS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    DEPTH: tl.constexpr = KERNEL_H * KERNEL_W * CO
    STEPS: tl.constexpr = KERNEL_H * TAPS_W * BLOCKS if ONE_RUN else (DEPTH + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    # Not through `group` where there is one: its product with an odd CO would hide the alignment.
    g_rows = gy_ptr + tl.multiple_of(n * stride_gn, ALIGN) + (0 if FOLD else group * CO)
    w_columns = w_ptr + group.to(tl.int64) * (CI * DEPTH) + ci * DEPTH
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, STEPS):
        if ONE_RUN:
            # One tap, or one row of them, a step: the address is a pixel's, the channels follow.
            tap = step // BLOCKS
            channel = step % BLOCKS * BLOCK_K + k
            depth = tap * RUN + channel
            depth_ok = channel < RUN
            oh = row_h + tap // TAPS_W * DILATION_H
            ow = row_w + tap % TAPS_W * DILATION_W
            ok = row_ok if INSIDE else row_ok & (oh >= 0) & (oh < OH)
            if FOLD:
                position = tl.multiple_of(row_w * CO, ALIGN)[:, None] + channel[None, :]
                end = tl.multiple_of(OW * CO, ALIGN)
                ok = ok[:, None] & (position >= 0) & (position < end) & depth_ok[None, :]
            elif INSIDE:
                ok = ok[:, None]
            else:
                ok = (ok & (ow >= 0) & (ow < OW))[:, None]
            offsets = tl.multiple_of(oh * stride_gh + ow * stride_gw, ALIGN)
            a = tl.load(
                (g_rows + offsets)[:, None] + channel[None, :], mask=ok, other=0.0
            )  # [BLOCK_M, BLOCK_K]
        else:
            depth = step * BLOCK_K + k
            depth_ok = depth < DEPTH
            tap = depth // CO
            oh = row_h[:, None] + (tap // KERNEL_W * DILATION_H)[None, :]
            ow = row_w[:, None] + (tap % KERNEL_W * DILATION_W)[None, :]
            ok = row_ok[:, None] & depth_ok[None, :]
            if not INSIDE:
                ok = ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
            offsets = tl.multiple_of(row_h * stride_gh + row_w * stride_gw, ALIGN)
            taps = tl.multiple_of(
                tap // KERNEL_W * DILATION_H * stride_gh + tap % KERNEL_W * DILATION_W * stride_gw, ALIGN
            )
            a = tl.load((g_rows + offsets)[:, None] + (taps + depth % CO)[None, :], mask=ok, other=0.0)
        b = tl.load(w_columns[None, :] + depth[:, None],
                    mask=depth_ok[:, None] & (ci < CI)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]  # fmt: skip
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

    offsets = tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
    tl.store(gx_ptr + offsets[:, None] + (group * CI + ci)[None, :], accumulator.to(gx_ptr.dtype.element_ty),
             mask=row_ok[:, None] & (ci < CI)[None, :])  # fmt: skip


def _candidates(problem: Problem, arch: str) -> list[Config]:
    if arch.startswith("gfx"):
        return [Config(128, 64, 32, 4, 2), Config(64, 64, 32, 4, 2)]
    depth = 64 if problem.dtype.itemsize == 2 else 32
    depth = max(16, min(depth, triton.next_power_of_2(problem.depth)))
    wide = max(16, min(256, triton.next_power_of_2(problem.columns)))
    found = []
    passes = operands_in_registers(problem.dtype.itemsize, arch)
    if wide >= 256 and not passes:
        found.append(Config(128, 256, depth, 8, 3))
    if wide >= 128:
        found += [Config(128, 128, depth, 8, 4)] if passes < 2 else []
        found.append(Config(64, 128, depth, 4, 4))
    narrow = min(wide, 64)
    # With 128 rows ptxas spills a few words on sm_100.
    found += [Config(rows, narrow, depth, 4, 4) for rows in ((64,) if arch == "sm_100" else (128, 64))]
    if problem.columns * problem.rows // (found[0].block_m * found[0].block_n) < 264:
        found.sort(key=lambda config: config.block_m * config.block_n)
    return [fit_operands(config, problem.dtype.itemsize, arch) for config in found]


register_candidates("conv_transpose2d_grad_input", _candidates)


def _make(gy, w, out, stride, padding, dilation, groups) -> Plan:
    batch, channels_in, height, width = out.shape
    channels_out, kernel = w.shape[1], w.shape[2:]
    taps = kernel[0] * kernel[1]
    rows, columns = batch * height * width, channels_in // groups
    problem = Problem(
        "conv_transpose2d_grad_input",
        channels_in,
        channels_out * groups,
        taps,
        groups,
        gy.dtype,
        rows,
        rows,
        columns,
        taps * channels_out,
    )
    config = choose_config(problem, gy.device)
    fold = can_fold(channels_out, groups, dilation, gy)
    align = fold_alignment(channels_out, stride, padding, gy) if fold else pixel_alignment(gy)
    if align * gy.element_size() < 8:
        config = replace(config, num_warps=8)  # fewer of the many narrow loads to a thread
    scalars = (rows, height, width, *gy.shape[2:], *image_strides(gy), *image_strides(out))
    constants = {
        "CI": columns,
        "CO": channels_out,
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "PRECISION": dot_precision(gy.dtype),
        "FOLD": fold,
        "INSIDE": taps_inside((height, width), gy.shape[2:], kernel, stride, padding, dilation),
        "ALIGN": align,
        "ALIGN_X": pixel_alignment(out),
        "WIDE_INDEX": needs_wide_index(gy, out),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n), groups)
    return Plan(_conv_transpose2d_grad_input_kernel, grid, scalars, constants, config)


def conv_transpose2d_grad_input(gy, w, out, stride, padding, dilation, groups) -> None:
    """out = gradient of the transposed convolution's input.

    gy [N, CO, OH, OW] and out [N, CI, H, W]: any strides with a channel stride of 1. w [CI, CO/groups, KH,
    KW] dense in channels_last.
    """
    key = (
        "conv_transpose2d_grad_input",
        layout_key(gy, w, out),
        gy.device,
        stride,
        padding,
        dilation,
        groups,
        dot_precision(gy.dtype),
    )
    planned(key, lambda: _make(gy, w, out, stride, padding, dilation, groups))(gy, w, out)
