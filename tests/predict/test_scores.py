"""Confusion matrices and accuracies: counted pixel by pixel, and near the classes' boundaries only."""

import math

import torch

from segfast.data import IGNORE_INDEX
from segfast.train import confusion_matrix, scores
from segfast.train._metrics import near_boundary


def some_classes(height=23, width=31) -> torch.Tensor:
    """Rectangles of four classes, some of whose pixels are not scored."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(4, (height // 12 + 1, width // 12 + 1), generator=generator)
    target = coarse.repeat_interleave(12, 0).repeat_interleave(12, 1)[:height, :width].clone()
    target[torch.rand(target.shape, generator=generator) < 0.05] = IGNORE_INDEX
    return target


def test_near_a_boundary_is_another_class_within_the_distance():
    target = some_classes()
    for distance in (1, 3):
        near = near_boundary(target, distance)
        for y, row in enumerate(target.tolist()):
            for x, own in enumerate(row):
                top, left = max(0, y - distance), max(0, x - distance)
                around = target[top : y + distance + 1, left : x + distance + 1].unique().tolist()
                others = set(around) - {own, IGNORE_INDEX}
                assert bool(near[y, x]) == (own != IGNORE_INDEX and len(others) > 0), (distance, y, x)
    assert 0 < near.sum() < near.numel()


def test_scores_are_shares_of_counted_pixels():
    target = some_classes()
    prediction = target.roll(2, 1).masked_fill(target.roll(2, 1) == IGNORE_INDEX, 0)
    confusion = confusion_matrix(prediction, target, 4)
    assert confusion.dtype is torch.int64 and confusion.sum() == (target != IGNORE_INDEX).sum()
    near = near_boundary(target)
    result = scores(confusion, confusion_matrix(prediction[near], target[near], 4))
    right = (prediction == target)[target != IGNORE_INDEX]
    assert result.pixel_accuracy == right.sum().item() / right.numel()
    at_boundaries = (prediction == target)[near]
    assert result.boundary_accuracy == at_boundaries.sum().item() / at_boundaries.numel()
    assert result.boundary_accuracy < result.pixel_accuracy
    for k, iou in enumerate(result.iou.tolist()):
        both = ((prediction == k) & (target == k)).sum()
        either = ((prediction == k) | (target == k)) & (target != IGNORE_INDEX)
        assert math.isnan(iou) if not either.any() else iou == both.item() / either.sum().item()


def test_scores_of_nothing_are_not_numbers():
    result = scores(torch.zeros(2, 2, dtype=torch.int64))
    assert math.isnan(result.pixel_accuracy) and math.isnan(result.boundary_accuracy)
