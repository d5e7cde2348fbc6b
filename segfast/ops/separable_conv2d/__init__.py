"""Depthwise and separable convolution: operators, autograd, and the functionals."""

from . import calls
from .functional import OPERATIONS, depthwise_conv2d, separable_conv2d
from .fused import SEPARABLE, separable
from .operators import DEPTHWISE_CONV2D, STATISTICS, forward_with_statistics

__all__ = [
    "DEPTHWISE_CONV2D",
    "OPERATIONS",
    "SEPARABLE",
    "STATISTICS",
    "calls",
    "depthwise_conv2d",
    "forward_with_statistics",
    "separable",
    "separable_conv2d",
]
