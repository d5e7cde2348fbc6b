"""Gaussian filtering of points with features, and mean field of a dense CRF on images: the functions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .._operator import is_traced
from . import compute, operators
from .arguments import (
    check_compatibility,
    check_iterations,
    check_not_complex,
    check_options,
    check_real,
    check_sizes,
    check_theta,
    check_tolerance,
    compute_dtype,
    rounded,
    warn_of_colors,
    warn_of_one_label,
)
from .exact import Theta
from .filters import grid_features
from .inference import compose


def gaussian_filter(
    values: Tensor,
    features: Tensor,
    *,
    method: str = "auto",
    normalization: str | None = None,
    tolerance: float = 1e-2,
) -> Tensor:
    """Sums of the values of all points, weighted by how close their features are.

    `out_i = sum_j exp(-|f_i - f_j|^2 / 2) values_j`, a point's own value included. In float32 (float64 for
    float64), under autocast too; memory grows linearly with the points, in training as well, but for the
    exact method's lists on our kernels: 2 bytes for 128 x 64 pairs, 16 MiB for 512 x 512 pixels.

    Args:
        values: [B, C, ...]. Differentiable.
        features: [B, D, ...], the sizes after D as those after C, divided by the standard deviations. Of
            float64 beside values that are not, the mean is subtracted where they are far from zero.
            Differentiable, also through n. For the lattice that is the derivative of what it computes,
            which is smooth but for the seams of its cells.
        method: "exact" takes every pair of points. "lattice" approximates on the permutohedral lattice in
            time linear in the points; its scale is its own, so that only normalized results of the two
            compare. "auto" takes the one of less modeled cost.
        normalization: with n the filtered ones, None for the plain sum; "after" divides the result by n (a
            weighted mean), "before" the values, "symmetric" both by the root of n.
        tolerance: for the exact method on our kernels, the share of its n that may be skipped of any point,
            in pairs too far apart to matter; 0 for every pair. `skipped_share` measures it. On a CPU every
            pair is computed.

    Gradients of gradients exist outside of torch.compile and torch.func, in PyTorch's operations.

    Returns:
        The shape and dtype of values.

    Raises:
        ValueError: shapes that do not go together, an unknown option, on a CPU features that are not finite.
            On a GPU, where a check would wait for them, these make the result NaN, as do on the lattice
            points that span more than 2**62 of its cells, and features so far from zero that the dtype
            cannot tell points apart, about 2**18 in float32: errors on a CPU.

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
    options = method, normalization, check_tolerance(tolerance)
    features = check_not_complex(features, "features")
    with _full_precision(values):
        features = rounded(features, compute_dtype(values))
        run = operators.gaussian_filter if _as_operator(values) else compute.gaussian_filter
        return run(values, features, *options)


def skipped_share(features: Tensor, tolerance: float = 1e-2) -> Tensor:
    """The share of each point's normalizer that `tolerance` makes the exact filter skip, measured.

    With n the sum of a point's weights over all pairs, `1 - (the sum over those computed) / n`. At most
    `tolerance`, and mostly far less. Zero on a CPU, where every pair is computed.

    Args:
        features: [B, D, ...], divided by the standard deviations: `gaussian_filter`'s. No gradient.
        tolerance: at least 0 and less than 1.

    Returns:
        [B, ...] in float32 (float64 for float64).

    Raises:
        ValueError: features that are not real or, on a CPU, not finite; a tolerance outside of its range.

    Example:
        >>> import torch, segfast
        >>> segfast.functional.skipped_share(torch.rand(1, 5, 4)).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """
    if features.dim() < 3 or features.shape[1] == 0:
        raise ValueError(f"features must be [B, D, ...], D at least 1, got {list(features.shape)}")
    tolerance = check_tolerance(tolerance)
    with torch.no_grad(), _full_precision(features):
        return compute.skipped_share(check_not_complex(features, "features"), tolerance)


