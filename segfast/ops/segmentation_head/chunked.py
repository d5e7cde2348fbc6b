"""The same on a CPU in ATen operations: tiles of a few output rows, so that the full-size logits never exist.

Both directions of an interpolation are small matrix products, z = R x Q^T and its adjoint R^T dz Q, with R
[rows, low rows] and Q [columns, low columns] cut to what a tile touches. A tile stays in the caches through
softmax, loss and gradient, where the plain operations go through memory for each. In a matrix product a
logit or gradient that is not finite would meet the zeros of far outputs: an image that has one takes the two
neighbors of each output instead, as ATen does.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._threads import each, on_threads

VALUES = 1 << 17  # of a tile: half a megabyte in fp32
# Fewer classes take hardly more memory than their labels, and few logits stay in the caches whole: they are
# left to torch's own functions.
LEAST_CLASSES = 8
LEAST_LOGITS = {"upsample_cross_entropy": 1 << 18, "upsample_dice": 1 << 14, "upsample_argmax": 1 << 14}
LOW_COLUMNS = 16  # of a tile: a product costs as many multiply-adds a logit, and few make it slow


def worth_tiling(operation: str, logits: Tensor, size: tuple[int, int]) -> bool:
    """True if tiles are worth it beside torch's functions one by one, on full-size logits."""
    batch, classes = logits.shape[:2]
    if operation == "upsample_cross_entropy" and classes < LEAST_CLASSES:
        return False
    return batch * classes * size[0] * size[1] >= LEAST_LOGITS[operation]


class Axis(NamedTuple):
    """A stretch [start, stop) of outputs, the inputs [low, high) they lie between, and the matrix between.

    Also each output's two neighbors, and the share of the second; None where it is the first alone.
    """

    start: int
    stop: int
    low: int
    high: int
    matrix: Tensor  # [stop - start, high - low]
    before: Tensor
    after: Tensor
    fraction: Tensor | None

    def between(self, values: Tensor) -> Tensor:
        """Interpolates the last dimension, between the neighbors alone."""
        if self.fraction is None:
            return values[..., self.before]
        return values[..., self.before] * (1 - self.fraction) + values[..., self.after] * self.fraction

    def add_adjoint(self, sums: Tensor, values: Tensor) -> None:
        """Adds the adjoint of `between` to `sums`."""
        if self.fraction is None:
            sums.index_add_(-1, self.before, values)
            return
        sums.index_add_(-1, self.before, values * (1 - self.fraction))
        sums.index_add_(-1, self.after, values * self.fraction)


class Tile(NamedTuple):
    """A block of output pixels of one image: logits [rows, C, columns] and where they lie."""

    image: int
    rows: slice
    columns: slice
    logits: Tensor
    finite: bool  # no logit of the image is infinite or NaN
    add_gradient: Callable[[Tensor], None]


def _positions(size: int, out_size: int, mode: str, align_corners: bool, scale: float | None, dtype):
    """Low index, and the weight of the pixel after it, of every output: ATen's coordinates."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    position = torch.arange(out_size, dtype=precise, device="cpu")
    if size == out_size and mode != "nearest":  # ATen copies, whatever factor it was given
        return position.long(), torch.zeros_like(position)

    def ratio() -> Tensor:
        given = scale is not None and scale > 0
        value = 1.0 / scale if given else size / out_size  # type: ignore[operator]
        return torch.tensor(value, dtype=precise, device="cpu")

    if mode == "nearest":
        # ATen looks at no factor where the size stays or doubles, and always computes in fp32.
        exact = out_size in (size, 2 * size)
        step = torch.tensor(size / out_size, dtype=torch.float32, device="cpu") if exact else ratio().float()
        low = (position.float() * step).floor().long().clamp_(max=size - 1)
        return low, torch.zeros(out_size, dtype=precise, device="cpu")
    if align_corners:
        value = (size - 1) / (out_size - 1) if out_size > 1 else 0.0
        step = torch.tensor(value, dtype=precise, device="cpu")
        source = position * step
    else:
        source = (position + 0.5) * ratio() - 0.5
        if precise == torch.float32 and _fuses():
            source = ((position + 0.5).double() * ratio().double() - 0.5).float()
        source.clamp_(min=0)
    low = source.long().clamp_(max=size - 1)
    return low, (source - low).clamp_(0, 1)


@functools.cache
def _fuses() -> bool:
    """True if this CPU's ATen computes positions with fused multiply-adds: 1.5 / 3 - 0.5 is not 0 then."""
    ramp = torch.arange(2, dtype=torch.float32, device="cpu").view(1, 1, 2, 1)
    return torch.ops.aten.upsample_bilinear2d(ramp, [6, 1], False)[0, 0, 1, 0].item() != 0


