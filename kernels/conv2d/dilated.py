"""Convolutions over zones, in which no tap is computed for padding: large dilations, and ASPP's branches.

The implicit GEMM of `dense.py`, but rows are the pixels of one zone, over the whole batch, and the depth has
only the taps that meet the image there. One persistent launch serves several convolutions of one input: each
program walks its own part of a table of work. Flipped, with the filter's channels exchanged, it is the
gradient of the input of a convolution of stride 1.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from .._device import dot_precision, processors, shared_memory_limit
from .._epilogue import _activate, _affine
from .._launch import TRITON, Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._tf32 import _rounded, multiplies_in_tf32
from .._tiles import Problem, Tile, choose_tile, fit_registers, geometry_variant, register_candidates
from ._partials import finish_partials, workspace
from ._zones import FIELDS, Branch, executed_taps, pieces, work_table
from .dense import candidates

# Filters that one launch can be given.
MOST_BRANCHES = 5

# Whether what the epilogue needs stays in the loop over items. Triton 3.9 takes it out and then spills it;
# those before spill if it stays.
_STAYS = tl.constexpr(TRITON >= (3, 9))


@triton.jit
def _conv2d_dilated_kernel(
    x_ptr, w_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr,
    work_ptr, starts_ptr,
    N, OH, OW, negative_slope,
    stride_xn, stride_xh, stride_xw, stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    C: tl.constexpr, CO: tl.constexpr, BRANCHES: tl.constexpr, FLIP: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TF32: tl.constexpr,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr, WIDE_INDEX: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # C channels in, CO out of each branch. work [items, FIELDS], starts [programs + 1].
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    for item in tl.range(tl.load(starts_ptr + pid), tl.load(starts_ptr + pid + 1), disable_licm=_STAYS):
        fields = work_ptr + item * FIELDS
        branch = tl.load(fields)
        tile = tl.load(fields + 1)
        tile_n = tl.load(fields + 2)
        split = tl.load(fields + 3)
        zone_h = tl.load(fields + 6)
        rows_h = tl.load(fields + 7)
        zone_w = tl.load(fields + 8)
        rows_w = tl.load(fields + 9)
        first_h = tl.load(fields + 10)
        first_w = tl.load(fields + 11)
        taps_w = tl.load(fields + 12)
        kernel_h = tl.load(fields + 13)
        kernel_w = tl.load(fields + 14)
        pad_h = tl.load(fields + 15)
        pad_w = tl.load(fields + 16)
        dilation_h = tl.load(fields + 17)
        dilation_w = tl.load(fields + 18)

        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        c_ok = c < CO
        row_ok = m < N * rows_h * rows_w
        ow = zone_w + m % rows_w
        oh = zone_h + m // rows_w % rows_h
        n = m // rows_w // rows_h
        if WIDE_INDEX:
            n = n.to(tl.int64)
            oh = oh.to(tl.int64)
            ow = ow.to(tl.int64)
        ih = oh * STRIDE_H - pad_h
        iw = ow * STRIDE_W - pad_w
        x_rows = x_ptr + tl.multiple_of(n * stride_xn + ih * stride_xh + iw * stride_xw, ALIGN)
        taps = kernel_h * kernel_w
        weight = w_ptr
        if BRANCHES > 1:
            weight = tl.where(branch == 1, w1_ptr, weight)
        if BRANCHES > 2:
            weight = tl.where(branch == 2, w2_ptr, weight)
        if BRANCHES > 3:
            weight = tl.where(branch == 3, w3_ptr, weight)
        if BRANCHES > 4:
            weight = tl.where(branch == 4, w4_ptr, weight)

        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(tl.load(fields + 4), tl.load(fields + 5)):
            tap = step // BLOCKS
            tap_h = first_h + tap // taps_w
            tap_w = first_w + tap % taps_w
            channel = step % BLOCKS * BLOCK_K + k
            k_ok = channel < C
            # Pixels are ALIGN apart; the sum of two products of strides is not known to be a multiple.
            zero = tl.full((1,), 0, tl.int64)
            shift = (zero + tap_h * dilation_h) * stride_xh + (zero + tap_w * dilation_w) * stride_xw
            rows = x_rows + tl.multiple_of(shift, ALIGN)
            a = tl.load(rows[:, None] + channel[None, :],
                        mask=row_ok[:, None] & k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]  # fmt: skip
            if FLIP:
                # The filter is [C, taps, CO].
                filter_tap = taps - 1 - (tap_h * kernel_w + tap_w)
                b = tl.load(weight + (channel[:, None] * taps + filter_tap) * CO + c[None, :],
                            mask=k_ok[:, None] & c_ok[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]  # fmt: skip
            else:
                filter_tap = tap_h * kernel_w + tap_w
                b = tl.load(weight + (c[None, :] * taps + filter_tap) * C + channel[:, None],
                            mask=k_ok[:, None] & c_ok[None, :], other=0.0)  # fmt: skip
            accumulator = tl.dot(_rounded(a, TF32), _rounded(b, TF32), accumulator, input_precision=PRECISION)

        column = branch * CO + c
        ok = row_ok[:, None] & c_ok[None, :]
        if SPLIT > 1:
            # y is the workspace [SPLIT, N * OH * OW, BRANCHES * CO]; the epilogue comes with the sum.
            pixel = ((split * N + n) * OH + oh) * OW + ow
            tl.store(y_ptr + ((pixel * (BRANCHES * CO))[:, None] + column[None, :]), accumulator, mask=ok)
        else:
            y = _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, column, c_ok)
            if residual_ptr is not None:
                offsets = tl.multiple_of(n * stride_rn + oh * stride_rh + ow * stride_rw, ALIGN_Y)
                y += tl.load(residual_ptr + offsets[:, None] + column[None, :], mask=ok, other=0.0).to(
                    tl.float32
                )
            y = _activate(y, negative_slope, ACTIVATION)
            offsets = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN_Y)
            tl.store(y_ptr + offsets[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


register_candidates("parallel_conv2d_forward", candidates)


# Tables of work that captured graphs read: kept once, though their launches be dropped.
_IN_GRAPHS: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class Zoned:
    """A launch over zones: a function of (x, weights, bias, scale, shift, residual, out)."""

    __slots__ = ("activation", "launch", "slope", "split", "starts", "work")

    def __init__(
        self, launch: Launch, work: torch.Tensor, starts: torch.Tensor, split: int, activation, slope
    ):
        self.launch, self.work, self.starts, self.split = launch, work, starts, split
        self.activation, self.slope = activation, slope

    def __call__(self, x, weights, bias, scale, shift, residual, out) -> None:
        weights = (*weights, *(None,) * (MOST_BRANCHES - len(weights)))
        if self.work.is_cuda and torch.cuda.is_current_stream_capturing():
            _IN_GRAPHS[id(self.work)] = (self.work, self.starts)
        if self.split == 1:
            self.launch(x, *weights, bias, scale, shift, residual, out, self.work, self.starts)
            return
        partials = workspace(self.split, out)
        self.launch(x, *weights, None, None, None, None, partials, self.work, self.starts)
        finish_partials(partials, bias, scale, shift, residual, out, self.activation, self.slope)


def make_dilated(
    x, branches: Sequence[Branch], channels_out: int, residual, out, stride, tile: Tile, flip: bool,
    activation, slope,
) -> Zoned:  # fmt: skip
    """The launch of `branches` with `channels_out` outputs each, on tensors laid out like these."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run the model once on these sizes before capturing a CUDA graph of it")
    channels = x.shape[1]
    # fp32 parts are stored at twice the addresses of a 16-bit result.
    crowded = residual is not None or activation == "gelu" or x.element_size() == 4 or tile.split_k > 1
    if crowded:
        tile = fit_registers(tile, 64 if x.element_size() == 2 else 32)
    # As many programs as fit on the processors at a time.
    resident = max(1, min(2, shared_memory_limit(x.device) // tile.shared_memory(x.element_size())))
    blocks_k, tiles_n = triton.cdiv(channels, tile.block_k), triton.cdiv(channels_out, tile.block_n)
    programs = resident * processors(x.device)
    rows, starts = work_table(branches, x.shape[0], blocks_k, tiles_n, tile.block_m, tile.split_k, programs)
    scalars = (x.shape[0], *out.shape[2:], float(slope), *image_strides(x), *image_strides(residual),
               *image_strides(out))  # fmt: skip
    split = tile.split_k
    constants = {
        "C": channels,
        "CO": channels_out,
        "BRANCHES": len(branches),
        "FLIP": flip,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "ACTIVATION": activation if split == 1 else None,
        "PRECISION": dot_precision(x.dtype),
        "TF32": multiplies_in_tf32(x.dtype),
        "FIELDS": FIELDS,
        "ALIGN": pixel_alignment(x),
        "ALIGN_Y": pixel_alignment(out, residual),
        "WIDE_INDEX": needs_wide_index(x, residual, out) or split * out.numel() >= 2**31 - 2**24,
        "SPLIT": split,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    launch = Launch(_conv2d_dilated_kernel, (len(starts) - 1,), scalars, constants, tile)
    work, ends = (torch.tensor(t, dtype=torch.int32, device="cpu").to(x.device) for t in (rows, starts))
    return Zoned(launch, work, ends, split, activation, slope)


def branch_of(size, out_size, kernel, stride, padding, dilation) -> Branch:
    """The zones of one convolution from an image of `size` to one of `out_size`."""
    heights, widths = (
        pieces(*axis) for axis in zip(size, out_size, kernel, stride, padding, dilation, strict=True)
    )
    return Branch(heights, widths, tuple(kernel), tuple(padding), tuple(dilation))


def parallel_conv2d_forward(
    x, weights, scale, shift, out, dilations, activation, negative_slope
) -> Callable[..., None]:
    """out = cat([act(scale_i * conv(x, w_i) + shift_i)], 1), every convolution padded to keep the size.

    x [N, C, H, W] and out [N, sum of CO_i, H, W]: any strides with a channel stride of 1. w_i [CO_i, C, KH,
    KW] dense in channels_last, KH and KW odd. scale, shift [sum of CO_i] dense.

    Returns a function of (x, weights, scale, shift, out), of others laid out alike.
    """
    size = x.shape[2:]
    branches = []
    for weight, dilation in zip(weights, dilations, strict=True):
        kernel = tuple(weight.shape[2:])
        padding = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
        branches.append(branch_of(size, size, kernel, (1, 1), padding, dilation))
    launches = []
    first = start = 0
    while first < len(weights):
        last = first + 1
        while (
            last < min(len(weights), first + MOST_BRANCHES)
            and weights[last].shape[0] == weights[first].shape[0]
        ):
            last += 1
        end = start + sum([w.shape[0] for w in weights[first:last]])
        launches.append((first, last, start, end))
        first, start = last, end

    def launch(x, weights, scale, shift, out) -> None:
        for first, last, start, end in launches:
            k, t = (None if v is None else v[start:end] for v in (scale, shift))
            target = out[:, start:end] if len(launches) > 1 else out
            _run(x, weights[first:last], k, t, target, branches[first:last], activation, negative_slope)

    launch(x, weights, scale, shift, out)
    return launch


def _run(x, weights, scale, shift, out, branches, activation, slope) -> None:
    """One launch, of branches with as many outputs each."""
    channels_out = weights[0].shape[0]
    options = (tuple([b[2:] for b in branches]), activation, slope, dot_precision(x.dtype))
    key = ("parallel_conv2d", layout_key(x, scale, shift, out, *weights), x.device, options)

    def make() -> Zoned:
        largest = max(branches, key=lambda b: (b.kernel[0] * b.kernel[1], b.dilation))
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        useful = sum([executed_taps(b, x.shape[0], 1) for b in branches])
        problem = Problem(
            "parallel_conv2d_forward", x.shape[1], channels_out * len(branches),
            largest.kernel[0] * largest.kernel[1], 1, x.dtype, pixels,
            rows=pixels * len(branches), columns=channels_out,
            depth=max(1, useful // (pixels * len(branches))) * x.shape[1],
            variant=geometry_variant((1, 1), largest.dilation, largest.kernel) + "-fused",
        )  # fmt: skip
        tile = choose_tile(problem, x.device)
        return make_dilated(x, branches, channels_out, None, out, (1, 1), tile, False, activation, slope)

    launch_for(key, make)(x, weights, None, scale, shift, None, out)
