"""The outputs that lie between low-resolution pixels: ATen's source positions, inverted.

Along an axis, cell i holds the outputs whose source lies in [i, i + 1), i = -1 ... size - 1. KIND is
"bilinear", "corners" (bilinear with align_corners) or "nearest", whose outputs all take the pixel at the
cell's start.

An output is the sum of the pixels that ATen takes, by its weights, those of zero too: so a pixel that is
infinite or NaN reaches what it reaches there.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a search for the largest starts, as -inf less -inf is NaN, and what it passes over.
LOWEST = tl.constexpr(-1e38)
NO_CLASS = tl.constexpr(-3e38)


@triton.jit
def _source(position, scale, KIND: tl.constexpr):
    # Where an output lies on the input's axis: ATen's area_pixel_compute_source_index.
    if KIND == "bilinear":
        return (position.to(tl.float32) + 0.5) * scale - 0.5
    return position.to(tl.float32) * scale


@triton.jit
def _cell_of(position, size, scale, KIND: tl.constexpr):
    cell = tl.floor(_source(position, scale, KIND)).to(tl.int32)
    return tl.minimum(cell, size - 1)


@triton.jit
def _first_output(cell, size, out_size, scale, inverse, KIND: tl.constexpr):
    # The first output of `cell`, and so the end of the cell before. Solving for it may be one off by
    # rounding: what `_source` says decides, so that every output is in the cell of `_cell_of`.
    if KIND == "bilinear":
        solved = (cell.to(tl.float32) + 0.5) * inverse - 0.5
    else:
        solved = cell.to(tl.float32) * inverse
    guess = tl.minimum(tl.maximum(tl.ceil(solved), 0.0), out_size * 1.0).to(tl.int32)
    start = cell.to(tl.float32)
    guess = tl.where((guess > 0) & (_source(guess - 1, scale, KIND) >= start), guess - 1, guess)
    guess = tl.where((guess < out_size) & (_source(guess, scale, KIND) < start), guess + 1, guess)
    return tl.where(cell >= size, out_size, guess)


@triton.jit
def _fraction(position, cell, scale, KIND: tl.constexpr):
    # The weight of the cell's end: all before the first pixel.
    if KIND == "nearest":
        return (position * 0).to(tl.float32)
    return tl.where(cell < 0, 1.0, _source(position, scale, KIND) - cell.to(tl.float32))


@triton.jit
def _row_stretch(lane, row_lanes, W, OH, OW, scale_w, inverse_w, KIND: tl.constexpr,
                 PARTS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    # A lane's image, output row, cell, first output and end. A cell is cut into PARTS stretches of SLOTS
    # outputs; PARTS = 0 gives every output a lane.
    s = (lane % row_lanes).to(tl.int32)
    oh = lane // row_lanes % OH
    n = lane // row_lanes // OH
    if PARTS == 0:
        cell = _cell_of(s, W, scale_w, KIND)
        first = s
        end = s + 1
    else:
        cell = s // PARTS - 1
        first = _first_output(cell, W, OW, scale_w, inverse_w, KIND) + s % PARTS * SLOTS
        end = _first_output(cell + 1, W, OW, scale_w, inverse_w, KIND)
    return n, oh, cell, first, end


@triton.jit
def _end_pixels(cell, size, KEEPS: tl.constexpr):
    # The pixels at a cell's start and end. After the last pixel both are that one; before the first, outputs
    # are that one and zero times the second. Where the size stays they are one pixel, once and zero times.
    if KEEPS:
        start = tl.maximum(cell, 0).to(tl.int64)
        return start, start
    start = tl.where(cell < 0, tl.minimum(size - 1, 1), cell)
    return start.to(tl.int64), tl.minimum(cell + 1, size - 1).to(tl.int64)


@triton.jit
def _corners(base, row, column, H, W, stride_xh, stride_xw, KIND: tl.constexpr,
             KEEPS_H: tl.constexpr, KEEPS_W: tl.constexpr):  # fmt: skip
    # Pointers to the four pixels around a cell, of the class `base` points at.
    # In 64 bits: a row's offset alone can pass 2**31.
    if KIND == "nearest":
        top_left = base + tl.maximum(row, 0).to(tl.int64) * stride_xh
        top_left += tl.maximum(column, 0).to(tl.int64) * stride_xw
        return top_left, top_left, top_left, top_left
    above, below = _end_pixels(row, H, KEEPS_H)
    left, right = _end_pixels(column, W, KEEPS_W)
    top, bottom = base + above * stride_xh, base + below * stride_xh
    left *= stride_xw
    right *= stride_xw
    return top + left, top + right, bottom + left, bottom + right


@triton.jit
def _load_corners(corners, offsets, mask, KIND: tl.constexpr):
    # The four pixels of a block of classes [BLOCK_N, LANES], or of one class each; fp32.
    top_left, top_right, bottom_left, bottom_right = corners
    a = tl.load(top_left[None, :] + offsets, mask=mask, other=0.0).to(tl.float32)
    if KIND == "nearest":
        return a, a, a, a
    b = tl.load(top_right[None, :] + offsets, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(bottom_left[None, :] + offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(bottom_right[None, :] + offsets, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def _class_logits(corners, offsets, fraction_h, fraction_w, mask, KIND: tl.constexpr):
    # The upsampled logit of one class for each output, [SLOTS, LANES].
    top_left, top_right, bottom_left, bottom_right = _load_corners(corners, offsets, mask, KIND)
    if KIND == "nearest":
        return top_left
    start = top_left * (1.0 - fraction_h)[None, :] + bottom_left * fraction_h[None, :]
    end = top_right * (1.0 - fraction_h)[None, :] + bottom_right * fraction_h[None, :]
    return start * (1.0 - fraction_w) + end * fraction_w


@triton.jit
def _ends(values, fraction_h, bias, KIND: tl.constexpr):
    # The logits at the cells' two ends at one output row, times log2(e), plus a bias: [BLOCK_N, LANES].
    top_left, top_right, bottom_left, bottom_right = values
    if KIND == "nearest":
        start = top_left * LOG2E + bias
        return start, start
    top = ((1.0 - fraction_h) * LOG2E)[None, :]
    bottom = (fraction_h * LOG2E)[None, :]
    return top_left * top + bias + bottom_left * bottom, top_right * top + bias + bottom_right * bottom


@triton.jit
def _block_ends(corners, c, C, stride_xc, fraction_h, lane_ok, KIND: tl.constexpr):
    # Loads a block of classes and interpolates it down to one output row; where there is no class, NO_CLASS.
    mask = (c < C)[:, None] & lane_ok[None, :]
    values = _load_corners(corners, (c * stride_xc)[:, None], mask, KIND)
    return _ends(values, fraction_h, tl.where(c < C, 0.0, NO_CLASS)[:, None], KIND)


@triton.jit
def _between(start, end, fraction_w, KIND: tl.constexpr):
    # From the ends of cells [BLOCK_N, LANES] to their outputs [BLOCK_N, SLOTS, LANES].
    if KIND == "nearest":
        return tl.broadcast_to(start[:, None, :], (start.shape[0], fraction_w.shape[0], start.shape[1]))
    return start[:, None, :] * (1.0 - fraction_w)[None, :, :] + end[:, None, :] * fraction_w[None, :, :]


class Cells(NamedTuple):
    """A resampling as launchers pass it, (height, width) each: steps, their inverses, outputs of a cell.

    Also whether the size stays as it is.
    """

    kind: str
    scales: tuple[float, float]
    inverses: tuple[float, float]
    most: tuple[int, int]
    keeps: tuple[bool, bool]


@functools.lru_cache(maxsize=4096)
def cells(size: tuple[int, int], out_size: tuple[int, int], mode: str, align_corners: bool,
          scales: tuple[float, float] | None) -> Cells:  # fmt: skip
    """How ATen resamples `size` to `out_size`; `scales` are the factors it was given, else None."""
    kind = "corners" if align_corners and mode == "bilinear" else mode
    given = (None, None) if scales is None else scales
    steps = [source_scale(i, o, kind, s) for i, o, s in zip(size, out_size, given, strict=True)]
    most = [_most_outputs(i, o, kind, s) for i, o, s in zip(size, out_size, steps, strict=True)]
    inverses = [1.0 / s if s > 0 else 1e30 for s in steps]
    keeps = size[0] == out_size[0], size[1] == out_size[1]
    return Cells(kind, (steps[0], steps[1]), (inverses[0], inverses[1]), (most[0], most[1]), keeps)


def source_scale(size: int, out_size: int, kind: str, factor: float | None) -> float:
    """ATen's step on the input for a step on the output; a factor that was given goes before the sizes."""
    if kind == "corners":
        return (size - 1) / (out_size - 1) if out_size > 1 else 0.0
    # An axis that keeps its size is copied; ATen's nearest looks at no factor where it doubles either.
    if size == out_size or (kind == "nearest" and out_size == 2 * size):
        return size / out_size
    return 1.0 / factor if factor is not None and factor > 0 else size / out_size


def _most_outputs(size: int, out_size: int, kind: str, scale: float) -> int:
    """The most outputs a cell has. The source position with its multiply-add fused, and not."""
    position = torch.arange(out_size, device="cpu")
    step = torch.tensor(scale, dtype=torch.float32, device="cpu")
    if kind == "bilinear":
        half = position.float() + 0.5
        sources = [half * step - 0.5, (half.double() * step.double() - 0.5).float()]
    else:
        sources = [position.float() * step]
    counts = [torch.bincount(s.floor().long().clamp(-1, size - 1) + 1).max() for s in sources]
    return int(max(counts))


def stretch(most: int) -> tuple[int, int]:
    """(stretches of a cell, outputs of a stretch) for cells of up to `most` outputs: the cheapest cut.

    A stretch costs about as much as two outputs before its first; with eight, registers spill.
    """
    slots = min((1, 2, 4), key=lambda n: math.ceil(most / n) * (n + 2))
    return math.ceil(most / slots), slots
