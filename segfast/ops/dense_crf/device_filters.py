"""The Gaussian filters on our kernels as differentiable functions: values [B, N, C] to [B, N, C], fp32.

A kernel computes K v for values v; normalizers, and the factors before and after that they become, are
PyTorch's operations on its results, and autograd's to differentiate. K is symmetric; the lattice's
transpose blurs in the other order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._fallback import give_up
from .._operands import load_kernels
from .backend import FAMILY, Thetas, choose_kernels_method
from .chunks import Passes, passes_of
from .exact import AllPairsFilter
from .filters import grid_features, normalizers
from .lattice_gradient import simplex_weights

_MOST_CHANNELS = 256  # at a time; of the exact filter's gradient in the features 128
# What is packed into fp16 is scaled so: its range is then used downwards.
LARGEST = 2.0**15
_FIXED = 2.0**40

Factors = tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


class DeviceFilter:
    """diag(after) K diag(before) of a batch of images; `plain` is K."""

    def __init__(self, plain: Any, method: str, before: Tensor | None = None, after: Tensor | None = None):
        self.plain, self.method, self.before, self.after = plain, method, before, after

    def __call__(self, values: Tensor) -> Tensor:
        return _scaled(self.plain(_scaled(values, self.before)), self.after)

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "DeviceFilter":
        return DeviceFilter(self.plain, self.method, before, after)

    def passes(self, values: Tensor) -> Passes:
        return passes_of(self(values))


def feature_filters(
    features: Tensor,
    method: str,
    normalization: str | None,
    tolerance: float,
    thetas: Thetas | None = None,
) -> DeviceFilter:
    """The filter of points with features [B, N, D], divided by their standard deviations.

    Differentiable in the values, twice too, and once in the features. tolerance: `build_exact`'s; thetas:
    `choose_kernels_method`'s.
    """
    features = features.float().contiguous()
    plain: _Exact | _Lattice
    method = choose_kernels_method(method, features.shape[1], thetas)
    plain = _Exact(features, tolerance) if method == "exact" else _Lattice(features)
    if normalization is None:
        return DeviceFilter(plain, method)
    sums = plain(torch.ones_like(features[..., :1])).squeeze(2)
    return DeviceFilter(plain, method, *normalizers(sums, normalization))


def grid_filters(
    size: tuple[int, int], theta: Sequence[float], method: str, normalization: str | None, like: Tensor
) -> DeviceFilter:
    """The spatial Gaussian filter of images like `like` [B, N, C]; theta is (along x, along y) in pixels.

    Exact unless the lattice is asked for by name. Differentiable in the values, any number of times.
    """
    if method == "lattice":
        places = grid_features(size, tuple(theta), like.detach().float())
        return feature_filters(places.expand(like.shape[0], -1, -1), method, normalization, 0.0)
    factors = grid_factors(size, theta, normalization, like.device)
    return DeviceFilter(_Spatial(size, tuple(theta), factors), "exact")


def grid_factors(
    size: tuple[int, int], theta: Sequence[float], normalization: str | None, device: torch.device
) -> Factors:
    """The factors before and after the spatial Gaussian, each (of columns [W], of rows [H]).

    The row sums of a product of kernels are the product of theirs, and so are all the factors.
    """
    axes = [
        normalizers(_row_sums(count, sigma, device), normalization)
        for count, sigma in zip(reversed(size), theta, strict=True)
    ]
    before, after = ([None if f is None else f.float() for f in side] for side in zip(*axes, strict=True))
    return (before[0], before[1]), (after[0], after[1])


def _row_sums(count: int, sigma: float, device: torch.device) -> Tensor:
    """float64 [count]: sums over all places p of exp(-(p - q)^2 / (2 sigma^2)), those on either side of q."""
    distance = torch.arange(count, dtype=torch.float64, device=device) / sigma
    # In integers: floating-point cumsum is not deterministic on a GPU.
    sums = ((-distance.square() / 2).exp() * _FIXED).round_().long().cumsum(0).double() / _FIXED
    return sums + sums.flip(0) - 1


class _Exact:
    def __init__(self, features: Tensor, tolerance: float):
        self.features = features if torch.is_grad_enabled() and features.requires_grad else None
        self.pairs = load_kernels().build_exact(features.detach(), tolerance)

    def __call__(self, values: Tensor) -> Tensor:
        return _ExactSums.apply(values, self.features, self.pairs)


class _ExactSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, features, pairs):
        ctx.pairs = pairs
        ctx.save_for_backward(*(() if features is None else (values, features)))
        return torch.cat([_exact_sums(pairs, part) for part in values.split(_MOST_CHANNELS, 2)], 2)

    @staticmethod
    def backward(ctx, grad):
        values, features = ctx.saved_tensors or (None, None)
        grad_values = grad_features = None
        if ctx.needs_input_grad[0]:
            grad_values = _ExactSums.apply(grad, features, ctx.pairs)
        if ctx.needs_input_grad[1]:
            grad_features = _ExactFeatureGradient.apply(grad, values, features, ctx.pairs)
        return grad_values, grad_features, None


def _exact_sums(pairs: Any, values: Tensor) -> Tensor:
    kernels = load_kernels()
    values = values.contiguous()
    tiny = torch.finfo(values.dtype).tiny
    scale = (values.abs().amax(1) / LARGEST).clamp_min(tiny)
    sums = kernels.exact_filter(pairs, kernels.exact_pack(pairs, values, scale=scale))
    return kernels.exact_unpack(pairs, sums, values.shape[2], scale=scale)


class _ExactFeatureGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, values, features, pairs):
        kernels = load_kernels()
        parts = zip(grad.split(_MOST_CHANNELS // 2, 2), values.split(_MOST_CHANNELS // 2, 2), strict=True)
        try:
            return sum(kernels.exact_grad_features(pairs, g.contiguous(), v.contiguous()) for g, v in parts)
        except RuntimeError as error:
            give_up(FAMILY, error)
        images = zip(features.detach(), values, grad, strict=True)
        return torch.stack([_feature_gradient_by_aten(*image) for image in images])

    @staticmethod
    def backward(ctx, grad):
        _once_only()


class _Lattice:
    def __init__(self, features: Tensor):
        self.lattice = load_kernels().build_permutohedral(features.detach())
        self.weights = None
        if torch.is_grad_enabled() and features.requires_grad:
            alpha = 1 / (1 + 2.0**-self.lattice.dim)
            weights = (self.lattice.weights / alpha).flatten(0, 1)
            self.weights = simplex_weights(features.flatten(0, 1), weights)

    def __call__(self, values: Tensor) -> Tensor:
        return _LatticeSums.apply(values, self.weights, self.lattice, False)


class _LatticeSums(torch.autograd.Function):
    """`weights` [B N, D + 1]: the lattice's own as a function of the features, None where nobody asks."""

    @staticmethod
    def forward(ctx, values, weights, lattice, reverse):
        kernels = load_kernels()
        ctx.lattice, ctx.reverse = lattice, reverse
        ctx.save_for_backward(*(() if weights is None else (values, weights)))
        table = kernels.permutohedral_blur(lattice, values.contiguous(), reverse=reverse)
        return kernels.permutohedral_slice(lattice, table)

    @staticmethod
    def backward(ctx, grad):
        values, weights = ctx.saved_tensors or (None, None)
        grad_values = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_values = _LatticeSums.apply(grad, weights, ctx.lattice, not ctx.reverse)
        if ctx.needs_input_grad[1]:
            grad_weights = _LatticeWeightGradient.apply(grad, values, ctx.lattice, ctx.reverse)
        return grad_values, grad_weights, None, None