def mean_field(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    iterations: int = 10,
    theta_alpha: float | Theta = 80.0,
    theta_beta: float | Theta = 13.0,
    theta_gamma: float | Theta = 3.0,
    bilateral_weight: float | Tensor = 10.0,
    spatial_weight: float | Tensor = 3.0,
    compatibility: float | Tensor = 1.0,
    normalization: str | None = "symmetric",
    method: str = "auto",
    tolerance: float = 1e-2,
) -> Tensor:
    """Mean field in a CRF that connects every pixel with every other: the label probabilities.

    Each iteration is `Q = softmax(-unary - compatibility (bilateral_weight K_b Q + spatial_weight K_s Q))`,
    from `Q = softmax(-unary)`. K_b and K_s are normalized Gaussian kernels over (x / theta_alpha,
    y / theta_alpha, image / theta_beta) and (x / theta_gamma, y / theta_gamma), a pixel's message to itself
    included. In float32 (float64 for float64), under autocast too; memory is `gaussian_filter`'s. The
    defaults are those of pydensecrf's manual.

    Args:
        unary: [B, L, H, W] or [L, H, W], energies: negative log probabilities, or negated logits.
            Differentiable.
        image: [B, C, H, W] or [C, H, W], any real dtype, commonly RGB in 0..255. None: no bilateral term.
            Differentiable.
        iterations: 0 returns the softmax.
        theta_alpha, theta_gamma: standard deviations in pixels, one number or (along x, along y).
        theta_beta: standard deviations in the image's units, one number or one a channel. Each theta may be
            a tensor, [] or of so many numbers, and is then differentiable.
        bilateral_weight, spatial_weight: one number, [L] (each label's) or [L, L] (mixed, row i to label i).
            Differentiable. The number 0 leaves the term out.
        compatibility: a number w is Potts, w for each two different labels. [L] is the diagonal, [L, L] the
            whole matrix of energies, row i what label i pays. Differentiable; a matrix need not be symmetric.
        normalization, tolerance: `gaussian_filter`'s.
        method: "lattice", pydensecrf's own approximation; "exact", all pairs, and for the spatial term rows
            then columns, uncut; "auto", for each term the one of less modeled cost.

    Returns:
        The shape and dtype of unary; channels_last if it is.

    Raises:
        ValueError: shapes that do not go together, a theta that is not positive, an unknown option, on a CPU
            an image that is not finite, NaN or -inf in unary, +inf for all labels of a pixel. On a GPU, where
            a check of a tensor would wait for it, these make the result NaN, as do thetas too small for the
            lattice: `gaussian_filter`.

    Warns:
        UserWarning: one label; on a CPU an image in 0..1 beside a theta_beta meant for 0..255.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
    Potentials" (2011); the weights of Zheng et al., "Conditional Random Fields as Recurrent Neural Networks"
    (2015).

    Example:
        >>> import torch, segfast
        >>> unary, image = torch.rand(2, 21, 16, 16), torch.randint(256, (2, 3, 16, 16))
        >>> segfast.functional.mean_field(unary, image, iterations=5).shape
        torch.Size([2, 21, 16, 16])
    """
    if unary.dim() not in (3, 4) or unary.shape[-3] == 0:
        raise ValueError(f"unary must be [B, L, H, W] or [L, H, W], got {list(unary.shape)}")
    check_real(unary, "unary")
    check_options(method, normalization)
    check_iterations(iterations)
    tolerance = check_tolerance(tolerance)
    warn_of_one_label(unary.shape[-3])
    single = unary.dim() == 3
    if single and image is not None and image.dim() != 3:
        raise ValueError(f"image must be [C, H, W] beside a unary [L, H, W], got {list(image.shape)}")
    if single:
        unary, image = unary.unsqueeze(0), None if image is None else image.unsqueeze(0)
    size = unary.shape[2], unary.shape[3]
    like = unary.new_empty(0, dtype=compute_dtype(unary))
    alpha, gamma = (
        check_theta(value, name, 2, like)
        for value, name in ((theta_alpha, "theta_alpha"), (theta_gamma, "theta_gamma"))
    )
    shared, bilateral, spatial = (
        check_compatibility(value, unary.shape[1], name, like.dtype, unary.device)
        for value, name in (
            (compatibility, "compatibility"),
            (bilateral_weight, "bilateral_weight"),
            (spatial_weight, "spatial_weight"),
        )
    )
    with _full_precision(unary):
        features, thetas = None, None
        if image is not None:
            check_sizes(image, unary, "image", "C")
            beta = check_theta(theta_beta, "theta_beta", image.shape[1], like)
            image = check_not_complex(image, "image")
            warn_of_colors(image, beta, "image", "theta_beta")
            if iterations and not _is_zero(bilateral):
                if not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
                    thetas = tuple(alpha), tuple(beta)
                features = _features(image, size, alpha, beta, like)
        crf = compute.Crf(
            features,
            None if features is None else compose(shared, bilateral),
            None if _is_zero(spatial) or not iterations else compose(shared, spatial),
            gamma,
            iterations,
            normalization,
            method,
            tolerance,
            image is not None and image.dtype == torch.uint8,
            thetas,
        )
        run = operators.mean_field if _as_operator(unary) else compute.mean_field
        q = run(unary, crf)
    return q.squeeze(0) if single else q


def _features(image: Tensor, size: tuple[int, int], alpha: Theta, beta: Theta, like: Tensor) -> Tensor:
    """[B, H W, 2 + C]: places over alpha beside colors over beta."""
    least = beta.detach().amin() if isinstance(beta, Tensor) else min(beta)
    colors = rounded(image, like.dtype, least).flatten(2).transpose(1, 2)
    if isinstance(beta, Tensor) or len(set(beta)) == 1:
        colors = colors / (beta if isinstance(beta, Tensor) else beta[0])
    else:
        # Not by a new tensor of numbers: while a CUDA graph is captured, none comes from the host.
        colors = torch.stack([c / b for c, b in zip(colors.unbind(2), beta, strict=True)], 2)
    places = grid_features(size, alpha, like)
    return torch.cat([places.expand(image.shape[0], -1, -1), colors], 2)


def _as_operator(tensor: Tensor) -> bool:
    return is_traced() or tensor.is_meta or is_fake(tensor)


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    """Out of autocast, which would filter in 16 bits."""
    kind = tensor.device.type
    # Meta has no autocast. An exporter would make a function of its own of what a context holds.
    casts = not tensor.is_meta and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casts else nullcontext()


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
