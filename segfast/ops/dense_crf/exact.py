"""Exact Gaussian filtering: over all pairs of points in chunks, and, on a grid, one axis after the other."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .chunks import chunks_of

# Elements of the kernel matrix that exist at a time, unless one row has more.
_CHUNK = 1 << 20


class AllPairsFilter:
    """diag(after) K diag(before), K_ij = exp(-|f_i - f_j|^2 / 2) with K_ii = 1; values [N, C].

    features [N, D], divided by their standard deviations; `before` and `after` [N] or None. Memory is linear.
    """

    method = "exact"

    def __init__(self, features: Tensor, before: Tensor | None = None, after: Tensor | None = None):
        self.features, self.before, self.after = features, before, after
        centred = features - features.mean(0)
        half_norm = centred.square().sum(1, keepdim=True) / 2
        one = torch.ones_like(half_norm)
        # Their product is the exponent, -|f_i|^2 / 2 + f_i f_j - |f_j|^2 / 2.
        self._rows = torch.cat([centred, -half_norm, one], 1)
        self._columns = torch.cat([centred, one, -half_norm], 1).T.contiguous()

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "AllPairsFilter":
        return AllPairsFilter(self.features, before, after)

    def __call__(self, values: Tensor) -> Tensor:
        return _scale(_AllPairs.apply(_scale(values, self.before), self), self.after)

    def chunks(self, values: Tensor) -> Iterator[Tensor]:
        return _split(self(values))

    def compute(self, values: Tensor) -> Tensor:
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        for rows, kernel in self._chunks():
            torch.matmul(kernel, values, out=out[rows])
        return out

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of K, a chunk at a time, in a buffer that the next chunk overwrites."""
        points = self._rows.shape[0]
        step = max(1, min(points, _CHUNK // points))
        buffer = self._rows.new_empty(step, points)
        lowest = math.log(torch.finfo(buffer.dtype).tiny) / 2
        for start in range(0, points, step):
            rows = slice(start, min(start + step, points))
            kernel = buffer[: rows.stop - rows.start]
            torch.matmul(self._rows[rows], self._columns, out=kernel)
            # Rounding may leave the exponent of two equal points a little above zero; far below it, where the
            # kernel no longer counts, denormal numbers would be slow.
            yield rows, kernel.clamp_(lowest, 0).exp_()


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, all_pairs):
        ctx.all_pairs = all_pairs
        return all_pairs.compute(values)

    @staticmethod
    def backward(ctx, grad):
        # K is symmetric.
        return _AllPairs.apply(grad, ctx.all_pairs), None


class SeparableFilter:
    """diag(after) K diag(before) over the pixels of an image, K the spatial Gaussian: rows, then columns.

    Standard deviations in pixels, (along x, along y). Values [H W, C] in raster order. No tail is cut off.
    """

    method = "exact"

    def __init__(
        self,
        size: tuple[int, int],
        theta: tuple[float, ...],
        like: Tensor,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ):
        self.size, self.theta, self.like, self.before, self.after = size, theta, like, before, after
        self._down, self._across = (
            _toeplitz(n, sigma, like) for n, sigma in zip(size, reversed(theta), strict=True)
        )

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "SeparableFilter":
        return SeparableFilter(self.size, self.theta, self.like, before, after)

    def __call__(self, values: Tensor) -> Tensor:
        height, width = self.size
        image = _scale(values, self.before).reshape(height, -1)
        image = (self._down @ image).reshape(height, width, -1)
        return _scale((self._across @ image).reshape(height * width, -1), self.after)

    def chunks(self, values: Tensor) -> Iterator[Tensor]:
        return _split(self(values))


def _split(values: Tensor) -> Iterator[Tensor]:
    return (values[rows] for rows in chunks_of(values.shape[0]))


def _toeplitz(count: int, sigma: float, like: Tensor) -> Tensor:
    positions = torch.arange(count, device=like.device, dtype=like.dtype) / sigma
    return (-(positions[:, None] - positions).square() / 2).exp_()


def _scale(values: Tensor, factors: Tensor | None) -> Tensor:
    return values if factors is None else values * factors[:, None]
