"""The functions of the dense CRF on checked arguments: on our kernels, or in PyTorch's operations.

Differentiable by autograd. What users call, and the registered operators, are these.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import get_backend
from .._fallback import falls_back
from .._layout import output_format
from .._operator import is_traced
from .._threads import each_image, on_threads
from . import device
from .arguments import check_energies, check_finite, compute_dtype
from .backend import FAMILY, Thetas, reason_not
from .exact import Theta
from .filters import (
    Filter,
    choose_grid_method,
    choose_method,
    feature_filter,
    grid_features,
    grid_filter,
)
from .inference import Compatibility, Term, infer, unroll


@falls_back(FAMILY)
def gaussian_filter(
    values: Tensor, features: Tensor, method: str, normalization: str | None, tolerance: float
) -> Tensor:
    """values [B, C, ...] and features [B, D, ...] to the shape and dtype of values."""
    dtype = compute_dtype(values)
    check_finite(features, "features must be finite")
    if values.numel() == 0:
        return _empty(values, features)
    rows, points = (t.to(dtype).flatten(2).transpose(1, 2).contiguous() for t in (values, features))
    if device.can_use_kernels("gaussian_filter", rows, rows.shape[2], points.shape[2]):
        filtered = device.feature_filters(points, method, normalization, tolerance)(rows)
    else:
        filtered = torch.stack(
            [
                feature_filter(point, method, normalization)(row)
                for row, point in zip(rows, points, strict=True)
            ]
        )
    result = filtered.transpose(1, 2).reshape(values.shape).to(values.dtype)
    return result.contiguous(memory_format=format_of(values))


def _empty(tensor: Tensor, *others: object) -> Tensor:
    """The result for no values: what asks for gradients gets zeros."""
    result = tensor.clone(memory_format=format_of(tensor))
    for other in others:
        if isinstance(other, Tensor) and needs_gradient(other):
            result = result + 0 * other.sum()
    return result


def format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last of images that are so."""
    return output_format(tensor, tensor) if tensor.dim() == 4 else torch.contiguous_format


# No farther from their mean, features fit the float16 operands of the exact kernel.
_FLOAT16_SPAN = 100


class Crf(NamedTuple):
    """A dense CRF beside its unaries: what mean field computes with."""

    features: Tensor | None  # [B, H W, D] of the bilateral term
    bilateral: Compatibility | None  # the terms' energies, None for no such term
    spatial: Compatibility | None
    gamma: Theta  # (along x, along y), of the spatial term
    iterations: int
    normalization: str | None
    method: str
    tolerance: float
    eight_bit: bool  # the image's colors are integers in 0..255
    thetas: Thetas | None  # theta_alpha and theta_beta, if numbers

    def is_bounded(self, size: tuple[int, int]) -> bool:
        """True if the features are known, without a look at them, to span little enough for float16."""
        if not self.eight_bit or self.thetas is None:
            return False
        alpha, beta = self.thetas
        places = (n / sigma for n, sigma in zip(reversed(size), alpha, strict=True))
        return math.hypot(*places, *(255 / sigma for sigma in beta)) < _FLOAT16_SPAN


@falls_back(FAMILY)
def mean_field(unary: Tensor, crf: Crf) -> Tensor:
    """The probabilities of energies [B, L, H, W], in their shape and dtype; channels_last if they are."""
    check_energies(unary, 1, "unary")
    dim = 0
    if crf.features is not None:
        check_finite(crf.features, "image must be finite, and be so divided by its theta")
        dim = crf.features.shape[2]
    memory_format = format_of(unary)
    if unary.numel() == 0:
        return _empty(unary, crf.features, crf.bilateral, crf.spatial, crf.gamma)
    batch, labels, height, width = unary.shape
    learns = needs_gradient(unary, crf.features, crf.bilateral, crf.spatial, crf.gamma)
    kernels = device.can_use_kernels("mean_field", unary, labels, dim)
    if kernels and not learns and not isinstance(crf.gamma, Tensor):
        return device.mean_field_kernels(
            unary,
            crf.features,
            (height, width),
            crf.gamma,
            crf.iterations,
            crf.bilateral,
            crf.spatial,
            crf.normalization,
            crf.method,
            crf.tolerance,
            crf.is_bounded((height, width)),
            crf.thetas,
        )
    energies = unary.to(compute_dtype(unary)).flatten(2).transpose(1, 2).contiguous()
    run = _on_kernels if kernels else _image_by_image
    q = run(energies, (height, width), crf, learns or is_traced()).reshape(batch, height, width, labels)
    return q.permute(0, 3, 1, 2).to(unary.dtype).contiguous(memory_format=memory_format)


