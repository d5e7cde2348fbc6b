"""Dense CRF: Gaussian filtering, on the permutohedral lattice or exact, and mean field with it."""

from .backend import OPERATIONS
from .compute import chosen_methods
from .filters import choose_grid_method, choose_method, feature_filter, grid_features, grid_filter
from .functional import gaussian_filter, mean_field, skipped_share
from .inference import Term, infer, kl_divergence, start, step

__all__ = [
    "OPERATIONS",
    "Term",
    "choose_grid_method",
    "choose_method",
    "chosen_methods",
    "feature_filter",
    "gaussian_filter",
    "grid_features",
    "grid_filter",
    "infer",
    "kl_divergence",
    "mean_field",
    "skipped_share",
    "start",
    "step",
]
