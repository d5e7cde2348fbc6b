"""conv2d, dilated or dense, of one image or of several, and several side by side."""

from . import calls
from .concat import CONCAT
from .functional import OPERATIONS, conv2d, prefers_virtual_concat
from .operators import CONV2D
from .parallel import PARALLEL, parallel_conv2d

__all__ = [
    "CONCAT",
    "CONV2D",
    "OPERATIONS",
    "PARALLEL",
    "calls",
    "conv2d",
    "parallel_conv2d",
    "prefers_virtual_concat",
]