def chosen_methods(unary: Tensor, channels: int, thetas: Thetas | None = None) -> tuple[str, str]:
    """The methods that "auto" takes for an image of so many channels, and for the spatial term."""
    labels, height, width = unary.shape[-3:]
    choice, dim = get_backend(), channels + 2
    if choice == "aten" or reason_not(choice, unary, labels, dim) is not None:
        return choose_method("auto", height * width, dim), choose_grid_method("auto", (height, width))
    return device.choose_kernels_method("auto", height * width, thetas), "exact"


def _image_by_image(energies: Tensor, size: tuple[int, int], crf: Crf, unrolls: bool) -> Tensor:
    """Probabilities [B, N, L] in PyTorch's operations, each image for itself."""
    options = crf.method, crf.normalization
    shared = []
    if crf.spatial is not None:
        shared.append(Term(grid_filter(size, crf.gamma, *options, energies.new_empty(0)), crf.spatial))

    def one(i: int) -> Tensor:
        terms = shared[:]
        if crf.features is not None:
            assert crf.bilateral is not None
            terms.append(Term(feature_filter(crf.features[i], *options), crf.bilateral))
        return (unroll if unrolls else infer)(energies[i], terms, crf.iterations)

    images = energies.shape[0]
    if unrolls:
        return torch.stack([one(i) for i in range(images)])
    return torch.stack(on_threads(energies, lambda: each_image(one, images)))


def _on_kernels(energies: Tensor, size: tuple[int, int], crf: Crf, unrolls: bool) -> Tensor:
    """The same on our kernels for the whole batch, differentiable."""
    options = crf.method, crf.normalization
    terms = []
    if crf.spatial is not None:
        spatial: Filter
        if not isinstance(crf.gamma, Tensor):
            spatial = device.grid_filters(size, crf.gamma, *options, energies)
        elif crf.method == "lattice":
            places = grid_features(size, crf.gamma, energies).expand(energies.shape[0], -1, -1)
            spatial = device.feature_filters(places, *options, crf.tolerance)
        else:
            # The kernel's width is a number of the host's; reading the tensor would wait for the GPU.
            spatial = grid_filter(size, crf.gamma, "exact", crf.normalization, energies)
        terms.append(Term(spatial, crf.spatial))
    if crf.features is not None:
        assert crf.bilateral is not None
        bilateral = device.feature_filters(crf.features, *options, crf.tolerance, crf.thetas)
        terms.append(Term(bilateral, crf.bilateral))
    return unroll(energies, terms, crf.iterations)


@falls_back(FAMILY)
def skipped_share(features: Tensor, tolerance: float) -> Tensor:
    """[B, ...] of features [B, D, ...]: of each point's normalizer, the share that `tolerance` skips."""
    check_finite(features, "features must be finite")
    share = features.new_zeros(features.shape[:1] + features.shape[2:], dtype=compute_dtype(features))
    points = features.to(share.dtype).flatten(2).transpose(1, 2).contiguous()
    ones = torch.ones_like(points[..., :1])
    if points.numel() == 0 or not (device.can_use_kernels("gaussian_filter", ones, 1, points.shape[2])):
        return share  # every pair is computed
    kept, all_pairs = (
        device.feature_filters(points, "exact", None, skips)(ones) for skips in (tolerance, 0.0)
    )
    return (1 - kept / all_pairs).clamp_min(0).reshape(share.shape)


def needs_gradient(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
