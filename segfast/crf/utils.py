"""`pydensecrf.utils` by the same names: unary energies, and features of pairwise terms, as NumPy arrays."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..ops.dense_crf.arguments import far_offset, positive

Array = NDArray[np.float32]


def as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """As NumPy has it.

    Raises:
        ValueError: a tensor that NumPy cannot take: one that requires grad, is bfloat16 or on another device.
    """
    if isinstance(values, torch.Tensor):
        if values.requires_grad:
            raise ValueError(
                f"{name} requires grad, and there are no gradients here: pass {name}.detach(), or call "
                "segfast.functional.mean_field, which has them"
            )
        if values.dtype == torch.bfloat16:
            raise ValueError(f"{name} is bfloat16, which NumPy does not have: pass {name}.float()")
        if not values.is_cpu:
            raise ValueError(f"{name} is on {values.device}, arrays come from the CPU: pass {name}.cpu()")
    return np.asarray(values)


def unary_from_labels(labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> Array:
    """Energies [n_labels, points] of labels of which each is right with probability gt_prob.

    Args:
        labels: integers of any shape, or a mask of bools, which count as 0 and 1. With zero_unsure, 0 says
            nothing of its point and the labels are 1..n_labels; else they are 0..n_labels - 1.
        gt_prob: between 0 and 1; the rest is spread over the other labels.

    Raises:
        ValueError: a label or a probability out of range.

    Example:
        >>> from segfast.crf.utils import unary_from_labels
        >>> unary_from_labels([[0, 1, 2]], 2, gt_prob=0.5).shape
        (2, 3)
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be between 0 and 1, got {gt_prob!r}")
    if n_labels < 2:
        raise ValueError(f"n_labels must be at least 2, got {n_labels!r}")
    flat = as_array(labels, "labels").flatten()
    if flat.dtype == bool:
        flat = flat.astype(np.uint8)
    highest = n_labels if zero_unsure else n_labels - 1
    if not np.issubdtype(flat.dtype, np.integer) or (
        flat.size and not 0 <= flat.min() <= flat.max() <= highest
    ):
        raise ValueError(
            f"labels must be integers in 0..{highest}, got {flat.dtype}: {np.unique(flat)[:8]}..."
        )
    label = flat.astype(np.int64)
    energy = np.full((n_labels, label.size), -np.log((1.0 - gt_prob) / (n_labels - 1)), np.float32)
    energy[label - 1 if zero_unsure else label, np.arange(label.size)] = -np.log(gt_prob)
    if zero_unsure:
        energy[:, label == 0] = -np.log(1.0 / n_labels)
    return energy


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> Array:
    """The old name of `unary_from_labels`."""
    warnings.warn("compute_unary is deprecated, use unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5) -> Array:
    """Energies [labels, points] of probabilities [labels, ...].

    Args:
        scale: in (0, 1], mixes the probabilities with equal ones: scale * sm + (1 - scale) / labels.
        clip: the least probability; None clips none, and a probability of 0 becomes infinite energy.

    Raises:
        ValueError: a scale out of range.
    """
    probabilities = as_array(sm, "sm")
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be in (0, 1], got {scale!r}")
        probabilities = scale * probabilities + (1 - scale) / len(probabilities)
    if clip is not None:
        probabilities = np.clip(probabilities, clip, 1.0)
    return -np.log(probabilities).reshape(len(probabilities), -1).astype(np.float32)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> Array:
    """The old form of `unary_from_softmax`, which clips nothing."""
    warnings.warn("softmax_to_unary is deprecated, use unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> Array:
    """Features [D, points] of the places of an array of D dimensions; sdims are the standard deviations.

    Raises:
        ValueError: a standard deviation that is not a positive number, or not one a dimension.
    """
    sigmas = positive(sdims, "sdims", len(shape))
    places = np.indices(shape, np.float32)
    return np.stack([axis / np.float32(s) for axis, s in zip(places, sigmas, strict=True)]).reshape(
        len(sigmas), -1
    )


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: float | Sequence[float], img: ArrayLike, chdim: int = -1
) -> Array:
    """Features [D + C, points] of the places and the channels of an image of D dimensions.

    Args:
        sdims: the standard deviations of the D places.
        schan: those of the C channels, or one for all.
        chdim: the image's axis of channels; -1 where it has none.

    Raises:
        ValueError: a standard deviation that is not a positive number, or the wrong number of them.
    """
    image = as_array(img, "img")
    channels = image[None] if chdim == -1 else np.moveaxis(image, chdim, 0)
    sigmas = positive(schan, "schan", len(channels))
    exact = torch.from_numpy(channels.astype(np.float64))
    shift = far_offset(exact, tuple(range(1, exact.dim())), min(sigmas))
    channels = (exact - shift).float().numpy()
    scaled = np.stack([channel / np.float32(s) for channel, s in zip(channels, sigmas, strict=True)])
    places = create_pairwise_gaussian(sdims, channels.shape[1:])
    return np.concatenate([places, scaled.reshape(len(sigmas), -1)])
