"""Per-class sums over all pixels for the soft dice loss, and the per-pixel mean its gradient needs."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._device import bounded
from .._launch import Launch, launch_for, layout_key, needs_wide_index
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._cells import (
    LOG2E,
    _between,
    _block_ends,
    _cell_of,
    _class_logits,
    _corners,
    _fraction,
    _row_stretch,
    cells,
)
from .forward import VALUES_IN_REGISTERS, lanes_of, pixel_candidates, pixel_tile

PROGRAMS = 2048  # several waves of them on the largest GPU


@triton.jit
def _upsample_dice_sums_kernel(
    x_ptr, target_ptr, lse_ptr, sums_ptr,
    LANES, row_lanes, steps, C, H, W, OH, OW, scale_h, scale_w, inverse_w, ignore_index,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_tn, stride_th, stride_tw,
    KIND: tl.constexpr, KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr, PARTS: tl.constexpr,
    SLOTS: tl.constexpr, WIDE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A program sums one block of classes over `steps` tiles of lanes; blocks of the same tiles run together.
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_N)
    chunk = pid // blocks
    c = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE_INDEX:
        chunk = chunk.to(tl.int64)
        c = c.to(tl.int64)
    hits = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    probabilities = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    counts = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, steps):
        lane = (chunk * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        lane_ok = lane < LANES
        n, oh, cell, first, end = _row_stretch(
            lane, row_lanes, W, OH, OW, scale_w, inverse_w, KIND, PARTS, SLOTS
        )
        row = _cell_of(oh, H, scale_h, KIND)
        fraction_h = _fraction(oh, row, scale_h, KIND)
        ow = first[None, :] + tl.arange(0, SLOTS)[:, None]  # [SLOTS, BLOCK_M]
        ok = lane_ok[None, :] & (ow < end[None, :])
        fraction_w = _fraction(ow, cell[None, :], scale_w, KIND)
        corners = _corners(
            x_ptr + n * stride_xn, row, cell, H, W, stride_xh, stride_xw, KIND, KEEPS_H, KEEPS_W
        )
        lse = tl.load(lse_ptr + (n * OH + oh)[None, :] * OW + ow, mask=ok, other=0.0) * LOG2E
        labels = target_ptr + (n * stride_tn + oh * stride_th)[None, :] + ow * stride_tw
        label = tl.load(labels, mask=ok, other=0).to(tl.int64)
        counted = ok & (label != ignore_index)
        known = counted & (label >= 0) & (label < C)
        left, right = _block_ends(corners, c, C, stride_xc, fraction_h, lane_ok, KIND)
        # Of ignored pixels nothing, but NaN of those whose logits make it, as in torch.
        lse += tl.where(known, 0.0, tl.where(counted, float("nan"), float("inf")))
        p = tl.exp2(_between(left, right, fraction_w, KIND) - lse[None, :, :])  # [BLOCK_N, SLOTS, BLOCK_M]
        p = tl.where(ok[None, :, :], p, 0.0)
        hit = counted[None, :, :] & (label[None, :, :] == c[:, None, None])
        probabilities += tl.sum(p, 1)
        hits += tl.sum(tl.where(hit, p, 0.0), 1)
        counts += tl.sum(hit.to(tl.float32), 1)
    class_ok = c < C
    sums = sums_ptr + chunk * (3 * C) + c
    tl.store(sums, tl.sum(hits, 1), mask=class_ok)
    tl.store(sums + C, tl.sum(probabilities, 1), mask=class_ok)
    tl.store(sums + 2 * C, tl.sum(counts, 1), mask=class_ok)


@triton.jit
def _softmax_expectation_kernel(
    x_ptr, target_ptr, lse_ptr, grad_ptr, mean_ptr,
    LANES, row_lanes, C, H, W, OH, OW, scale_h, scale_w, inverse_w,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_tn, stride_th, stride_tw,
    KIND: tl.constexpr, KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr, PARTS: tl.constexpr,
    SLOTS: tl.constexpr, WIDE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # mean = sum over c of p[c] q[c], q[c] = grad[1, c] and, for the label's class, grad[0, c] more.
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
    pixel = (n * OH + oh)[None, :] * OW + ow
    lse = tl.load(lse_ptr + pixel, mask=ok, other=0.0) * LOG2E
    mean = tl.zeros((SLOTS, BLOCK_M), tl.float32)
    for _ in tl.range(0, C, BLOCK_N):
        left, right = _block_ends(corners, c, C, stride_xc, fraction_h, lane_ok, KIND)
        p = tl.exp2(_between(left, right, fraction_w, KIND) - lse[None, :, :])
        q = tl.load(grad_ptr + C + c, mask=c < C, other=0.0)
        mean += tl.sum(p * q[:, None, None], 0)
        c += BLOCK_N
    labels = target_ptr + (n * stride_tn + oh * stride_th)[None, :] + ow * stride_tw
    label = tl.load(labels, mask=ok, other=-1).to(tl.int64)
    known = (label >= 0) & (label < C)
    label = tl.where(known, label, 0)
    if not WIDE_INDEX:
        label = label.to(tl.int32)
    logit = _class_logits(corners, label * stride_xc, fraction_h, fraction_w, known, KIND)
    hit = tl.load(grad_ptr + label, mask=known, other=0.0)
    mean += tl.where(known, hit * tl.exp2(logit * LOG2E - lse), 0.0)
    tl.store(mean_ptr + pixel, mean, mask=ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    return [Tile(128, 8, 1, 4, 1), Tile(128, 4, 1, 4, 1), Tile(256, 4, 1, 8, 1)]


register_candidates("upsample_dice_sums", _candidates)
register_candidates("softmax_expectation", pixel_candidates)


def upsample_dice_sums(x, target, lse, mode, align_corners, scales, ignore_index) -> torch.Tensor:
    """Partial sums, fp32 [chunks, 3, C], of the pixels that are not ignored.

    Of the label's probability where the label is c, of the probability of c, of the pixels whose label is c.
    x [N, C, H, W] and target [N, OH, OW]: any strides; lse fp32 [N, OH, OW], dense.
    """
    out_size = tuple(lse.shape[1:])
    key = ("upsample_dice_sums", x.device, layout_key(x, target, lse), mode, align_corners, scales,
           ignore_index)  # fmt: skip

    def make() -> Launch:
        resampling = cells(tuple(x.shape[2:]), out_size, mode, align_corners, scales)
        parts, slots, row_lanes = lanes_of(x, out_size, resampling.kind, resampling.most[1])
        channels, pixels = x.shape[1], lse.numel()
        problem = Problem(
            "upsample_dice_sums", channels, channels, 1, 1, x.dtype, pixels, pixels, channels, channels
        )
        tile = choose_tile(problem, x.device)
        wide = needs_wide_index(x, target, lse)
        # Three sums are kept for each lane and class; beside offsets of 64 bits registers hold half as many.
        values = VALUES_IN_REGISTERS // slots
        most = min(tile.block_n, min(4, values) if wide else values, triton.next_power_of_2(channels))
        tile = replace(tile, block_n=max(1, most))
        lanes = x.shape[0] * out_size[0] * row_lanes
        tiles, blocks = triton.cdiv(lanes, tile.block_m), triton.cdiv(channels, tile.block_n)
        steps = triton.cdiv(tiles * blocks, PROGRAMS)
        scalars = (lanes, row_lanes, steps, *x.shape[1:], *out_size, *resampling.scales,
                   resampling.inverses[1], ignore_index, *x.stride(), *target.stride())  # fmt: skip
        constants = {
            "KIND": resampling.kind,
            "KEEPS_H": resampling.keeps[0],
            "KEEPS_W": resampling.keeps[1],
            "PARTS": parts,
            "SLOTS": slots,
            "WIDE_INDEX": wide,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(tiles, steps) * blocks,)
        return bounded(Launch(_upsample_dice_sums_kernel, grid, scalars, constants, tile), x.device)

    launch = launch_for(key, make)
    chunks = launch.grid[0] // triton.cdiv(x.shape[1], launch.constants["BLOCK_N"])
    sums = torch.empty((chunks, 3, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(x, target, lse, sums)
    return sums


def softmax_expectation(x, target, lse, grad, out, mode, align_corners, scales) -> None:
    """out = sum over c of p[c] (grad[1, c] + [label is c] grad[0, c]), fp32 [N, OH, OW], as lse is.

    p is the softmax of the upsampled x [N, C, H, W]; grad fp32 [3, C] dense; x and target: any strides.
    """
    out_size = tuple(lse.shape[1:])
    key = ("softmax_expectation", x.device, layout_key(x, target, lse, grad, out), mode, align_corners,
           scales)  # fmt: skip

    def make() -> Launch:
        resampling = cells(tuple(x.shape[2:]), out_size, mode, align_corners, scales)
        parts, slots, row_lanes = lanes_of(x, out_size, resampling.kind, resampling.most[1])
        tile = pixel_tile("softmax_expectation", x, out_size, slots)
        lanes = x.shape[0] * out_size[0] * row_lanes
        scalars = (lanes, row_lanes, *x.shape[1:], *out_size, *resampling.scales, resampling.inverses[1],
                   *x.stride(), *target.stride())  # fmt: skip
        constants = {
            "KIND": resampling.kind,
            "KEEPS_H": resampling.keeps[0],
            "KEEPS_W": resampling.keeps[1],
            "PARTS": parts,
            "SLOTS": slots,
            "WIDE_INDEX": needs_wide_index(x, target, lse),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(lanes, tile.block_m),)
        return bounded(Launch(_softmax_expectation_kernel, grid, scalars, constants, tile), x.device)

    launch_for(key, make)(x, target, lse, grad, out)
