"""Transposed convolution: operators, autograd, the functional, and the U-Net step that concatenates."""

from . import calls
from .autograd import forward, grad_of_input, grad_of_weight
from .functional import OPERATIONS, conv_transpose2d
from .operators import FORWARD, GRAD_INPUT, GRAD_WEIGHT
from .up_concat import UP_CONCAT, up_concat

__all__ = [
    "FORWARD",
    "GRAD_INPUT",
    "GRAD_WEIGHT",
    "OPERATIONS",
    "UP_CONCAT",
    "calls",
    "conv_transpose2d",
    "forward",
    "grad_of_input",
    "grad_of_weight",
    "up_concat",
]
