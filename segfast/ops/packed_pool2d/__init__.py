"""Max pooling of 2x2 windows with indices of 2 bits, and the unpooling by them."""

from . import calls
from .functional import OPERATIONS, packed_max_pool2d, packed_max_unpool2d
from .operators import POOL, UNPOOL, UNPOOL_BACKWARD

__all__ = [
    "OPERATIONS",
    "POOL",
    "UNPOOL",
    "UNPOOL_BACKWARD",
    "calls",
    "packed_max_pool2d",
    "packed_max_unpool2d",
]
