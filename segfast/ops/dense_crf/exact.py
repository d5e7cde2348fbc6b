"""Exact Gaussian filtering: over all pairs of points in chunks, and, on a grid, one axis after the other."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._operator import is_traced
from .._threads import Task, each, on_threads
from .chunks import Passes, pieces_of

# Standard deviations, one for each feature.
Theta = Sequence[float] | Tensor

# Elements of the kernel matrix that exist at a time, unless one row has more.
_CHUNK = 1 << 20
# Of larger half norms float64 no longer holds the exponents, which are their differences, to 2**-20.
_LARGEST_HALF_NORM = 2.0**30


class AllPairsFilter:
    """diag(after) K diag(before), K_ij = exp(-|f_i - f_j|^2 / 2) with K_ii = 1; values [N, C].

    features [N, D], divided by their standard deviations; `before` and `after` [N] or None. Memory is linear.
    Differentiable, twice too, in all of them.
    """

    method = "exact"

    def __init__(self, features: Tensor):
        self.features = features
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        # In float64, where there is such a thing: far from the mean, half norms cancel in the exponent.
        self._dtype = features.dtype
        places = features.detach().to(self._dtype if features.device.type == "mps" else torch.float64)
        self._centered = places - places.mean(0)
        half_norm = self._centered.square().sum(1, keepdim=True) / 2
        # Where one is too large, and asking does not wait for a device: points whose distances are taken.
        self._far: Tensor | None = None
        if places.is_cpu and not is_traced() and not half_norm.amax() <= _LARGEST_HALF_NORM:
            self._far = places
        one = torch.ones_like(half_norm)
        # Their product is the exponent, -|f_i|^2 / 2 + f_i f_j - |f_j|^2 / 2.
        self._rows = torch.cat([self._centered, -half_norm, one], 1)
        self._columns = torch.cat([self._centered, one, -half_norm], 1).T.contiguous()

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "AllPairsFilter":
        other = copy.copy(self)
        other.before, other.after = before, after
        return other

    def __call__(self, values: Tensor) -> Tensor:
        return scale(_AllPairs.apply(scale(values, self.before), self.features, self), self.after)

    def passes(self, values: Tensor) -> Passes:
        values, out = scale(values, self.before), torch.empty_like(values)

        def part(rows: slice) -> Tensor:
            return out[rows] if self.after is None else out[rows] * self.after[rows, None]

        return Passes([self._products(values, out)], part)

    def compute(self, values: Tensor) -> Tensor:
        """K times the values."""
        if is_traced():
            return torch.cat([kernel @ values for _, kernel in self._chunks()])
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        on_threads(values, lambda: each(self._products(values, out)))
        return out

    def _products(self, values: Tensor, out: Tensor) -> list[Task]:
        """The tasks after which K times the values is in `out`."""

        def write(rows: slice) -> None:
            for some, kernel in self._chunks(rows):
                torch.matmul(kernel, values, out=out[some])

        return [functools.partial(write, rows) for rows in pieces_of(values.shape[0])]

    def features_gradient(self, grad: Tensor, values: Tensor) -> Tensor:
        """The gradient of <grad, K values> in the features: [N, D].

        -sum_j s_ij K_ij (f_i - f_j) with s_ij = <grad_i, values_j> + <values_i, grad_j>.
        """
        out = torch.empty_like(self._centered)
        left, right = torch.cat([grad, values], 1), torch.cat([values, grad], 1).T

        def write(some: slice) -> None:
            shares = grad.new_empty(self._rows_at_once, right.shape[1])
            for rows, kernel in self._chunks(some):
                share = shares[: kernel.shape[0]]
                torch.matmul(left[rows], right, out=share)
                share = share.mul_(kernel).to(out.dtype)
                torch.matmul(share, self._centered, out=out[rows])
                out[rows] -= self._centered[rows] * share.sum(1, keepdim=True)

        pieces = pieces_of(grad.shape[0])
        on_threads(grad, lambda: each(functools.partial(write, some) for some in pieces))
        return out.to(self._dtype)

    @property
    def _rows_at_once(self) -> int:
        points = self._rows.shape[0]
        return max(1, min(points, _CHUNK // points))

    def _chunks(self, of: slice | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rows of K, a chunk at a time, in buffers that the next chunk overwrites; traced, in new ones."""
        points, step = self._rows.shape[0], self._rows_at_once
        of = slice(0, points) if of is None else of
        # Rounding may leave the exponent of two equal points a little above zero; far below it, where the
        # kernel no longer counts, denormal numbers would be slow.
        limits = math.log(torch.finfo(self._dtype).tiny) / 2, 0.0
        traced = is_traced()
        if not traced:
            exponents = self._rows.new_empty(step, points)
            same = self._rows.dtype == self._dtype
            kernels = self._rows.new_empty(0 if same else step, points, dtype=self._dtype)
        for start in range(of.start, of.stop, step):
            rows = slice(start, min(start + step, of.stop))
            if traced:
                yield rows, (self._rows[rows] @ self._columns).to(self._dtype).clamp(*limits).exp()
                continue
            count = rows.stop - rows.start
            if self._far is not None:
                kernel = _exponents(self._far[rows], self._far)
            else:
                kernel = torch.matmul(self._rows[rows], self._columns, out=exponents[:count])
            if not same:
                kernel = kernels[:count].copy_(kernel)
            yield rows, kernel.clamp_(*limits).exp_()


