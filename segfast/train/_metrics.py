"""Intersection over union, from a confusion matrix."""

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
