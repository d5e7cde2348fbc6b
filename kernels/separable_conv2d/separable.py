"""Separable convolution: a 1x1 convolution of a depthwise one, y = W act(dw(x)), each with its own epilogue.

Fused: a program computes the depthwise results of BLOCK_M pixels, BLOCK_K channels at a time, and multiplies
them into BLOCK_N outputs: they never reach memory. The product is formed transposed, [BLOCK_N, BLOCK_M]: as
the second operand the depthwise tile goes through shared memory once, after its last tap; as the first, every
tap's sum would be brought into the matrix unit's layout. Each column of programs computes the depthwise part
again, so with many outputs, or many taps, two kernels with the result between them do less work.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .._device import architecture, bounded, dot_precision
from .._epilogue import _activate, _affine
from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tf32 import _rounded, multiplies_in_tf32
from .._tiles import Problem, Tile, choose_tile, geometry_variant, operands_in_registers, register_candidates
from ..conv2d.dense import candidates, make_dense
from ._shared import Geometry, _widen, tap_alignment, widens_by_ptx
from .depthwise import depthwise_conv2d_forward


@triton.jit
def _separable_conv2d_fused_kernel(
    x_ptr, wd_ptr, depthwise_bias_ptr, depthwise_scale_ptr, depthwise_shift_ptr,
    w_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr,
    M, H, W, OH, OW, reciprocal_h, reciprocal_w, negative_slope,
    stride_xn, stride_xh, stride_xw, stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    stride_kh, stride_kw,
    C: tl.constexpr, CO: tl.constexpr, MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    TF32: tl.constexpr, PTX: tl.constexpr, UNROLL: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, ALIGN_W: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # C counts the channels between the two convolutions. Outputs are the fastest program index: programs that
    # run together read the same pixels, through L2.
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    m = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok = m < M
    c_ok = c < CO
    n, oh, ow = _pixel(m, OH, OW, reciprocal_h, reciprocal_w)
    ih = oh * STRIDE_H - PAD_H
    iw = ow * STRIDE_W - PAD_W
    x_pixels = x_ptr + tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN_X)
    w_rows = w_ptr + c[:, None] * C
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Not pipelined: cp.async would fetch each tap past L1, where it is a hit eight times of nine.
    for start in tl.range(0, C, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < C
        between = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        # UNROLL = KERNEL_H: every tap's loads are on their way at once, where the registers hold them.
        for kh in tl.range(0, KERNEL_H, num_stages=1, loop_unroll_factor=UNROLL):
            row = ih + kh * DILATION_H
            row_ok = m_ok & (row >= 0) & (row < H)
            x_row = x_pixels + tl.multiple_of(tl.full((), DILATION_H, tl.int64) * kh * stride_xh, ALIGN_X)
            wd_row = wd_ptr + tl.multiple_of(kh * stride_kh, ALIGN_W) + k
            for kw in tl.static_range(KERNEL_W):
                column = iw + kw * DILATION_W
                ok = row_ok & (column >= 0) & (column < W)
                # Where a stride is 1, the product of constants is one: not what `multiple_of` takes.
                across = tl.full((), kw * DILATION_W, tl.int64) * stride_xw
                tap = tl.full((), kw, tl.int32) * stride_kw
                x = tl.load((x_row + tl.multiple_of(across, ALIGN_X))[:, None]
                            + (k // MULTIPLIER)[None, :],
                            mask=ok[:, None] & k_ok[None, :], other=0.0)  # fmt: skip
                wd = tl.load(wd_row + tl.multiple_of(tap, ALIGN_W), mask=k_ok, other=0.0)
                between += _widen(x, PTX) * wd.to(tl.float32)[None, :]
        between = _affine(between, depthwise_bias_ptr, depthwise_scale_ptr, depthwise_shift_ptr, k, k_ok)
        between = _activate(between, negative_slope, DEPTHWISE_ACTIVATION)
        w = tl.load(w_rows + k[None, :], mask=c_ok[:, None] & k_ok[None, :], other=0.0)
        between = tl.trans(_rounded(between.to(x_ptr.dtype.element_ty), TF32))
        accumulator = tl.dot(_rounded(w, TF32), between, accumulator, input_precision=PRECISION)

    y = _affine(tl.trans(accumulator), bias_ptr, scale_ptr, shift_ptr, c, c_ok)
    ok = m_ok[:, None] & c_ok[None, :]
    if residual_ptr is not None:
        offsets = tl.multiple_of(n * stride_rn + oh * stride_rh + ow * stride_rw, ALIGN_Y)
        y += tl.load(residual_ptr + offsets[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    y = _activate(y, negative_slope, ACTIVATION)
    offsets = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN_Y)
    tl.store(y_ptr + offsets[:, None] + c[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    passes = operands_in_registers(problem.dtype.itemsize, arch)
    depth = 64 if problem.dtype.itemsize == 2 and not passes and not arch.startswith("gfx") else 32
    # wgmma's rows are the outputs here: at least 64 of them.
    outputs = max(64, min(256, triton.next_power_of_2(problem.channels_out)))
    if arch.startswith("gfx") or passes:
        outputs = min(outputs, 128)
    elif outputs == 256 and depth == 64:
        depth = 32  # the pixels of all taps beside so many products
    fused = [
        Tile(64, outputs, depth, 8 if outputs >= 128 or passes else 4, 1, form="fused"),
        Tile(128, min(outputs, 128), min(depth, 32), 8, 1, form="fused"),
        Tile(32, outputs, depth, 4, 1, form="fused"),
    ]
    fused = [_fit_pixels(tile, 64 if passes < 2 else 32) for tile in fused]
    # Its tiles are those of the two kernels.
    both = Tile(0, 0, 0, 1, 1, form="two kernels")
    first = problem.channels_out <= outputs and problem.taps <= 9
    return [*fused, both] if first else [both, *fused]


def _fit_pixels(tile: Tile, accumulators: int) -> Tile:
    """`tile` with fewer pixels, until a thread holds at most so many products."""
    while tile.block_m * tile.block_n > accumulators * 32 * tile.num_warps and tile.block_m > 16:
        tile = Tile(tile.block_m // 2, *list(vars(tile).values())[1:])
    return tile


register_candidates("separable_conv2d_forward", _candidates, uses=("conv2d",))
register_candidates("pointwise_conv2d_forward", candidates, uses=("conv2d",))


def _problem(operation: str, x, channels: int, out, taps: int, variant: str) -> Problem:
    batch, _, height, width = x.shape
    rows = batch * out.shape[2] * out.shape[3]
    return Problem(
        operation, x.shape[1], out.shape[1], taps, 1, x.dtype, batch * height * width,
        rows=rows, columns=out.shape[1], depth=channels, variant=variant,
    )  # fmt: skip


def _unrolls(tile: Tile, taps: int, itemsize: int, arch: str) -> bool:
    """True if the registers hold the pixels of all taps beside the products."""
    if itemsize != 2 or not (arch == "sm_90" or arch.startswith("sm_10")):
        return False
    registers = tile.block_m * (taps * tile.block_k // 2 + tile.block_n) // (32 * tile.num_warps)
    return registers <= 104  # of 255, which the addresses and filters share


def _fused_launch(x, wd, residual, out, geometry, activations, negative_slope, tile) -> Launch:
    batch, channels_out, out_h, out_w = out.shape
    pixels = batch * out_h * out_w
    taps = geometry.kernel[0] * geometry.kernel[1]
    unrolls = _unrolls(tile, taps, x.element_size(), architecture(x.device))
    scalars = (pixels, *x.shape[2:], out_h, out_w, reciprocal(out_h), reciprocal(out_w),
               float(negative_slope), *image_strides(x), *image_strides(residual), *image_strides(out),
               *wd.stride()[2:])  # fmt: skip
    constants = geometry.constants() | {
        "C": wd.shape[0],
        "CO": channels_out,
        "MULTIPLIER": geometry.multiplier,
        "DEPTHWISE_ACTIVATION": activations[0],
        "ACTIVATION": activations[1],
        "PRECISION": dot_precision(x.dtype),
        "TF32": multiplies_in_tf32(x.dtype),
        "PTX": widens_by_ptx(x),
        "UNROLL": geometry.kernel[0] if unrolls else 1,
        "ALIGN_X": pixel_alignment(x),
        "ALIGN_Y": pixel_alignment(out, residual),
        "ALIGN_W": tap_alignment(wd),
        "WIDE_INDEX": needs_wide_index(x, residual, out),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    grid = (triton.cdiv(pixels, tile.block_m) * triton.cdiv(channels_out, tile.block_n),)
    launch = Launch(_separable_conv2d_fused_kernel, grid, scalars, constants, tile)
    # mma.sync takes its operands from registers, of which ptxas would rather spill some than use all.
    tight = operands_in_registers(x.element_size(), architecture(x.device))
    return bounded(launch, x.device, 255) if tight else launch


def separable_conv2d_forward(
    x, wd, depthwise_bias, depthwise_scale, depthwise_shift, w, bias, scale, shift, residual, out,
    stride, padding, dilation, depthwise_activation, activation, negative_slope,
) -> Callable[..., None]:  # fmt: skip
    """out = act(scale * (w between + bias) + shift + residual), between the depthwise result, never kept.

    x [N, C, H, W], residual and out [N, CO, OH, OW]: any strides with a channel stride of 1. wd
    [C * M, 1, KH, KW] with a stride of 1 along its first dimension, w [CO, C * M, 1, 1] dense, vectors
    contiguous.

    Returns a function of the eleven tensors, of others laid out alike.
    """
    tensors = (x, wd, depthwise_bias, depthwise_scale, depthwise_shift, w, bias, scale, shift, residual, out)
    geometry = Geometry(tuple(wd.shape[2:]), stride, padding, dilation, wd.shape[0] // x.shape[1])
    taps = geometry.kernel[0] * geometry.kernel[1]
    problem = _problem(
        "separable_conv2d_forward",
        x,
        wd.shape[0],
        out,
        taps,
        geometry_variant(stride, dilation, geometry.kernel),
    )
    tile = choose_tile(problem, x.device)
    if tile.form == "two kernels":
        options = (stride, padding, dilation, depthwise_activation, activation, negative_slope)
        return _two_kernels(*tensors, *options)
    activations = (depthwise_activation, activation)
    options = (stride, padding, dilation, activations, negative_slope, dot_precision(x.dtype), tile)
    launch = launch_for(
        ("separable_conv2d_forward", layout_key(*tensors), x.device, options),
        lambda: _fused_launch(x, wd, residual, out, geometry, activations, negative_slope, tile),
    )
    launch(*tensors)
    return launch


def _two_kernels(
    x, wd, depthwise_bias, depthwise_scale, depthwise_shift, w, bias, scale, shift, residual, out,
    stride, padding, dilation, depthwise_activation, activation, negative_slope,
) -> Callable[..., None]:  # fmt: skip
    shape, dtype, device = (x.shape[0], wd.shape[0], *out.shape[2:]), x.dtype, x.device

    def empty() -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)

    between = empty()
    first = depthwise_conv2d_forward(
        x, wd, depthwise_bias, depthwise_scale, depthwise_shift, between, None, stride, padding, dilation,
        depthwise_activation, negative_slope,
    )  # fmt: skip
    second = pointwise_conv2d_forward(
        between, w, bias, scale, shift, residual, out, activation, negative_slope
    )
    assert first is not None  # no statistics were asked for

    def launch(*tensors: torch.Tensor | None) -> None:
        between = empty()
        first(*tensors[:5], between)
        second(between, *tensors[5:])

    return launch


def pointwise_conv2d_forward(
    x, w, bias, scale, shift, residual, out, activation, negative_slope
) -> Callable[..., None]:
    """out = act(scale * (w x + bias) + shift + residual): the second of the two kernels, alone for the tuner.

    Operands as in `separable_conv2d_forward`, x [N, C, OH, OW]. Returns a function of them, of others laid
    out alike.
    """
    operands = (x, w, bias, scale, shift, residual, out)
    key = ("pointwise_conv2d_forward", layout_key(*operands), x.device, activation, negative_slope,
           dot_precision(x.dtype))  # fmt: skip

    def make() -> Callable[..., None]:
        problem = _problem("pointwise_conv2d_forward", x, x.shape[1], out, 1, "-fused")
        tile = choose_tile(problem, x.device)
        one, zero = (1, 1), (0, 0)
        dense = make_dense([x], w, residual, out, one, zero, one, 1, tile, activation, negative_slope)
        return lambda x, *rest: dense((x,), *rest)

    launch = launch_for(key, make)
    launch(*operands)
    return launch