@functools.lru_cache(maxsize=64)
def _axis(size: int, out_size: int, mode: str, align_corners: bool, scale: float | None, dtype,
          step: int) -> tuple[Axis, ...]:  # fmt: skip
    """An axis cut into stretches of `step` outputs."""
    low, fraction = _positions(size, out_size, mode, align_corners, scale, dtype)
    high = low if size == out_size else (low + 1).clamp(max=size - 1)
    parts = []
    for start in range(0, out_size, step):
        here = slice(start, min(start + step, out_size))
        first, last = int(low[here][0]), int(high[here][-1])
        matrix = torch.zeros(here.stop - start, last - first + 1, dtype=fraction.dtype, device="cpu")
        row = torch.arange(here.stop - start, device="cpu")
        for column, share in ((low, 1 - fraction), (high, fraction)):
            matrix.index_put_((row, column[here] - first), share[here], accumulate=True)
        shares = None if mode == "nearest" else fraction[here]
        parts.append(Axis(start, here.stop, first, last + 1, matrix, low[here], high[here], shares))
    return tuple(parts)


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _are_finite(*tensors: Tensor | None) -> bool:
    """No infinity and no NaN in any."""
    ends = [end for t in tensors if t is not None for end in torch.aminmax(t)]
    return all(math.isfinite(end) for end in ends)


