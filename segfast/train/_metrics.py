"""Intersection over union and accuracies, from confusion matrices; RMSE and R2 of real values."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast.data import IGNORE_INDEX


class Scores(NamedTuple):
    """How good classes are; 1 is perfect.

    `iou` of each class is float64 `[K]` (NaN: neither present nor predicted), `miou` the mean of the others.
    `pixel_accuracy` is the share of the pixels that are right, `boundary_accuracy` that of the pixels near a
    boundary (see `near_boundary`; NaN: there are none). `confusion` is int64 `[K, K]`, as `confusion_matrix`.
    """

    iou: Tensor
    miou: float
    pixel_accuracy: float
    boundary_accuracy: float
    confusion: Tensor


# How far from another class's pixel one is near a boundary, in pixels.
BOUNDARY = 3


def near_boundary(target: Tensor, distance: int = BOUNDARY) -> Tensor:
    """The pixels whose class is not the only one within `distance` rows and columns, bool `[H, W]`.

    Pixels of target 255 make no boundary. Such a trimap is what Kohli et al. score, "Robust Higher Order
    Potentials for Enforcing Label Consistency" (IJCV 2009).

    >>> near_boundary(torch.tensor([[0, 0, 0, 1, 1]]), 1).tolist()
    [[False, False, True, True, False]]
    """
    ignored = target == IGNORE_INDEX
    planes = torch.stack((target.masked_fill(ignored, -1), -target.masked_fill(ignored, IGNORE_INDEX)))
    largest, smallest = F.max_pool2d(planes[None].float(), 2 * distance + 1, 1, distance)[0]
    return (largest > -smallest) & ~ignored


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts, int64 `[K, K]`: row = true class, column = predicted; pixels of target 255 are left out."""
    scored = target != IGNORE_INDEX
    index = num_classes * target[scored] + prediction[scored]
    return torch.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: Tensor, boundary: Tensor | None = None) -> Scores:
    """IoU = true positives / (true positives + false positives + false negatives), and the other scores.

    Args:
        confusion: of all pixels, as `confusion_matrix`.
        boundary: of those near a boundary; None if they are not known.

    >>> scores(torch.tensor([[2, 1], [1, 4]])).iou.tolist()
    [0.5, 0.6666666666666666]
    """
    counts = confusion.double()
    hit = counts.diagonal()
    iou = hit / (counts.sum(0) + counts.sum(1) - hit)
    right, right_near = (
        float("nan") if m is None or not m.sum() else m.diagonal().sum().item() / m.sum().item()
        for m in (confusion, boundary)
    )
    return Scores(iou, iou.nanmean().item(), right, right_near, confusion)


class RegressionScores(NamedTuple):
    """The root of the mean squared error, in the target's units, and the share of its variance explained.

    `r2` is 1 for a perfect prediction, 0 for the target's mean, NaN for a target that does not vary.
    """

    rmse: float
    r2: float


def regression_scores(prediction: Tensor, target: Tensor) -> RegressionScores:
    """RMSE and R2 of real values of one shape, in float64; where the target is NaN, it is left out.

    Raises:
        ValueError: other shapes.

    >>> regression_scores(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0]))
    RegressionScores(rmse=0.816496580927726, r2=0.75)
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, "
            f"got {list(prediction.shape)} and {list(target.shape)}"
        )
    known = ~target.isnan()
    truth = target[known].double()
    squares = (prediction[known].double() - truth).square()
    spread = (truth - truth.mean()).square().sum()
    r2 = 1 - squares.sum() / spread if spread > 0 else torch.tensor(float("nan"))
    return RegressionScores(squares.mean().sqrt().item(), r2.item())
