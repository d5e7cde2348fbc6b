"""Dense CRF: Gaussian filtering of points, exact or on the permutohedral lattice; the spatial Gaussian of
images; the mean-field update.
"""

from .exact import ExactPairs, build_exact, exact_filter
from .grad_features import exact_grad_features
from .lattice_build import Permutohedral, build_permutohedral
from .lattice_filter import permutohedral_blur, permutohedral_slice
from .pack import exact_pack, exact_unpack, is_split, packed_width
from .spatial import spatial_gaussian
from .update import Message, Packed, mean_field_update

__all__ = [
    "ExactPairs",
    "Message",
    "Packed",
    "Permutohedral",
    "build_exact",
    "build_permutohedral",
    "exact_filter",
    "exact_grad_features",
    "exact_pack",
    "exact_unpack",
    "is_split",
    "mean_field_update",
    "packed_width",
    "permutohedral_blur",
    "permutohedral_slice",
    "spatial_gaussian",
]
