"""Intersection over union, from a confusion matrix; RMSE and R2 of real values."""

from typing import NamedTuple

import torch
from torch import Tensor

from segfast.data import IGNORE_INDEX


class Scores(NamedTuple):
    """IoU of each class, float64 `[K]` (NaN: neither present nor predicted), and the mean of the others."""

    iou: Tensor
    miou: float


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts, int64 `[K, K]`: row = true class, column = predicted; pixels of target 255 are left out."""
    scored = target != IGNORE_INDEX
    index = num_classes * target[scored] + prediction[scored]
    return torch.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: Tensor) -> Scores:
    """IoU = true positives / (true positives + false positives + false negatives).

    >>> scores(torch.tensor([[2, 1], [1, 4]])).iou.tolist()
    [0.5, 0.6666666666666666]
    """
    confusion = confusion.double()
    hit = confusion.diagonal()
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    return Scores(iou, iou.nanmean().item())


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
