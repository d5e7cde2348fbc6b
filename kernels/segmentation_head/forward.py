"""Log-sum-exp of upsampled logits, and the cross-entropy of its labels, class block by class block."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._device import bounded
from .._launch import Launch, launch_for, layout_key, needs_wide_index
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._cells import (
    LN2,
    LOWEST,
    _between,
    _block_ends,
    _cell_of,
    _class_logits,
    _corners,
    _fraction,
    _row_stretch,
    cells,
    stretch,
)

VALUES_IN_REGISTERS = 32  # interpolated at a time by one thread


@triton.jit
def _upsample_softmax_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr,
    LANES, row_lanes, C, H, W, OH, OW, scale_h, scale_w, inverse_w, smoothing, ignore_index,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_tn, stride_th, stride_tw,
    KIND: tl.constexpr, KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr, PARTS: tl.constexpr,
    SLOTS: tl.constexpr, SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Without a target the log-sum-exp alone. A label that is neither a class nor ignored makes the loss NaN.
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_N)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
        c = c.to(tl.int64)
    lane = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    lane_ok = lane < LANES
    n, oh, cell, first, end = _row_stretch(lane, row_lanes, W, OH, OW, scale_w, inverse_w, KIND, PARTS, SLOTS)
    row = _cell_of(oh, H, scale_h, KIND)
    fraction_h = _fraction(oh, row, scale_h, KIND)
    ow = first[None, :] + tl.arange(0, SLOTS)[:, None]  # [SLOTS, BLOCK_M]
    ok = lane_ok[None, :] & (ow < end[None, :])
    fraction_w = _fraction(ow, cell[None, :], scale_w, KIND)
    corners = _corners(x_ptr + n * stride_xn, row, cell, H, W, stride_xh, stride_xw, KIND, KEEPS_H, KEEPS_W)

    # Online: the largest so far, and the sum of exponentials relative to it, all in powers of two.
    # A logit that is +inf or NaN makes the sum NaN, as in torch.
    largest = tl.full((SLOTS, BLOCK_M), LOWEST, tl.float32)
    total = tl.zeros((SLOTS, BLOCK_M), tl.float32)
    mean_left = tl.zeros((BLOCK_M,), tl.float32)
    mean_right = tl.zeros((BLOCK_M,), tl.float32)
    weights = tl.zeros((BLOCK_N,), tl.float32)
    for _ in tl.range(0, C, BLOCK_N):
        left, right = _block_ends(corners, c, C, stride_xc, fraction_h, lane_ok, KIND)
        z = _between(left, right, fraction_w, KIND)
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(z - new[None, :, :]), 0)
        largest = new
        if SMOOTHING:
            # The classes' weighted sum is linear in the corners: interpolated once, at the end.
            if weight_ptr is not None:
                w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            else:
                w = tl.where(c < C, 1.0, 0.0)
            mean_left += tl.sum(w[:, None] * left, 0)
            mean_right += tl.sum(w[:, None] * right, 0)
            weights += w
        c += BLOCK_N
    lse = (largest + tl.log2(total)) * LN2
    pixel = (n * OH + oh)[None, :] * OW + ow
    tl.store(lse_ptr + pixel, lse, mask=ok)

    if target_ptr is not None:
        labels = target_ptr + (n * stride_tn + oh * stride_th)[None, :] + ow * stride_tw
        label = tl.load(labels, mask=ok, other=0).to(tl.int64)
        counted = ok & (label != ignore_index)
        known = counted & (label >= 0) & (label < C)
        label = tl.where(known, label, 0)
        if not WIDE_INDEX:
            label = label.to(tl.int32)
        logit = _class_logits(corners, label * stride_xc, fraction_h, fraction_w, known, KIND)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + label, mask=known, other=0.0).to(tl.float32)
        else:
            weight = tl.where(known, 1.0, 0.0)
        loss = (1.0 - smoothing) * weight * (lse - logit)
        if SMOOTHING:
            mean = _between(mean_left[None, :], mean_right[None, :], fraction_w, KIND)
            mean = tl.sum(mean, 0) * LN2
            loss += smoothing / C * (tl.sum(weights, 0) * lse - mean)
        loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
        if PER_PIXEL:
            tl.store(loss_ptr + pixel, loss, mask=ok)
        else:
            both = tl.arange(0, 2)
            sums = tl.where(both == 0, tl.sum(tl.sum(loss, 0), 0), tl.sum(tl.sum(weight, 0), 0))
            tl.store(loss_ptr + pid * 2 + both, sums)


def pixel_candidates(problem: Problem, arch: str) -> list[Tile]:
    """Tiles of the kernels that give a thread a stretch of outputs: lanes x classes at a time."""
    # Blocks that leave few classes empty: 19 and 21 are five and six blocks of four.
    few = 4 if problem.channels_in < 64 and problem.channels_in % 8 else 8
    found = [Tile(128, few, 1, 4, 1), Tile(256, few, 1, 8, 1), Tile(64, few, 1, 2, 1)]
    return [*found, Tile(128, 12 - few, 1, 4, 1), Tile(128, 2, 1, 4, 1)]


register_candidates("upsample_softmax_forward", pixel_candidates)


def pixel_tile(operation: str, x: torch.Tensor, out_size: tuple[int, int], slots: int) -> Tile:
    """The tile of `operation`, with no more classes than there are, or than registers hold."""
    channels, pixels = x.shape[1], x.shape[0] * out_size[0] * out_size[1]
    problem = Problem(operation, channels, channels, 1, 1, x.dtype, pixels, pixels, channels, channels)
    tile = choose_tile(problem, x.device)
    most = min(tile.block_n, VALUES_IN_REGISTERS // slots, triton.next_power_of_2(channels))
    return replace(tile, block_n=max(1, most))


def lanes_of(x: torch.Tensor, out_size: tuple[int, int], kind: str, most: int) -> tuple[int, int, int]:
    """(stretches of a cell, outputs of a stretch, lanes of an output row).

    No stretches where an output has a lane of its own: without neighbors in its cell, and for "nearest".
    """
    if kind == "nearest" or most == 1:
        return 0, 1, out_size[1]
    parts, slots = stretch(most)
    return parts, slots, (x.shape[3] + 1) * parts


def upsample_softmax_forward(x, target, weight, losses, lse, mode, align_corners, scales, ignore_index,
                             smoothing) -> torch.Tensor | None:  # fmt: skip
    """lse = logsumexp over the classes of the upsampled x [N, C, H, W], fp32 [N, OH, OW], dense.

    With `target` [N, OH, OW] of class indices, also the cross-entropy: into `losses`, fp32 [N, OH, OW] and
    dense, or, where that is None, returned as fp32 [programs, 2], whose sum over the programs is the loss and
    the weight of all pixels. `weight` [C] dense. x and target: any strides.
    """
    out_size = tuple(lse.shape[1:])
    per_pixel = losses is not None
    pointers = (x, target, weight, losses, lse)
    key = ("upsample_softmax_forward", x.device, layout_key(*pointers), mode, align_corners, scales,
           ignore_index, smoothing)  # fmt: skip

    def make() -> Launch:
        resampling = cells(tuple(x.shape[2:]), out_size, mode, align_corners, scales)
        parts, slots, row_lanes = lanes_of(x, out_size, resampling.kind, resampling.most[1])
        tile = pixel_tile("upsample_softmax_forward", x, out_size, slots)
        lanes = x.shape[0] * out_size[0] * row_lanes
        scalars = (lanes, row_lanes, *x.shape[1:], *out_size, *resampling.scales, resampling.inverses[1],
                   float(smoothing), ignore_index, *x.stride(),
                   *((0, 0, 0) if target is None else target.stride()))  # fmt: skip
        constants = {
            "KIND": resampling.kind,
            "KEEPS_H": resampling.keeps[0],
            "KEEPS_W": resampling.keeps[1],
            "PARTS": parts,
            "SLOTS": slots,
            "SMOOTHING": smoothing != 0,
            "PER_PIXEL": per_pixel,
            "WIDE_INDEX": needs_wide_index(x, target, lse),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(lanes, tile.block_m),)
        launch = Launch(_upsample_softmax_forward_kernel, grid, scalars, constants, tile)
        return bounded(launch, x.device)

    launch = launch_for(key, make)
    if target is not None and not per_pixel:
        losses = torch.empty((launch.grid[0], 2), dtype=torch.float32, device=x.device)
    launch(x, target, weight, losses, lse)
    return losses
