"""The segmentation head: cross-entropy, dice loss and labels of logits that are upsampled on the way."""

from . import calls
from .functional import (
    OPERATIONS,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_dice,
)
from .operators import ARGMAX, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, DICE_SUMS, DICE_SUMS_BACKWARD

__all__ = [
    "ARGMAX",
    "CROSS_ENTROPY",
    "CROSS_ENTROPY_BACKWARD",
    "DICE_SUMS",
    "DICE_SUMS_BACKWARD",
    "OPERATIONS",
    "calls",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_dice",
]
