"""The registered operators: checks, shapes, autograd, choice of backend. Users call `segfast.functional`."""

from . import conv2d, conv_transpose2d, dense_crf, packed_pool2d, segmentation_head, separable_conv2d
from ._backend import backend, explain, get_backend
from ._choice import autotune
from ._choice_files import load_choices, save_choices
from ._operator import OPERATORS, decompositions

# Operator families bear the same file name in kernels/, segfast/ops/, segfast/nn/, tests/ and benchmarks/.
FAMILIES = (
    "conv_transpose2d",
    "separable_conv2d",
    "conv2d",
    "packed_pool2d",
    "segmentation_head",
    "dense_crf",
)

__all__ = [
    "FAMILIES",
    "OPERATORS",
    "autotune",
    "backend",
    "conv2d",
    "conv_transpose2d",
    "decompositions",
    "dense_crf",
    "explain",
    "get_backend",
    "load_choices",
    "packed_pool2d",
    "save_choices",
    "segmentation_head",
    "separable_conv2d",
]
