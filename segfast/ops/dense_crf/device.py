"""Mean field on our kernels, without gradients: an iteration is its filters and one update.

Of a whole batch, and without a look at any tensor once the filters are built, so that a CUDA graph can hold
all of it. The update writes the probabilities as the next filters read them: as rows of labels in raster
order, as half-precision rows in the exact filter's order, or as the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._layout import output_format
from .._operands import load_kernels
from .backend import Thetas, can_use_kernels, choose_kernels_method
from .device_filters import LARGEST, feature_filters, grid_factors, grid_filters
from .filters import grid_features, normalizers
from .inference import Compatibility

__all__ = [
    "can_use_kernels",
    "choose_kernels_method",
    "feature_filters",
    "grid_filters",
    "mean_field_kernels",
]


def mean_field_kernels(
    unary: Tensor,
    image_features: Tensor | None,
    size: tuple[int, int],
    gamma: Sequence[float],
    iterations: int,
    bilateral_compatibility: Compatibility | None,
    spatial_compatibility: Compatibility | None,
    normalization: str | None,
    method: str,
    tolerance: float,
    bounded: bool = False,
    thetas: Thetas | None = None,
) -> Tensor:
    """`mean_field` of energies [B, L, H, W], fp32, fp16 or bf16, of any strides: their shape and dtype.

    image_features: [B, H W, D], divided by theta_alpha and theta_beta; None, as a compatibility of None, for
    no such term. gamma: the spatial term's (along x, along y). `tolerance` and `bounded` are `build_exact`'s,
    `thetas` is `choose_kernels_method`'s, by which "auto" chooses the bilateral filter; the spatial one it
    takes exact.
    """
    terms: list[Term] = []
    if image_features is not None and bilateral_compatibility is not None and iterations:
        compatibility = _prepared(bilateral_compatibility, unary)
        features, labels = image_features.float().contiguous(), unary.shape[1]
        if choose_kernels_method(method, features.shape[1], thetas) == "exact":
            terms.append(_ExactTerm(features, normalization, compatibility, tolerance, bounded, labels))
        else:
            terms.append(_LatticeTerm(features, normalization, compatibility))
    if spatial_compatibility is not None and iterations:
        compatibility = _prepared(spatial_compatibility, unary)
        if method == "lattice":
            like = torch.empty(0, dtype=torch.float32, device=unary.device)
            places = grid_features(size, tuple(gamma), like).expand(unary.shape[0], -1, -1).contiguous()
            terms.append(_LatticeTerm(places, normalization, compatibility))
        else:
            terms.append(_SpatialTerm(size, tuple(gamma), normalization, compatibility, unary.device))
    return iterate(unary, terms, iterations if terms else 0)


def iterate(unary: Tensor, terms: "Sequence[Term]", iterations: int) -> Tensor:
    """The probabilities after so many updates. Nothing is read back."""
    kernels = load_kernels()
    batch, labels, height, width = unary.shape
    format_ = output_format(unary, unary)
    output = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device, memory_format=format_)
    q = None
    if any(term.packed is None for term in terms):
        q = torch.empty((batch, height * width, labels), dtype=torch.float32, device=unary.device)
    packed = next((term.packed for term in terms if term.packed is not None), None)
    messages: tuple[Any, ...] = ()
    for _ in range(iterations):
        kernels.mean_field_update(unary, messages, q=q, packed=packed)
        messages = tuple(term.message(q) for term in terms)
    kernels.mean_field_update(unary, messages, output=output)
    return output


class _ExactTerm:
    """All pairs that count. Reads and sends rows in the order of its tiles."""

    def __init__(
        self,
        features: Tensor,
        normalization: str | None,
        compatibility: Compatibility,
        tolerance: float,
        bounded: bool,
        labels: int,
    ):
        kernels = load_kernels()
        self.pairs = kernels.build_exact(features, tolerance, bounded)
        self.compatibility = compatibility
        before = self.after = None
        if normalization is not None:
            ones = torch.ones_like(features[..., :1])
            sums = kernels.exact_filter(self.pairs, kernels.exact_pack(self.pairs, ones))
            sums = kernels.exact_unpack(self.pairs, sums, 1).squeeze(2)
            before, self.after = normalizers(sums, normalization)
        if before is not None:
            # The factors of pixels with many others like them are small: as far as can be from underflow.
            scale = before.amax(1, keepdim=True) / LARGEST
            before = before / scale
            self.after = scale.expand_as(before).contiguous() if self.after is None else self.after * scale
        # Rows that pad the tiles stay zero.
        shape = (self.pairs.padded, kernels.packed_width(labels))
        values = torch.zeros(shape, dtype=torch.float16, device=features.device)
        self.packed = kernels.Packed(values, self.pairs.rows, before)

    def message(self, q: Tensor | None) -> Any:
        kernels = load_kernels()
        sums = kernels.exact_filter(self.pairs, self.packed.values)
        return kernels.Message("gathered", sums, self.pairs.rows, None, self.after, self.compatibility)


class _LatticeTerm:
    """The permutohedral lattice of features [B, N, D]. The update slices what it sends."""

    packed = None

    def __init__(self, features: Tensor, normalization: str | None, compatibility: Compatibility):
        kernels = load_kernels()
        self.lattice = kernels.build_permutohedral(features)
        self.compatibility = compatibility
        self.before = self.after = None
        if normalization is not None:
            table = kernels.permutohedral_blur(self.lattice, torch.ones_like(features[..., :1]))
            sums = kernels.permutohedral_slice(self.lattice, table).squeeze(2)
            self.before, self.after = normalizers(sums, normalization)

    def message(self, q: Tensor | None) -> Any:
        kernels = load_kernels()
        table = kernels.permutohedral_blur(self.lattice, q, self.before)
        lattice = self.lattice
        return kernels.Message(
            "lattice", table, lattice.vertex, lattice.weights, self.after, self.compatibility
        )


class _SpatialTerm:
    """The spatial Gaussian, one axis after the other."""

    packed = None

    def __init__(
        self,
        size: tuple[int, int],
        theta: tuple[float, ...],
        normalization: str | None,
        compatibility: Compatibility,
        device: torch.device,
    ):
        self.size, self.theta, self.compatibility = size, theta, compatibility
        self.factors = grid_factors(size, theta, normalization, device)

    def message(self, q: Tensor | None) -> Any:
        kernels = load_kernels()
        values = kernels.spatial_gaussian(q, self.size, self.theta, *self.factors)
        return kernels.Message("raster", values, compatibility=self.compatibility)


Term = _ExactTerm | _LatticeTerm | _SpatialTerm


def _prepared(compatibility: Compatibility, unary: Tensor) -> Compatibility:
    """As the update takes it. A number on the device stays there, and becomes a diagonal."""
    if not isinstance(compatibility, Tensor):
        return float(compatibility)
    if compatibility.dim() == 0:
        compatibility = -compatibility.expand(unary.shape[1])
    return compatibility.detach().float().contiguous()
