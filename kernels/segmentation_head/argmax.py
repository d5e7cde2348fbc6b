"""The label of every upsampled pixel, and the softmax probability it has."""

import triton
import triton.language as tl

from .._device import bounded
from .._launch import Launch, launch_for, layout_key, needs_wide_index
from .._tiles import register_candidates
from ._cells import LOWEST, _between, _block_ends, _cell_of, _corners, _fraction, _row_stretch, cells
from .forward import lanes_of, pixel_candidates, pixel_tile


@triton.jit
def _upsample_argmax_kernel(
    x_ptr, labels_ptr, confidence_ptr,
    LANES, row_lanes, C, H, W, OH, OW, scale_h, scale_w, inverse_w,
    stride_xn, stride_xc, stride_xh, stride_xw,
    KIND: tl.constexpr, KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr, PARTS: tl.constexpr,
    SLOTS: tl.constexpr, WIDE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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

    largest = tl.full((SLOTS, BLOCK_M), LOWEST, tl.float32)
    label = tl.zeros((SLOTS, BLOCK_M), tl.int32)
    total = tl.zeros((SLOTS, BLOCK_M), tl.float32)
    for first_class in tl.range(0, C, BLOCK_N):
        left, right = _block_ends(corners, c, C, stride_xc, fraction_h, lane_ok, KIND)
        z = _between(left, right, fraction_w, KIND)
        # NaN is the largest, as in torch; beside +inf whichever comes first.
        block, index = tl.max(tl.where(z == z, z, float("inf")), 0, return_indices=True)
        new = tl.maximum(largest, block)
        # Not >=: of equal logits the first class.
        label = tl.where(block > largest, first_class + index, label)
        if confidence_ptr is not None:
            total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(z - new[None, :, :]), 0)
        largest = new
        c += BLOCK_N
    pixel = (n * OH + oh)[None, :] * OW + ow
    tl.store(labels_ptr + pixel, label.to(tl.int64), mask=ok)
    if confidence_ptr is not None:
        # All logits -inf leave nothing: NaN, as in torch.
        tl.store(confidence_ptr + pixel, tl.where(total > 0, 1.0 / total, float("nan")), mask=ok)


register_candidates("upsample_argmax", pixel_candidates)


def upsample_argmax(x, labels, confidence, mode, align_corners, scales) -> None:
    """labels int64 [N, OH, OW] = argmax over the classes of the upsampled x [N, C, H, W], of any strides.

    `confidence` fp32 [N, OH, OW], or None: the label's softmax probability. Both dense.
    """
    out_size = tuple(labels.shape[1:])
    key = ("upsample_argmax", x.device, layout_key(x, labels, confidence), mode, align_corners, scales)

    def make() -> Launch:
        resampling = cells(tuple(x.shape[2:]), out_size, mode, align_corners, scales)
        parts, slots, row_lanes = lanes_of(x, out_size, resampling.kind, resampling.most[1])
        tile = pixel_tile("upsample_argmax", x, out_size, slots)
        lanes = x.shape[0] * out_size[0] * row_lanes
        scalars = (lanes, row_lanes, *x.shape[1:], *out_size, *resampling.scales, resampling.inverses[1],
                   *x.stride())  # fmt: skip
        constants = {
            "KIND": resampling.kind,
            "KEEPS_H": resampling.keeps[0],
            "KEEPS_W": resampling.keeps[1],
            "PARTS": parts,
            "SLOTS": slots,
            "WIDE_INDEX": needs_wide_index(x, labels),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(lanes, tile.block_m),)
        return bounded(Launch(_upsample_argmax_kernel, grid, scalars, constants, tile), x.device)

    launch_for(key, make)(x, labels, confidence)
