"""segfast: Triton kernels and drop-in `torch.nn` modules that make segmentation networks fast.

Example:
    >>> import torch, segfast
    >>> up = segfast.nn.ConvTranspose2d(64, 32, 2, stride=2, activation="relu")
    >>> up(torch.randn(1, 64, 8, 8)).shape
    torch.Size([1, 32, 16, 16])
"""

import importlib
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


class _CheckoutFinder:
    """Finds `segfast.kernels` in the checkout's `kernels/` where the link to it was lost (sdist, Windows)."""

    def find_spec(self, name, path=None, target=None):
        folder = Path(__file__).parent.parent / "kernels"
        if name != "segfast.kernels" or not (folder / "_launch.py").exists():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not (Path(__file__).parent / "kernels" / "__init__.py").exists():
    sys.meta_path.append(_CheckoutFinder())

from . import functional, nn  # noqa: E402
from ._optimize.optimize import optimize, report, restore  # noqa: E402
from .ops import (  # noqa: E402
    autotune,
    backend,
    decompositions,
    explain,
    get_backend,
    load_choices,
    save_choices,
)
from .ops._fork import compute_on_one_thread_where_forked  # noqa: E402

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
    "report",
    "restore",
    "save_choices",
]


def __getattr__(name: str):
    """`segfast.models` and its like: found without an import of their own, loaded only where used."""
    if name in ("crf", "data", "models", "train"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
