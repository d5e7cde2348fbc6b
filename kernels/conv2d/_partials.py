"""The sum of a convolution's split-K parts, in a fixed order, with its epilogue."""

import torch
import triton
import triton.language as tl

from .._epilogue import _activate, _affine
from .._launch import Launch, image_strides, launch_for, layout_key, needs_wide_index, pixel_alignment
from .._pixels import _pixel, reciprocal
from .._tiles import Tile


@triton.jit
def _conv2d_finish_kernel(
    partials_ptr, bias_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr,
    M, OH, OW, reciprocal_h, reciprocal_w, negative_slope,
    stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    C: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr,
    WIDE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # partials [SPLIT, M, C]
    pid = tl.program_id(0)
    if WIDE_INDEX:
        pid = pid.to(tl.int64)
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    m = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    ok = (m < M)[:, None] & c_ok[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pointers = partials_ptr + m.to(tl.int64)[:, None] * C + c[None, :]
    for _ in tl.range(0, SPLIT):
        total += tl.load(pointers, mask=ok, other=0.0)
        pointers += tl.full((), C, tl.int64) * M
    y = _affine(total, bias_ptr, scale_ptr, shift_ptr, c, c_ok)
    n, oh, ow = _pixel(m, OH, OW, reciprocal_h, reciprocal_w)
    if residual_ptr is not None:
        offsets = tl.multiple_of(n * stride_rn + oh * stride_rh + ow * stride_rw, ALIGN)
        y += tl.load(residual_ptr + offsets[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    y = _activate(y, negative_slope, ACTIVATION)
    offsets = tl.multiple_of(n * stride_yn + oh * stride_yh + ow * stride_yw, ALIGN)
    tl.store(y_ptr + offsets[:, None] + c[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def workspace(split: int, out: torch.Tensor) -> torch.Tensor:
    """Room for the parts of `out` [N, C, OH, OW]: [split, N * OH * OW, C] in fp32."""
    batch, channels, height, width = out.shape
    return torch.empty((split, batch * height * width, channels), dtype=torch.float32, device=out.device)


def finish_partials(partials, bias, scale, shift, residual, out, activation, slope) -> None:
    """out = act(scale * (partials.sum(0) + bias) + shift + residual)."""
    batch, channels, height, width = out.shape

    def make() -> Launch:
        tile = Tile(16, min(256, max(16, triton.next_power_of_2(channels))), 1, 4, 2)
        rows = batch * height * width
        scalars = (rows, height, width, reciprocal(height), reciprocal(width), float(slope),
                   *image_strides(residual), *image_strides(out))  # fmt: skip
        constants = {
            "C": channels,
            "SPLIT": partials.shape[0],
            "ACTIVATION": activation,
            "ALIGN": pixel_alignment(residual, out),
            "WIDE_INDEX": needs_wide_index(residual, out),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(channels, tile.block_n),)
        return Launch(_conv2d_finish_kernel, grid, scalars, constants, tile)

    key = (
        "conv2d_finish",
        layout_key(partials, bias, scale, shift, residual, out),
        out.device,
        activation,
        slope,
    )
    launch_for(key, make)(partials, bias, scale, shift, residual, out)