def _exponents(rows: Tensor, columns: Tensor) -> Tensor:
    """-|f_i - f_j|^2 / 2, slowly, from differences."""
    distances = torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square_().mul_(-0.5)


class _AllPairs(torch.autograd.Function):
    """K times the values [N, C], as a function of them and the features [N, D] that K is made of."""

    @staticmethod
    def forward(ctx, values, features, all_pairs):
        ctx.all_pairs = all_pairs
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, features)
        return all_pairs.compute(values)

    @staticmethod
    def backward(ctx, grad):
        all_pairs = ctx.all_pairs
        if not ctx.needs_input_grad[1]:
            # K is symmetric.
            return _AllPairs.apply(grad, all_pairs.features, all_pairs), None, None
        values, features = ctx.saved_tensors
        gradient = _features_gradient if torch.is_grad_enabled() else AllPairsFilter.features_gradient
        grad_values = _AllPairs.apply(grad, features, all_pairs) if ctx.needs_input_grad[0] else None
        return grad_values, gradient(all_pairs, grad, values), None


def _features_gradient(all_pairs: AllPairsFilter, grad: Tensor, values: Tensor) -> Tensor:
    """`AllPairsFilter.features_gradient` in differentiable operations: K times 2 C (D + 1) channels."""
    features = all_pairs.features - all_pairs.features.detach().mean(0)
    extended = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    wide = torch.cat([values, grad], 1)[:, :, None] * extended[:, None, :]
    summed = _AllPairs.apply(wide.flatten(1), all_pairs.features, all_pairs).reshape(wide.shape)
    sums = (torch.cat([grad, values], 1)[:, :, None] * summed).sum(1)
    return sums[:, :-1] - features * sums[:, -1:]


class SeparableFilter:
    """diag(after) K diag(before) over the pixels of an image, K the spatial Gaussian: rows, then columns.

    Standard deviations in pixels, (along x, along y), numbers or a tensor; no tail is cut off. Values
    [..., H W, C] in raster order. Differentiable in all of them.
    """

    method = "exact"

    def __init__(self, size: tuple[int, int], theta: Theta, like: Tensor):
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self._down = _toeplitz(size[0], theta[1], like)
        self._across = _toeplitz(size[1], theta[0], like)

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "SeparableFilter":
        other = copy.copy(self)
        other.before, other.after = before, after
        return other

    def __call__(self, values: Tensor) -> Tensor:
        height, width = self._down.shape[0], self._across.shape[0]
        image = scale(values, self.before).unflatten(-2, (height, width))
        image = (self._down @ image.flatten(-2)).reshape(image.shape)
        return scale((self._across @ image).flatten(-3, -2), self.after)

    def passes(self, values: Tensor) -> Passes:
        height, width = self._down.shape[0], self._across.shape[0]
        image = scale(values, self.before).reshape(height, -1)
        between, out = torch.empty_like(image), torch.empty_like(image)
        flat = out.view(values.shape)

        def down(rows: slice) -> None:
            torch.matmul(self._down[rows], image, out=between[rows])

        def across(rows: slice) -> None:
            for row in range(rows.start, rows.stop):
                torch.matmul(self._across, between[row].view(width, -1), out=out[row].view(width, -1))

        def part(rows: slice) -> Tensor:
            return flat[rows] if self.after is None else flat[rows] * self.after[rows, None]

        stages: list[list[Task]] = [
            [functools.partial(axis, rows) for rows in pieces_of(height)] for axis in (down, across)
        ]
        return Passes(stages, part)


def _toeplitz(count: int, sigma: float | Tensor, like: Tensor) -> Tensor:
    places = torch.arange(count, device=like.device, dtype=like.dtype)
    if not isinstance(sigma, Tensor):
        # A number that is zero in this dtype would be 0 / 0 on the diagonal.
        sigma = max(sigma, torch.finfo(like.dtype).tiny)
    # Of small ones no difference of two infinities.
    return (-((places[:, None] - places) / sigma).square() / 2).exp()


def scale(values: Tensor, factors: Tensor | None) -> Tensor:
    return values if factors is None else values * factors[:, None]
