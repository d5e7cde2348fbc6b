"""What users call: Gaussian filtering of points with features, and mean field of a dense CRF on images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import output_format
from .arguments import (
    check_compatibility,
    check_features,
    check_iterations,
    check_options,
    check_real,
    check_sizes,
    compute_dtype,
    positive,
)
from .filters import feature_filter, grid_features, grid_filter
from .inference import Term, compose, infer


def gaussian_filter(
    values: Tensor, features: Tensor, *, method: str = "auto", normalization: str | None = None
) -> Tensor:
    """Sums of the values of all points, weighted by how close their features are.

    `out_i = sum_j exp(-|f_i - f_j|^2 / 2) values_j`, a point's own value included. In PyTorch's operations,
    on the tensors' device, in float32 (float64 for float64); memory grows linearly with the points.

    Args:
        values: [B, C, ...]. Differentiable, twice too.
        features: [B, D, ...], the sizes after D as those after C, divided by the standard deviations.
        method: "exact" takes every pair of points. "lattice" approximates on the permutohedral lattice in
            time linear in the points; its scale is its own, so that only normalised results of the two
            compare. "auto" takes the one of less modelled cost.
        normalization: with n the filtered ones, None for the plain sum; "after" divides the result by n (a
            weighted mean), "before" the values, "symmetric" both by the root of n.

    Returns:
        The shape and dtype of values.

    Raises:
        ValueError: shapes that do not go together, features that are not finite or ask for a gradient, an
            unknown option.

    Source: Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010).

    Example:
        >>> import torch, segfast
        >>> values, features = torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 2, 2)
        >>> segfast.functional.gaussian_filter(values, features, method="exact").tolist()
        [[[4.0, 4.0]]]
    """
    if values.dim() < 3:
        raise ValueError(f"values must be [B, C, ...], got {list(values.shape)}")
    check_real(values, "values")
    check_sizes(features, values, "features")
    check_options(method, normalization)
    dtype = compute_dtype(values)
    features = check_features(features, "features", dtype)
    if values.numel() == 0:
        return values.clone()
    filtered = []
    for value, feature in zip(values.to(dtype).flatten(2), features.flatten(2), strict=True):
        kernel = feature_filter(feature.T.contiguous(), method, normalization)
        filtered.append(kernel(value.T).T)
    return torch.stack(filtered).reshape(values.shape).to(values.dtype)


def mean_field(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    iterations: int = 10,
    theta_alpha: float | Sequence[float] = 80.0,
    theta_beta: float | Sequence[float] = 13.0,
    theta_gamma: float | Sequence[float] = 3.0,
    bilateral_weight: float | Tensor = 10.0,
    spatial_weight: float | Tensor = 3.0,
    compatibility: float | Tensor = 1.0,
    normalization: str | None = "symmetric",
    method: str = "auto",
) -> Tensor:
    """Mean field in a CRF that connects every pixel with every other: the label probabilities.

    Each iteration is `Q = softmax(-unary - compatibility (bilateral_weight K_b Q + spatial_weight K_s Q))`,
    from `Q = softmax(-unary)`. K_b and K_s are normalised Gaussian kernels over (x / theta_alpha,
    y / theta_alpha, image / theta_beta) and (x / theta_gamma, y / theta_gamma), a pixel's message to itself
    included. In PyTorch's operations, on the tensors' device, in float32 (float64 for float64); memory grows
    linearly with the pixels. The defaults are those of pydensecrf's manual.

    Args:
        unary: [B, L, H, W] or [L, H, W], energies: negative log probabilities, or negated logits.
            Differentiable.
        image: [B, C, H, W] or [C, H, W], any real dtype, commonly RGB in 0..255. None: no bilateral term.
        iterations: 0 returns the softmax.
        theta_alpha, theta_gamma: standard deviations in pixels, one number or (along x, along y).
        theta_beta: standard deviations in the image's units, one number or one a channel.
        bilateral_weight, spatial_weight: one number, [L] (each label's) or [L, L] (mixed, row i to label i).
            Differentiable. The number 0 leaves the term out.
        compatibility: a number w is Potts, w for each two different labels. [L] is the diagonal, [L, L] the
            whole matrix of energies, row i what label i pays. Differentiable; a matrix need not be symmetric.
        normalization: "symmetric", "before", "after" or None, see `gaussian_filter`.
        method: "lattice", pydensecrf's own approximation; "exact", all pairs, and for the spatial term rows
            then columns, uncut; "auto", for each term the one of less modelled cost.

    Returns:
        The shape and dtype of unary; channels_last if it is.

    Raises:
        ValueError: shapes that do not go together, a theta that is not a positive number, an image that is
            not finite or asks for a gradient, NaN in unary, an unknown option.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
    Potentials" (2011); the weights of Zheng et al., "Conditional Random Fields as Recurrent Neural Networks"
    (2015).

    Example:
        >>> import torch, segfast
        >>> unary, image = torch.rand(2, 21, 16, 16), torch.randint(256, (2, 3, 16, 16))
        >>> segfast.functional.mean_field(unary, image, iterations=5).shape
        torch.Size([2, 21, 16, 16])
    """
    if unary.dim() == 3:
        image = None if image is None else image.unsqueeze(0)
        return mean_field(
            unary.unsqueeze(0),
            image,
            iterations=iterations,
            theta_alpha=theta_alpha,
            theta_beta=theta_beta,
            theta_gamma=theta_gamma,
            bilateral_weight=bilateral_weight,
            spatial_weight=spatial_weight,
            compatibility=compatibility,
            normalization=normalization,
            method=method,
        ).squeeze(0)
    if unary.dim() != 4 or unary.shape[1] == 0:
        raise ValueError(f"unary must be [B, L, H, W] or [L, H, W], got {list(unary.shape)}")
    check_real(unary, "unary")
    check_options(method, normalization)
    check_iterations(iterations)
    batch, labels, height, width = unary.shape
    dtype = compute_dtype(unary)
    alpha, gamma = positive(theta_alpha, "theta_alpha", 2), positive(theta_gamma, "theta_gamma", 2)
    shared_compatibility, bilateral, spatial = (
        check_compatibility(value, labels, name, dtype, unary.device)
        for value, name in (
            (compatibility, "compatibility"),
            (bilateral_weight, "bilateral_weight"),
            (spatial_weight, "spatial_weight"),
        )
    )
    colours = None
    if image is not None:
        check_sizes(image, unary, "image")
        beta = positive(theta_beta, "theta_beta", image.shape[1])
        colours = check_features(image, "image", dtype) / image.new_tensor(beta, dtype=dtype)[:, None, None]
    energies = unary.to(dtype)
    if energies.isnan().any():
        raise ValueError("unary holds NaN")
    if unary.numel() == 0:
        return unary.clone()

    size, like = (height, width), energies.new_empty(0)
    spatial_term = bilateral_compatibility = None
    if not _is_zero(spatial) and iterations:
        spatial_filter = grid_filter(size, gamma, method, normalization, like)
        spatial_term = Term(spatial_filter, compose(shared_compatibility, spatial))
    if colours is not None and not _is_zero(bilateral) and iterations:
        places = grid_features(size, alpha, like)
        bilateral_compatibility = compose(shared_compatibility, bilateral)
    results = []
    for i in range(batch):
        terms = [] if spatial_term is None else [spatial_term]
        if bilateral_compatibility is not None:
            assert colours is not None
            features = torch.cat([places, colours[i].flatten(1).T], 1)
            terms.append(Term(feature_filter(features, method, normalization), bilateral_compatibility))
        results.append(infer(energies[i].flatten(1).T.contiguous(), terms, iterations))
    q = torch.stack(results).reshape(batch, height, width, labels).permute(0, 3, 1, 2)
    return q.to(unary.dtype).contiguous(memory_format=output_format(unary, unary))


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
