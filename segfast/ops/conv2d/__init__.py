"""conv2d, dilated or dense, of one image or of several, and several side by side."""

from . import calls
from .autograd import forward, grad_of_input, grad_of_weight
from .concat import CONCAT
from .evidence import proofs
from .functional import OPERATIONS, conv2d, prefers_virtual_concat
from .operators import FORWARD, GRAD_INPUT, GRAD_WEIGHT
from .parallel import PARALLEL, parallel_conv2d
from .specimens import specimens

__all__ = [
    "CONCAT",
    "FORWARD",
    "GRAD_INPUT",
    "GRAD_WEIGHT",
    "OPERATIONS",
    "PARALLEL",
    "calls",
    "conv2d",
    "forward",
    "grad_of_input",
    "grad_of_weight",
    "parallel_conv2d",
    "prefers_virtual_concat",
    "proofs",
    "specimens",
]
