"""Depthwise and separable convolution: operators, autograd, and the functionals."""

from . import calls
from .autograd import forward, forward_with_statistics, grad_of_input, grad_of_weight
from .evidence import proofs
from .functional import OPERATIONS, depthwise_conv2d, separable_conv2d
from .fused import SEPARABLE, separable
from .operators import FORWARD, GRAD_INPUT, GRAD_WEIGHT, STATISTICS
from .specimens import specimens

__all__ = [
    "FORWARD",
    "GRAD_INPUT",
    "GRAD_WEIGHT",
    "OPERATIONS",
    "SEPARABLE",
    "STATISTICS",
    "calls",
    "depthwise_conv2d",
    "forward",
    "forward_with_statistics",
    "grad_of_input",
    "grad_of_weight",
    "proofs",
    "separable",
    "separable_conv2d",
    "specimens",
]
