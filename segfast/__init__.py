"""segfast: Triton kernels and drop-in `torch.nn` modules that make segmentation networks fast.

Example:
    >>> import torch, segfast
    >>> up = segfast.nn.ConvTranspose2d(64, 32, 2, stride=2, activation="relu")
    >>> up(torch.randn(1, 64, 8, 8)).shape
    torch.Size([1, 32, 16, 16])
"""

import importlib

from . import functional, nn
from ._optimize.optimize import optimize, report, restore
from ._profile.profile import profile
from .ops import (
    autotune,
    backend,
    decompositions,
    explain,
    get_backend,
    load_choices,
    save_choices,
)
from .ops._fork import compute_on_one_thread_where_forked

__version__ = "0.1.0"

compute_on_one_thread_where_forked()

__all__ = [
    "autotune",
    "backend",
    "decompositions",
    "explain",
    "functional",
    "get_backend",
    "load_choices",
    "nn",
    "optimize",
    "profile",
    "report",
    "restore",
    "save_choices",
]


def __getattr__(name: str):
    """`segfast.models` and its like: found without an import of their own, loaded only where used."""
    if name in ("crf", "data", "models", "train"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
