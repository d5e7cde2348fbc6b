"""The reasons why our kernels do not serve a call, and the filter they run where they do."""

import math

import torch
from torch import Tensor

from .. import _choice
from .._backend import EMPTY, FAILED, kernel_reason_not, use_triton
from .filters import METHODS

OPERATIONS = (
    "gaussian_filter",
    "gaussian_grad_features",
    "permutohedral_filter",
    "spatial_gaussian",
    "mean_field_update",
)
# What is known to fail by this name: what the operations compute, they compute together.
FAMILY = "dense_crf"
MOST_LABELS, MOST_FEATURES = 256, 8

# "auto" is exact up to so many pairs of pixels an image. Not measured.
_MOST_PAIRS = 2e10
# ... and up to so many pixels: the lists of tiles take 2 bytes for 128 x 64 pairs, 256 MiB an image then.
_MOST_POINTS = 2**20
_MOST_IMAGES = 65535  # of a grid's second axis


def can_use_kernels(operation: str, tensor: Tensor, labels: int, dim: int) -> bool:
    """True if `operation` runs our kernels, on values of so many labels and features of `dim` dimensions.

    Under "auto" it is enough that they are proven on this GPU. No library has these operations to be measured
    against: what runs otherwise is PyTorch's, which either computes every pair of points or sorts, searches
    and gathers the lattice in dozens of passes over memory.

    Raises:
        NotImplementedError: backend "triton" was asked for and cannot serve the call.
    """
    return use_triton(operation, reason_not, tensor, labels, dim, because="proven")


def reason_not(choice: str, tensor: Tensor, labels: int, dim: int) -> str | None:
    """None if our kernels serve the call, else why not."""
    reason = kernel_reason_not(choice, tensor)
    if reason is None and tensor.numel() == 0:
        reason = EMPTY
    if reason is None and labels > MOST_LABELS:
        reason = f"{labels} labels, the kernels take up to {MOST_LABELS}"
    if reason is None and dim > MOST_FEATURES:
        reason = f"features of {dim} dimensions, the kernels take up to {MOST_FEATURES}"
    if reason is None and tensor.shape[0] > _MOST_IMAGES:
        reason = f"{tensor.shape[0]} images, the kernels take up to {_MOST_IMAGES}"
    # The spatial term has two features, on a lattice as well.
    if reason is None and tensor.numel() // labels * (max(dim, 2) + 1) >= 2**30:
        reason = f"{tensor.numel() // labels} points of {dim} features, the kernels count below 2**30 of both"
    if reason is not None or choice == "triton":
        return reason
    if FAMILY in FAILED:
        return FAILED[FAMILY]
    return _unproven(tensor.dtype, tensor.device)


def _unproven(dtype: torch.dtype, device: torch.device) -> str | None:
    from .._proofs import proven  # which needs triton

    collected = _choice.collected()
    if collected is not None:
        collected.unproven.add((FAMILY, dtype))
    for operation in OPERATIONS:
        if not proven(operation, dtype, device):
            name = str(dtype).removeprefix("torch.")
            return f"{operation} in {name} is not proven on this GPU"
    return None


# (theta_alpha along x and y, theta_beta of each channel)
Thetas = tuple[tuple[float, ...], tuple[float, ...]]


def choose_kernels_method(method: str, points: int, thetas: Thetas | None = None) -> str:
    """ "exact" or "lattice" for the features of an image on our kernels: as asked for, or by the pairs.

    thetas: None for features of unknown origin.
    Chosen from sizes alone, so that the same call always takes the same way.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if method != "auto":
        return method
    share = 1.0 if thetas is None else kept_share(points, *thetas)
    return "exact" if points <= _MOST_POINTS and share * points**2 <= _MOST_PAIRS else "lattice"


def kept_share(points: int, theta_alpha: tuple[float, ...], theta_beta: tuple[float, ...]) -> float:
    """The share of all pairs in an RGB photograph that the exact filter computes at tolerance 1e-2, modeled.

    Fitted to means over a few color photographs each of 321^2 (theta_alpha 49 to 160, theta_beta 3 to 20),
    512^2 and 1024^2 pixels, in tiles of 128 x 64; a single photograph may be far from it. With r the ratio of
    theta_alpha to the side, 1 - exp(-57 theta_beta^0.9 (r / (1 + 4 r))^0.45 / side^1.1): a wider kernel keeps
    more, but past half the side the colors alone decide; more pixels fill the tiles more densely. Colors
    are taken for 0..255, or for 0..1 where a theta_beta is below 1, which no image of 0..255 has.
    """
    side = math.sqrt(points)
    ratio = _mean(theta_alpha) / side
    beta = _mean(theta_beta) * (255 if min(theta_beta) < 1 else 1)
    return -math.expm1(-57 * beta**0.9 * (ratio / (1 + 4 * ratio)) ** 0.45 / side**1.1)


def _mean(values: tuple[float, ...]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))
