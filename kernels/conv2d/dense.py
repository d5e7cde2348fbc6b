"""Convolution as an implicit GEMM: rows are output pixels, columns output channels, depth (tap, channel).

y[n, c, oh, ow] = act(scale (sum over taps and k of x[n, k, ih, iw] w[c, k, kh, kw] + bias) + shift + r),
ih = stride oh - pad + dilation kh. The depth has the weight's own order in memory, so that few channels
(RGB, 21 classes) fill its tiles without padding. Up to four images may be the input, as if concatenated: each
step of the loop reads one of them. Few pixels leave processors idle: then the depth is cut into SPLIT parts,
whose fp32 sums go to a workspace and are added in a fixed order.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._device import architecture, bounded, dot_precision
from .._epilogue import _activate, _affine
from .._fold import can_fold, fold_alignment, taps_inside
from .._launch import Launch, image_strides, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tf32 import _rounded, multiplies_in_tf32
from .._tiles import Problem, Tile, fit_operands, fit_registers, operands_in_registers, register_candidates
from ._partials import finish_partials, workspace


@triton.jit
def _conv2d_dense_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, w_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr,
    M, H, W, OH, OW, reciprocal_h, reciprocal_w, negative_slope,
    stride_xn, stride_xh, stride_xw, stride_1n, stride_1h, stride_1w, stride_2n, stride_2h, stride_2w,
    stride_3n, stride_3h, stride_3w, stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    stride_wo,
    CI: tl.constexpr, CI1: tl.constexpr, CI2: tl.constexpr, CI3: tl.constexpr, CO: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TF32: tl.constexpr,
    FOLD: tl.constexpr, INSIDE: tl.constexpr, FLIP: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_Y: tl.constexpr, WIDE_INDEX: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # CI and CO are the channels of one group, CI1 to CI3 those of the further images; M = N * OH * OW.
    # INSIDE: no tap of any pixel leaves the image. FLIP: the filter of a convolution whose gradient this is.
    pid = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    m = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < CO
    n, oh, ow = _pixel(m, OH, OW, reciprocal_h, reciprocal_w)
    row_ok = m < M
    row_h = oh * STRIDE_H - PAD_H
    row_w = ow * STRIDE_W - PAD_W

    # Depth whose addresses follow each other: a tap's channels of an image, and with FOLD, where pixels lie
    # side by side, those of a row of taps, as if the kernel had width 1 and KERNEL_W times the channels.
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    CHANNELS: tl.constexpr = CI + CI1 + CI2 + CI3
    RUN: tl.constexpr = KERNEL_W * CI if FOLD else CHANNELS
    TAPS_W: tl.constexpr = 1 if FOLD else KERNEL_W
    # A run a step, where little of its last tile stays empty; else tiles of depth run on over taps.
    LITTLE: tl.constexpr = -CI % BLOCK_K * 8 <= CI
    ONE_RUN: tl.constexpr = FOLD or LITTLE or CI1 > 0 or TAPS == 1
    BLOCKS0: tl.constexpr = ((RUN if FOLD else CI) + BLOCK_K - 1) // BLOCK_K
    BLOCKS1: tl.constexpr = BLOCKS0 + (CI1 + BLOCK_K - 1) // BLOCK_K
    BLOCKS2: tl.constexpr = BLOCKS1 + (CI2 + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = BLOCKS2 + (CI3 + BLOCK_K - 1) // BLOCK_K
    DEPTH: tl.constexpr = TAPS * CHANNELS
    STEPS: tl.constexpr = KERNEL_H * TAPS_W * BLOCKS if ONE_RUN else (DEPTH + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    # Not through `group` where there is one: its product with an odd CI would hide the alignment.
    x_rows = x_ptr + tl.multiple_of(n * stride_xn, ALIGN) + (0 if FOLD or GROUPS == 1 else group * CI)
    if FLIP:
        w_columns = w_ptr + c
        if GROUPS > 1:
            w_columns += group.to(tl.int64) * (CI * TAPS * CO)
    else:
        w_columns = w_ptr + tl.multiple_of(c * stride_wo, ALIGN_W)
        if GROUPS > 1:
            w_columns += group.to(tl.int64) * CO * stride_wo
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(split * STEPS // SPLIT, (split + 1) * STEPS // SPLIT):
        if ONE_RUN:
            # One tap, or one row of them, a step: the address is a pixel's, the channels follow.
            tap = step // BLOCKS
            block = step % BLOCKS
            ih = row_h + tap // TAPS_W * DILATION_H
            iw = row_w + tap % TAPS_W * DILATION_W
            if CI1 == 0:
                channel = block * BLOCK_K + k
                depth = tap * RUN + channel
                depth_ok = channel < RUN
                rows = x_rows + tl.multiple_of(ih * stride_xh + iw * stride_xw, ALIGN)
            else:
                second, third, fourth = block >= BLOCKS0, block >= BLOCKS1, block >= BLOCKS2
                source, first, start, end = x_ptr, 0, 0, CI
                stride_n, stride_h, stride_w = stride_xn, stride_xh, stride_xw
                source = tl.where(second, x1_ptr, source)
                stride_n = tl.where(second, stride_1n, stride_n)
                stride_h = tl.where(second, stride_1h, stride_h)
                stride_w = tl.where(second, stride_1w, stride_w)
                first = tl.where(second, BLOCKS0, first)
                start = tl.where(second, CI, start)
                end = tl.where(second, CI1, end)
                if CI2 > 0:
                    source = tl.where(third, x2_ptr, source)
                    stride_n = tl.where(third, stride_2n, stride_n)
                    stride_h = tl.where(third, stride_2h, stride_h)
                    stride_w = tl.where(third, stride_2w, stride_w)
                    first = tl.where(third, BLOCKS1, first)
                    start = tl.where(third, CI + CI1, start)
                    end = tl.where(third, CI2, end)
                if CI3 > 0:
                    source = tl.where(fourth, x3_ptr, source)
                    stride_n = tl.where(fourth, stride_3n, stride_n)
                    stride_h = tl.where(fourth, stride_3h, stride_h)
                    stride_w = tl.where(fourth, stride_3w, stride_w)
                    first = tl.where(fourth, BLOCKS2, first)
                    start = tl.where(fourth, CI + CI1 + CI2, start)
                    end = tl.where(fourth, CI3, end)
                channel = (block - first) * BLOCK_K + k
                depth = tl.multiple_of(tap * CHANNELS + start, ALIGN_W) + channel
                depth_ok = channel < end
                rows = source + tl.multiple_of(n * stride_n + ih * stride_h + iw * stride_w, ALIGN)
            ok = row_ok if INSIDE else row_ok & (ih >= 0) & (ih < H)
            if FOLD:
                position = tl.multiple_of(row_w * CI, ALIGN)[:, None] + channel[None, :]
                # Not a product with the width alone: of images one pixel wide that is a constant.
                end_of_row = tl.multiple_of(tl.full((), CI, tl.int32) * W, ALIGN)
                ok = ok[:, None] & (position >= 0) & (position < end_of_row) & depth_ok[None, :]
            elif INSIDE:
                ok = ok[:, None] & depth_ok[None, :]
            else:
                ok = (ok & (iw >= 0) & (iw < W))[:, None] & depth_ok[None, :]
            a = tl.load(rows[:, None] + channel[None, :], mask=ok, other=0.0)  # [BLOCK_M, BLOCK_K]
        else:
            depth = step * BLOCK_K + k
            depth_ok = depth < DEPTH
            tap = depth // CI
            if WIDE_INDEX:
                tap = tap.to(tl.int64)
            ih = row_h[:, None] + (tap // KERNEL_W * DILATION_H)[None, :]
            iw = row_w[:, None] + (tap % KERNEL_W * DILATION_W)[None, :]
            ok = row_ok[:, None] & depth_ok[None, :]
            if not INSIDE:
                ok = ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            offsets = tl.multiple_of(row_h * stride_xh + row_w * stride_xw, ALIGN)
            taps = tl.multiple_of(
                tap // KERNEL_W * DILATION_H * stride_xh + tap % KERNEL_W * DILATION_W * stride_xw, ALIGN
            )
            a = tl.load((x_rows + offsets)[:, None] + (taps + depth % CI)[None, :], mask=ok, other=0.0)
        if FLIP:
            # The filter is [CI, TAPS, CO] and turned by 180 degrees.
            depth = (depth % CHANNELS * TAPS + TAPS - 1 - depth // CHANNELS) * CO
        b = tl.load(w_columns[None, :] + depth[:, None],
                    mask=depth_ok[:, None] & c_ok[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]  # fmt: skip
        accumulator = tl.dot(_rounded(a, TF32), _rounded(b, TF32), accumulator, input_precision=PRECISION)

    channel = group * CO + c if GROUPS > 1 else c
    ok = row_ok[:, None] & c_ok[None, :]
    if SPLIT > 1:
        # y is the workspace [SPLIT, M, GROUPS * CO]; the epilogue comes with the sum.
        part = (split.to(tl.int64) * M + m) * (GROUPS * CO)
        tl.store((y_ptr + part)[:, None] + channel[None, :], accumulator, mask=ok)
    else:
        y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, channel, c_ok)
        if residual_ptr is not None:
            offsets = tl.multiple_of(n * stride_rn + oh * stride_rh + ow * stride_rw, ALIGN_Y)
            y += tl.load(residual_ptr + offsets[:, None] + channel[None, :], mask=ok, other=0.0).to(
                tl.float32
            )
        y = _activate(y, negative_slope, ACTIVATION)
        offsets = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN_Y)
        tl.store(y_ptr + offsets[:, None] + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def tiles(problem: Problem, arch: str) -> list[Tile]:
    """The tiles of an implicit GEMM, widest first."""
    if arch.startswith("gfx"):
        return [Tile(128, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)]
    depth = 64 if problem.dtype.itemsize == 2 else 32
    depth = max(16, min(depth, triton.next_power_of_2(problem.depth)))
    wide = max(16, min(256, triton.next_power_of_2(problem.columns)))
    found = []
    passes = operands_in_registers(problem.dtype.itemsize, arch)
    # sm_100 moves its products through registers, where 256 columns leave no room for scale and shift.
    room = not (arch.startswith("sm_10") and problem.variant.endswith("-fused"))
    if wide >= 256 and not passes and room:
        found += [Tile(128, 256, depth, 8, 3), Tile(64, 256, depth, 8, 3)]
    if wide >= 128:
        found += [Tile(128, 128, depth, 8, 4)] if passes < 2 else []
        found.append(Tile(64, 128, depth, 4, 4))
    narrow = min(wide, 64)
    # With 128 rows ptxas spills a few words on sm_100.
    found += [Tile(rows, narrow, depth, 4, 4) for rows in ((64,) if arch == "sm_100" else (128, 64))]
    return [fit_operands(tile, problem.dtype.itemsize, arch) for tile in found]


def estimate(tile: Tile, problem: Problem) -> float:
    """Clocks that `problem` takes with `tile`, roughly: how candidates are ordered before any is measured.

    A model after an H200's data sheet, not a measurement, and for other GPUs no more than an order. Per
    processor and clock it multiplies 2048 pairs of 16 bits, and L2 hands out 64 bytes, or fewer where all
    132 processors ask. A program reads both its tiles for every step; a launch is as long as its fullest
    processor.
    """
    programs = triton.cdiv(problem.rows, tile.block_m) * triton.cdiv(problem.columns, tile.block_n)
    programs *= problem.groups * tile.split_k
    steps = triton.cdiv(problem.depth, tile.block_k) / tile.split_k
    itemsize = problem.dtype.itemsize
    multiply = tile.block_m * tile.block_n * tile.block_k * (itemsize // 2) / 2048
    l2 = min(64.0, 3760 / min(programs, 132))
    step = max(multiply, (tile.block_m + tile.block_n) * tile.block_k * itemsize / l2, 200)
    # Work dealt out from a table fills processors evenly.
    table = problem.operation.startswith("parallel")
    rounds = max(1.0, programs / 132) if table else triton.cdiv(programs, 132)
    clocks = rounds * (steps * step + 1200)
    if tile.split_k > 1:
        # Another launch, which reads the parts that this one wrote.
        clocks += 2500 + 8 * tile.split_k * problem.rows * problem.columns * problem.groups / 3760
    return clocks


def candidates(problem: Problem, arch: str) -> list[Tile]:
    """Tiles, the depth whole or cut into parts of eight steps or more, the most promising first."""
    found = []
    for tile in tiles(problem, arch):
        most = max(1, problem.depth // (8 * tile.block_k))
        found += [replace(tile, split_k=split) for split in (1, 2, 3, 4, 6, 8) if split <= most]
    return sorted(found, key=lambda tile: estimate(tile, problem))[:8]


register_candidates("conv2d_forward", candidates)


class Dense:
    """A launch, ready to be called with its pointers: (images, w, bias, scale, shift, residual, out)."""

    __slots__ = ("activation", "launch", "slope", "split")

    def __init__(self, launch: Launch, split: int, activation: str | None, slope: float):
        self.launch, self.split, self.activation, self.slope = launch, split, activation, slope

    def __call__(self, images, w, bias, scale, shift, residual, out) -> None:
        images = (*images, *(None,) * (4 - len(images)))
        if self.split == 1:
            self.launch(*images, w, bias, scale, shift, residual, out)
            return
        partials = workspace(self.split, out)
        self.launch(*images, w, None, None, None, None, partials)
        finish_partials(partials, bias, scale, shift, residual, out, self.activation, self.slope)


def make_dense(
    images: Sequence[torch.Tensor], w, residual, out, stride, padding, dilation, groups: int, tile: Tile,
    activation, slope, flip: bool = False,
) -> Dense:  # fmt: skip
    """The launch on tensors laid out like these; `flip` for the gradient of a convolution with filter `w`."""
    x, further = images[0], (*images[1:], None, None, None)[:3]
    batch, channels_out, out_h, out_w = out.shape
    size, kernel = x.shape[2:], tuple(w.shape[2:])
    rows, columns = batch * out_h * out_w, channels_out // groups
    channels = x.shape[1] // groups
    fold = len(images) == 1 and not flip and can_fold(channels, groups, dilation, x)
    align = fold_alignment(channels, stride, padding, x) if fold else pixel_alignment(*images)
    arch = architecture(x.device)
    tight = operands_in_registers(x.element_size(), arch)
    if align * x.element_size() < 8:
        # Fewer of the many narrow loads to a thread.
        tile = fit_registers(replace(tile, num_warps=8), 16 if tight == 2 else 64)
    if tight and kernel != (1, 1) and -channels % tile.block_k * 8 > channels:
        tile = fit_registers(tile, 16)  # beside the taps of every column of a step
    if residual is not None or activation == "gelu":
        tile = fit_registers(tile, 64 if x.element_size() == 2 else 32)
    split = tile.split_k
    strides = [s for t in (x, *further) for s in image_strides(t)]
    scalars = (rows, *size, out_h, out_w, reciprocal(out_h), reciprocal(out_w), float(slope), *strides,
               *image_strides(residual), *image_strides(out), w.stride(0))  # fmt: skip
    constants = {
        "CI": channels,
        **{f"CI{i}": 0 if t is None else t.shape[1] for i, t in enumerate(further, 1)},
        "CO": columns,
        "GROUPS": groups,
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "ACTIVATION": activation if split == 1 else None,
        "PRECISION": dot_precision(x.dtype),
        "TF32": multiplies_in_tf32(x.dtype),
        "FOLD": fold,
        "FLIP": flip,
        "INSIDE": taps_inside((out_h, out_w), size, kernel, stride, padding, dilation),
        "ALIGN": align,
        "ALIGN_W": math.gcd(16, w.stride(0), *[t.shape[1] for t in images if len(images) > 1]),
        "ALIGN_Y": pixel_alignment(out, residual),
        "WIDE_INDEX": needs_wide_index(*images, residual, out),
        "SPLIT": split,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    launch = Launch(_conv2d_dense_kernel, (tiles, groups, split), scalars, constants, tile)
    # ptxas would rather spill some of a thread's registers than use all: on sm_100 of several images only and
    # not with a residual, where it is the bound that makes it spill.
    several = len(images) > 1 and residual is None and arch.startswith("sm_10")
    if tight or several:
        launch = bounded(launch, x.device, 255)
    return Dense(launch, split, activation, slope)
