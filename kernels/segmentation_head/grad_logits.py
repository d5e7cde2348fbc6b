"""Gradient of the low-resolution logits: the adjoint of the interpolation, each pixel written once.

A lane belongs to one column of cells and walks down ROWS of them with a block of classes. It keeps what the
cell above has given to the row of pixels between them, adds its own half, and the pixel gets what its left
neighbor lane holds for it. So outputs are visited once, but for the row of cells above each strip, and lane
zero of a tile, which repeats the last one of the tile before. The order of every sum is fixed.
"""

from dataclasses import replace

import triton
import triton.language as tl

from .._device import bounded
from .._launch import Launch, launch_for, layout_key, needs_wide_index
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ._cells import (
    LOG2E,
    _between,
    _corners,
    _ends,
    _first_output,
    _fraction,
    _load_corners,
    cells,
    stretch,
)

BUSY = 132 * 1024  # lanes that keep a large GPU busy


@triton.jit
def _share_of_start(fraction, cell, size):
    # What the pixel at a cell's start gets of an output's gradient: all after the last pixel.
    return tl.where(cell >= size - 1, 1.0, 1.0 - fraction)


@triton.jit
def _upsample_grad_logits_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, lse_ptr, mean_ptr, gx_ptr,
    LANES, strips, rows, sub_rows, parts, C, H, W, OH, OW,
    scale_h, scale_w, inverse_h, inverse_w, smoothing, ignore_index,
    stride_gn, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    stride_tn, stride_th, stride_tw, stride_yn, stride_yc, stride_yh, stride_yw,
    KIND: tl.constexpr, KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr,
    SLOTS: tl.constexpr, DICE: tl.constexpr, SMOOTHING: tl.constexpr,
    PER_PIXEL: tl.constexpr, CHANNELS: tl.constexpr, WIDE_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Cross-entropy: dz[c] = grad ((1 - smoothing) weight[label] (p[c] - [c is label])
    #                              + smoothing / C (p[c] sum(weight) - weight[c])).
    # Dice, of sums whose gradient is grad [3, C]: dz[c] = p[c] (grad[1, c] + [c is label] grad[0, c] - mean).
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_N)
    c = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = pid // blocks
    if WIDE_INDEX:
        tile = tile.to(tl.int64)
        c = c.to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    lane = tile * (BLOCK_M - 1) - 1 + member
    lane_ok = (lane >= 0) & (lane < LANES)
    lane = tl.where(lane_ok, lane, 0)
    cell_w = (lane % (W + 1)).to(tl.int32) - 1
    first_row = (lane // (W + 1) % strips).to(tl.int32) * rows
    n = lane // (W + 1) // strips
    first_w = _first_output(cell_w, W, OW, scale_w, inverse_w, KIND)
    end_w = _first_output(cell_w + 1, W, OW, scale_w, inverse_w, KIND)
    x_image = x_ptr + n * stride_xn
    class_ok = c < C

    class_weight = tl.where(class_ok, 1.0, 0.0)
    weights = C * 1.0
    if DICE:
        hit_grad = tl.load(grad_ptr + c, mask=class_ok, other=0.0)
        probability_grad = tl.load(grad_ptr + C + c, mask=class_ok, other=0.0)
    elif not PER_PIXEL:
        grad = tl.load(grad_ptr)
    if weight_ptr is not None:
        class_weight = tl.load(weight_ptr + c, mask=class_ok, other=0.0).to(tl.float32)
        if SMOOTHING:
            every = tl.arange(0, CHANNELS)
            weights = tl.sum(tl.load(weight_ptr + every, mask=every < C, other=0.0).to(tl.float32), 0)

    # What the cell above gave to the pixels below it, at its left and right end.
    above_left = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    above_right = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    before = tl.broadcast_to(tl.maximum(member - 1, 0)[None, :], (BLOCK_N, BLOCK_M))
    for r in tl.range(0, rows + 1):
        cell_h = first_row + r - 1
        first_h = _first_output(cell_h, H, OH, scale_h, inverse_h, KIND)
        end_h = _first_output(cell_h + 1, H, OH, scale_h, inverse_h, KIND)
        row_ok = lane_ok & (cell_h < H)
        row = tl.minimum(cell_h, H - 1)
        corners = _corners(x_image, row, cell_w, H, W, stride_xh, stride_xw, KIND, KEEPS_H, KEEPS_W)
        mask = class_ok[:, None] & row_ok[None, :]
        values = _load_corners(corners, (c * stride_xc)[:, None], mask, KIND)
        top_left = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        top_right = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        bottom_left = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        bottom_right = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for sub_row in tl.range(0, sub_rows):
            oh = first_h + sub_row
            oh_ok = row_ok & (oh < end_h)
            fraction_h = _fraction(oh, cell_h, scale_h, KIND)
            left_end, right_end = _ends(values, fraction_h, 0.0, KIND)
            left = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            right = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.range(0, parts):
                ow = (first_w + part * SLOTS)[None, :] + tl.arange(0, SLOTS)[:, None]  # [SLOTS, BLOCK_M]
                ok = oh_ok[None, :] & (ow < end_w[None, :])
                fraction_w = _fraction(ow, cell_w[None, :], scale_w, KIND)
                pixel = (n * OH + oh)[None, :] * OW + ow
                lse = tl.load(lse_ptr + pixel, mask=ok, other=0.0) * LOG2E
                labels = target_ptr + (n * stride_tn + oh * stride_th)[None, :] + ow * stride_tw
                label = tl.load(labels, mask=ok, other=0).to(tl.int64)
                counted = ok & (label != ignore_index)
                known = counted & (label >= 0) & (label < C)
                label = tl.where(known, label, -1).to(tl.int32)
                # Of ignored pixels nothing, but NaN of those whose logits make it, as in torch.
                lse += tl.where(counted, 0.0, float("inf"))
                p = tl.exp2(_between(left_end, right_end, fraction_w, KIND) - lse[None, :, :])
                hit = label[None, :, :] == c[:, None, None]
                if DICE:
                    mean = tl.load(mean_ptr + pixel, mask=ok, other=0.0)
                    mean = tl.where(counted, tl.where(known, mean, float("nan")), 0.0)
                    q = probability_grad[:, None, None] + tl.where(hit, hit_grad[:, None, None], 0.0)
                    dz = p * (q - mean[None, :, :])
                else:
                    if PER_PIXEL:
                        grads = grad_ptr + (n * stride_gn + oh * stride_gh)[None, :] + ow * stride_gw
                        grad = tl.load(grads, mask=ok, other=0.0)
                    if weight_ptr is not None:
                        weight = tl.load(weight_ptr + label, mask=known, other=0.0).to(tl.float32)
                    else:
                        weight = tl.where(known, 1.0, 0.0)
                    weight = tl.where(known, weight, float("nan")) * (1.0 - smoothing) * grad
                    weight = tl.where(counted, weight, 0.0)
                    if SMOOTHING:
                        # A block whatever grad is: Triton 3.9 indexes no scalar.
                        spread = tl.where(counted, smoothing / C * grad, 0.0)
                        dz = p * (weight + spread * weights)[None, :, :]
                        dz -= tl.where(hit, weight[None, :, :], 0.0)
                        dz -= spread[None, :, :] * class_weight[:, None, None]
                    else:
                        dz = p * weight[None, :, :] - tl.where(hit, weight[None, :, :], 0.0)
                dz = tl.where(ok[None, :, :], dz, 0.0)  # [BLOCK_N, SLOTS, BLOCK_M]
                # Of one pixel: zero times NaN would be the next one's.
                if KIND == "nearest" or KEEPS_W:
                    left += tl.sum(dz, 1)
                else:
                    left += tl.sum(dz * _share_of_start(fraction_w, cell_w[None, :], W)[None, :, :], 1)
                    right += tl.sum(dz * fraction_w[None, :, :], 1)
            if KIND == "nearest" or KEEPS_H:
                top_left += left
                top_right += right
            else:
                start_h = _share_of_start(fraction_h, cell_h, H)[None, :]
                top_left += start_h * left
                top_right += start_h * right
                bottom_left += fraction_h[None, :] * left
                bottom_right += fraction_h[None, :] * right
        # The right ends belong to the next lane's pixel; before the first pixel there is only a right end.
        gx = above_left + top_left + tl.gather(above_right + top_right, before, 1)
        pixels = gx_ptr + n * stride_yn + cell_h.to(tl.int64) * stride_yh + cell_w.to(tl.int64) * stride_yw
        own = row_ok & (member > 0) & (cell_w >= 0) & (cell_h >= first_row)
        tl.store(pixels[None, :] + (c * stride_yc)[:, None], gx.to(gx_ptr.dtype.element_ty),
                 mask=class_ok[:, None] & own[None, :])  # fmt: skip
        above_left = bottom_left
        above_right = bottom_right


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    """Lanes x classes, and in split_k the rows of a strip: as many as leave enough lanes."""
    found = []
    for lanes, classes, warps in ((64, 4, 2), (64, 8, 2), (256, 4, 8), (128, 2, 4)):
        columns = problem.rows // problem.depth * triton.cdiv(problem.channels_in, classes)
        rows = max(2, min(32, columns * problem.depth // BUSY, problem.depth))
        found.append(Tile(lanes, classes, 1, warps, 1, split_k=rows))
    return found


register_candidates("upsample_grad_logits", _candidates)


def upsample_grad_logits(grad, x, target, weight, lse, mean, out, mode, align_corners, scales, ignore_index,
                         smoothing) -> None:  # fmt: skip
    """out [N, C, H, W] = gradient of the logits x.

    Without `mean`, of the cross-entropy: grad fp32 [N, OH, OW], of each pixel's loss, of any strides, or [],
    of their sum; `weight` [C] dense or None. With it, of the dice sums: grad fp32 [3, C] dense, and `mean`
    what `softmax_expectation` gives for it. lse and mean: fp32 [N, OH, OW], dense. x, target, out: any
    strides.
    """
    out_size = tuple(lse.shape[1:])
    pointers = (grad, x, target, weight, lse, mean, out)
    key = ("upsample_grad_logits", x.device, layout_key(*pointers), mode, align_corners, scales,
           ignore_index, smoothing)  # fmt: skip

    def make() -> Launch:
        resampling = cells(tuple(x.shape[2:]), out_size, mode, align_corners, scales)
        parts, slots = stretch(resampling.most[1])
        batch, channels, height, width = x.shape
        columns = batch * (width + 1)
        problem = Problem("upsample_grad_logits", channels, channels, 1, 1, x.dtype, lse.numel(),
                          rows=columns * height, columns=channels, depth=height)  # fmt: skip
        tile = choose_tile(problem, x.device)
        # Eight sums and the corners are kept for each class beside the outputs.
        wide = needs_wide_index(x, target, lse, out)
        values = (4 if wide else 8) if smoothing else 16
        most = min(tile.block_n, values // slots, triton.next_power_of_2(channels))
        tile = replace(tile, block_n=max(1, most))
        rows = min(tile.split_k, height)
        strips = triton.cdiv(height, rows)
        lanes = columns * strips
        grad_strides = grad.stride() if grad.dim() == 3 else (0, 0, 0)
        scalars = (lanes, strips, rows, resampling.most[0], parts, channels, height, width, *out_size,
                   *resampling.scales, *resampling.inverses, float(smoothing), ignore_index,
                   *grad_strides, *x.stride(), *target.stride(), *out.stride())  # fmt: skip
        constants = {
            "KIND": resampling.kind,
            "KEEPS_H": resampling.keeps[0],
            "KEEPS_W": resampling.keeps[1],
            "SLOTS": slots,
            "DICE": mean is not None,
            "SMOOTHING": smoothing != 0,
            "PER_PIXEL": grad.dim() == 3,
            "CHANNELS": triton.next_power_of_2(channels),
            "WIDE_INDEX": wide,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        tiles = triton.cdiv(lanes, tile.block_m - 1)
        grid = (tiles * triton.cdiv(channels, tile.block_n),)
        launch = Launch(_upsample_grad_logits_kernel, grid, scalars, constants, tile)
        return bounded(launch, x.device)

    launch_for(key, make)(*pointers)
