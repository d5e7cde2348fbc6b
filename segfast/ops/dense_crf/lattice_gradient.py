"""The lattice's filter as a function of the features too: the exact derivative of what is computed.

Inside a simplex the barycentric weights, by which a point is splatted and sliced, are linear in its features,
and its vertices stay. The filter is thus piecewise smooth in the features, and continuous at the seams.
"""

import copy
import math

import torch
from torch import Tensor

from .chunks import Passes, passes_of
from .exact import scale
from .lattice import Lattice, LatticeFilter
from .simplices import simplices


class FeatureLatticeFilter:
    """`LatticeFilter` of features [N, D], differentiable, twice too, in them and all else."""

    method = "lattice"

    def __init__(self, features: Tensor):
        lattice = Lattice(features.detach())
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self._plain = LatticeFilter(lattice)
        self._weights = simplex_weights(features, lattice.weights)

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "FeatureLatticeFilter":
        other = copy.copy(self)
        other.before, other.after = before, after
        return other

    def __call__(self, values: Tensor) -> Tensor:
        return scale(_Filter.apply(scale(values, self.before), self._weights, self._plain), self.after)

    def passes(self, values: Tensor) -> Passes:
        return passes_of(self(values))


def simplex_weights(features: Tensor, weights: Tensor) -> Tensor:
    """The barycentric weights [N, D + 1] of features [N, D], given, as a function of them."""
    return _Weights.apply(features, weights)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weights):
        ctx.save_for_backward(features)
        return weights.detach()

    @staticmethod
    def backward(ctx, grad):
        # Linear in `grad`, and in differentiable operations. The weight of remainder r is the coordinate of
        # rank D - r less that of the next rank, both in units of D + 1.
        (features,) = ctx.saved_tensors
        dim = features.shape[1]
        rank = simplices(features.detach())[1].T
        elevated = (grad - grad.roll(-1, 1)).gather(1, dim - rank) / (dim + 1)
        # Coordinate i of the elevated point: the scaled features from i on, less i times the one before.
        # (Not by cumsum, which is not deterministic on a GPU.)
        columns, total = [], torch.zeros_like(elevated[:, 0])
        for i in range(1, dim + 1):
            total = total + elevated[:, i - 1]
            spread = math.sqrt(2 / 3) * (dim + 1) / math.sqrt(i * (i + 1))
            columns.append((total - i * elevated[:, i]) * spread)
        return torch.stack(columns, 1), None


class _Filter(torch.autograd.Function):
    """`LatticeFilter`, as a function of the values [N, C] and the weights [N, D + 1] that its lattice has."""

    @staticmethod
    def forward(ctx, values, weights, plain):
        ctx.plain = plain
        ctx.save_for_backward(values, weights)
        return plain.compute(values)

    @staticmethod
    def backward(ctx, grad):
        values, weights = ctx.saved_tensors
        plain, reverse = ctx.plain, ctx.plain.reverse
        grad_values = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_values = _Filter.apply(grad, weights, plain.transposed)
        if ctx.needs_input_grad[1]:
            ahead = _table(plain.lattice, values, weights, reverse)
            back = _table(plain.lattice, grad, weights, not reverse)
            products = [
                (grad * ahead[vertex] + values * back[vertex]).sum(1) for vertex in _vertices(plain.lattice).T
            ]
            grad_weights = torch.stack(products, 1) / (1 + 2.0**-plain.lattice.dim)
        return grad_values, grad_weights, None


def _vertices(lattice: Lattice) -> Tensor:
    """[N, D + 1]: the rows of the table where the points' vertices are."""
    return lattice.slice.rows.reshape(-1, lattice.dim + 1).long()


def _table(lattice: Lattice, values: Tensor, weights: Tensor, reverse: bool) -> Tensor:
    """The values splatted and blurred, one row a vertex; differentiable where gradients are on."""
    differentiable = torch.is_grad_enabled()
    if differentiable:
        table = values.new_zeros(lattice.vertices + 1, values.shape[1])
        for vertex, weight in zip(_vertices(lattice).T, weights.T, strict=True):
            table = table.index_add(0, vertex, values * weight[:, None])
    else:
        table = lattice.splat.sum(values.contiguous(), weights.flatten()[lattice.order])
    for blur in reversed(lattice.blurs) if reverse else lattice.blurs:
        if differentiable:
            own, after, before = blur.rows.reshape(-1, 3).T
            table = table[own] + 0.5 * (table[after] + table[before])
        else:
            table = blur.sum(table, lattice.blur_weights)
    return table
