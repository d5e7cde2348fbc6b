"""Transposed convolution: operators, autograd, the functional, and the U-Net step that concatenates."""

from . import calls
from .functional import OPERATIONS, conv_transpose2d
from .operators import CONV_TRANSPOSE2D
from .up_concat import UP_CONCAT, up_concat

__all__ = [
    "CONV_TRANSPOSE2D",
    "OPERATIONS",
    "UP_CONCAT",
    "calls",
    "conv_transpose2d",
    "up_concat",
]