class _LatticeWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, values, lattice, reverse):
        # A point takes its share of every vertex and gives the same share of its values to it.
        kernels = load_kernels()
        grad, values = grad.contiguous(), values.contiguous()
        ahead = kernels.permutohedral_blur(lattice, values, reverse=reverse)
        back = kernels.permutohedral_blur(lattice, grad, reverse=not reverse)
        grad, values = grad.flatten(0, 1), values.flatten(0, 1)
        products = [
            (grad * ahead[vertex] + values * back[vertex]).sum(1)
            for vertex in lattice.vertex.flatten(0, 1).long().unbind(1)
        ]
        return torch.stack(products, 1) / (1 + 2.0**-lattice.dim)

    @staticmethod
    def backward(ctx, grad):
        _once_only()


def _feature_gradient_by_aten(features: Tensor, values: Tensor, grad: Tensor) -> Tensor:
    """The gradient [N, D] of one image's features, in PyTorch's operations."""
    features = features.requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(AllPairsFilter(features)(values), features, grad)[0]


def _once_only() -> None:
    raise NotImplementedError(
        'features are differentiated once on our kernels; segfast.backend("aten") does so more often'
    )


class _Spatial:
    def __init__(self, size: tuple[int, int], theta: tuple[float, ...], factors: Factors):
        self.size, self.theta, self.factors = size, theta, factors

    def __call__(self, values: Tensor) -> Tensor:
        return _SpatialSums.apply(values, self.size, self.theta, *self.factors)


class _SpatialSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, size, theta, before, after):
        ctx.options = size, theta, after, before
        return load_kernels().spatial_gaussian(values.contiguous(), size, theta, before, after)

    @staticmethod
    def backward(ctx, grad):
        return _SpatialSums.apply(grad, *ctx.options), None, None, None, None


def _scaled(values: Tensor, factors: Tensor | None) -> Tensor:
    return values if factors is None else values * factors.unsqueeze(-1)