def each_tile(compute: Callable[[Tile], None], logits: Tensor, size, mode: str, align_corners: bool, scales,
              gradient: Tensor | None = None, factors: tuple[Tensor | None, ...] = ()) -> None:  # fmt: skip
    """`compute` for every tile of the upsampled logits, which are fp32 or fp64; bands of rows on threads.

    With `gradient`, an unwritten [N, C, H, W] of that dtype, each tile's `add_gradient(dz)` adds the adjoint
    of dz, [rows, C, columns], to it: once for every tile. The order of sums is that of the bands, whoever
    computes them. `factors` are what dz is computed from beside the logits; maps [N, OH, OW] belong to their
    images.
    """
    batch, channels, height, width = logits.shape
    out_h, out_w = size
    scale_h, scale_w = (None, None) if scales is None else scales
    dtype = accumulation_dtype(logits)
    columns = max(32, -(-LOW_COLUMNS * out_w // width))
    columns = max(1, min(columns, out_w, VALUES // channels))
    rows = min(out_h, max(1, VALUES // (channels * columns)))
    horizontal = _axis(width, out_w, mode, align_corners, scale_w, dtype, columns)
    vertical = _axis(height, out_h, mode, align_corners, scale_h, dtype, rows)

    def image_bands(image: int) -> None:
        finite = _are_finite(logits[image])
        exact = not finite or not _are_finite(
            *(f[image] if f is not None and f.dim() == 3 else f for f in factors)
        )
        low_rows = logits[image].to(dtype).transpose(0, 1).reshape(height, channels * width)
        adjoints: list[Tensor | None] = [None] * len(vertical)

        def band(number: int) -> None:
            v = vertical[number]
            if exact:
                lines = v.between(low_rows.t()).t().reshape(-1, width)
            else:
                lines = torch.mm(v.matrix, low_rows[v.low : v.high]).view(-1, width)  # [rows * C, W]
            adjoint = torch.zeros_like(lines) if gradient is not None else None
            for h in horizontal:
                if exact:
                    logits_tile = h.between(lines)
                else:
                    logits_tile = torch.mm(lines[:, h.low : h.high], h.matrix.t())

                def add_gradient(dz: Tensor, h=h) -> None:
                    dz = dz.reshape(-1, h.stop - h.start)
                    assert adjoint is not None
                    if exact:
                        h.add_adjoint(adjoint, dz)
                    else:
                        adjoint[:, h.low : h.high].addmm_(dz, h.matrix)

                shape = (v.stop - v.start, channels, h.stop - h.start)
                compute(Tile(image, slice(v.start, v.stop), slice(h.start, h.stop), logits_tile.view(shape),
                             finite, add_gradient))  # fmt: skip
            if adjoint is not None:
                adjoint = adjoint.view(v.stop - v.start, -1)
                adjoints[number] = adjoint if exact else torch.mm(v.matrix.t(), adjoint)

        each([functools.partial(band, number) for number in range(len(vertical))])
        if gradient is None:
            return
        sums = torch.zeros_like(low_rows)
        for v, part in zip(vertical, adjoints, strict=True):
            assert part is not None
            if exact:
                v.add_adjoint(sums.t(), part.t())
            else:
                sums[v.low : v.high] += part
        gradient[image] = sums.view(height, channels, width).transpose(0, 1)

    def images() -> None:
        for image in range(batch):
            image_bands(image)

    on_threads(logits, images)


def cross_entropy(logits, target, weight, size, mode, align_corners, scales, ignore_index, smoothing,
                  per_pixel) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's results: losses [N, OH, OW], or [2] for their sum and the weights', and log-sum-exp."""
    dtype = accumulation_dtype(logits)
    shape = (logits.shape[0], *size)
    lse, losses, weights = (torch.empty(shape, dtype=dtype, device=logits.device) for _ in range(3))
    weight = None if weight is None else weight.to(dtype)

    def compute(tile: Tile) -> None:
        where = (tile.image, tile.rows, tile.columns)
        z, label = tile.logits, target[where].long()
        picked, label_weight = _picked(z, label, weight, ignore_index)
        mean = None
        if smoothing:
            mean = z.sum(1) if weight is None else torch.einsum("rcw,c->rw", z, weight)
        largest = z.amax(1)
        # A logit that is infinite makes the sum NaN, as in torch.
        tile_lse = z.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
        loss = (1 - smoothing) * (label_weight * tile_lse - picked)
        if mean is not None:
            total = logits.shape[1] if weight is None else weight.sum()
            loss += (smoothing / logits.shape[1]) * (total * tile_lse - mean)
        loss.masked_fill_(label == ignore_index, 0.0)
        lse[where], losses[where], weights[where] = tile_lse, loss, label_weight

    each_tile(compute, logits, size, mode, align_corners, scales)
    return (losses if per_pixel else torch.stack([losses.sum(), weights.sum()])), lse


def _picked(z: Tensor, label: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """weight[label] z[label] and weight[label]; zeros where ignored. Checks the labels as torch does."""
    picked = F.nll_loss(z, label, weight, ignore_index=ignore_index, reduction="none").neg_()
    counted = label != ignore_index
    if weight is None:
        return picked, counted.to(z.dtype)
    return picked, torch.where(counted, weight[label.where(counted, label.new_zeros(()))], 0.0)


def cross_entropy_gradient(grad, logits, target, weight, lse, size, mode, align_corners, scales,
                           ignore_index, smoothing) -> Tensor:  # fmt: skip
    """Gradient of the logits for `grad`, [N, OH, OW] or [], of the losses or of their sum."""
    dtype = accumulation_dtype(logits)
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    grad = grad.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    classes = logits.shape[1]

    def compute(tile: Tile) -> None:
        where = (tile.image, tile.rows, tile.columns)
        label = target[where].long()
        counted = label != ignore_index
        label = torch.where(counted, label, 0)
        g = grad[where] if grad.dim() else grad
        towards = (1 - smoothing) * g if weight is None else (1 - smoothing) * g * weight[label]
        towards = torch.where(counted, towards, 0.0)
        factor = towards
        dz = tile.logits.sub_(lse[where][:, None]).exp_()
        if smoothing:
            spread = torch.where(counted, g * (smoothing / classes), 0.0)
            factor = towards + spread * (classes if weight is None else weight.sum())
        dz.mul_(factor[:, None])
        dz.scatter_add_(1, label[:, None], -towards[:, None])
        if smoothing:
            dz.sub_(spread[:, None] if weight is None else spread[:, None] * weight[:, None])
        tile.add_gradient(dz)

    each_tile(compute, logits, size, mode, align_corners, scales, gradient, (grad, weight))
    return gradient.to(logits.dtype)


def argmax(logits, size, mode, align_corners, scales, confidence) -> tuple[Tensor, Tensor]:
    """Labels int64 [N, OH, OW], and the softmax probability of each, or an empty tensor."""
    classes = logits.shape[1]
    shape = (logits.shape[0], *size)
    labels = torch.empty(shape, dtype=torch.int64, device=logits.device)
    probability = shape if confidence else (shape[0], 0, 0)
    confidences = torch.empty(probability, dtype=torch.float32, device=logits.device)
    # From the last class to the first, so that the largest number among equal logits is the first class's: a
    # maximum, which ATen vectorises along any dimension, where it does not its argmax.
    order = torch.arange(classes, 0, -1, dtype=accumulation_dtype(logits), device=logits.device)[:, None]

    def compute(tile: Tile) -> None:
        where = (tile.image, tile.rows, tile.columns)
        largest = tile.logits.amax(1, keepdim=True)
        best = tile.logits == largest
        if not tile.finite:
            best |= tile.logits.isnan()  # the largest, as in torch
        first = torch.where(best, order, 1.0).amax(1)
        labels[where] = (classes - first).long()
        if confidence:
            confidences[where] = tile.logits.sub_(largest).exp_().sum(1).reciprocal_().float()

    each_tile(compute, logits, size, mode, align_corners, scales)
    return labels, confidences


def dice_sums(logits, target, size, mode, align_corners, scales, ignore_index) -> tuple[Tensor, Tensor]:
    """The operator's results: sums [3, C] of label probabilities, probabilities and pixels; log-sum-exp."""
    dtype = accumulation_dtype(logits)
    lse = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
    parts: dict[tuple[int, int, int], Tensor] = {}  # of the tiles, summed in their order

    def compute(tile: Tile) -> None:
        where = (tile.image, tile.rows, tile.columns)
        z, label = tile.logits, target[where].long()
        picked, counted = _picked(z, label, None, ignore_index)
        largest = z.amax(1, keepdim=True)
        p = z.sub_(largest).exp_()
        total = p.sum(1)
        tile_lse = total.log() + largest[:, 0]
        share = counted / total
        sums = z.new_zeros((3, logits.shape[1]))
        sums[1] += torch.einsum("rcw,rw->c", p, share)
        label = torch.where(counted > 0, label, 0).flatten()
        sums[0].index_add_(0, label, ((picked - tile_lse).exp_() * counted).flatten())
        sums[2].index_add_(0, label, counted.flatten())
        parts[tile.image, tile.rows.start, tile.columns.start] = sums
        lse[where] = tile_lse

    each_tile(compute, logits, size, mode, align_corners, scales)
    zeros = torch.zeros((3, logits.shape[1]), dtype=dtype, device=logits.device)
    return sum((parts[key] for key in sorted(parts)), zeros), lse


def dice_gradient(grad, logits, target, lse, size, mode, align_corners, scales, ignore_index) -> Tensor:
    """Gradient of the logits for `grad` [3, C] of the sums; that of the pixel counts is nothing."""
    dtype = accumulation_dtype(logits)
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    grad = grad.to(dtype)

    def compute(tile: Tile) -> None:
        where = (tile.image, tile.rows, tile.columns)
        label = target[where].long()
        counted = label != ignore_index
        label = torch.where(counted, label, 0)[:, None]
        p = tile.logits.sub_(lse[where][:, None]).exp_().mul_(counted[:, None])
        picked = p.gather(1, label) * grad[0][label]  # [rows, 1, columns]
        mean = torch.einsum("rcw,c->rw", p, grad[1])[:, None] + picked
        dz = p * (grad[1][:, None] - mean)
        dz.scatter_add_(1, label, picked)
        tile.add_gradient(dz)

    each_tile(compute, logits, size, mode, align_corners, scales, gradient, (grad,))
    return gradient.to(logits.dtype)


def flops(logits_shape, size) -> int:
    """Four multiply-adds interpolate a logit."""
    return 8 * logits_shape[0] * logits_shape[1] * math.prod(size)
