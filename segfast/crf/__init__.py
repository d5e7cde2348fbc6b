"""`pydensecrf.densecrf` on segfast: `import segfast.crf as dcrf` for `import pydensecrf.densecrf as dcrf`.

The classes, methods, argument names and NumPy conventions are pydensecrf's; results are NumPy arrays where it
has matrices of its own. Beyond it: the argument `method`, arrays of any real dtype and layout, `map`, and
errors where it crashes. It computes on torch's default device: `with torch.device("cuda"):` around a script
is all that a GPU takes. `segfast.functional.mean_field` is the same in PyTorch, with gradients and batches.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..ops import dense_crf
from ..ops.dense_crf.arguments import (
    check_compatibility,
    check_count,
    check_energies,
    check_features,
    check_iterations,
    check_options,
    check_tolerance,
    far_offset,
    positive,
    warn_of_colors,
    warn_of_one_label,
)
from ..ops.dense_crf.backend import Thetas, can_use_kernels, choose_kernels_method
from ..ops.dense_crf.chunks import Passes, passes_of
from ..ops.dense_crf.device_filters import DeviceFilter, feature_filters, grid_filters
from ..ops.dense_crf.filters import Filter, normalized
from . import utils


class KernelType(IntEnum):
    """The parameters of a kernel that learning would change; inference is the same with each."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """On which side of a kernel its row sums are divided out."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType
_NAMES = (None, "before", "after", "symmetric")


class Unary:
    """The argument of `DenseCRF.setUnary`: energies [labels, points]."""

    energy: Tensor


class ConstUnary(Unary):
    """Energies [labels, points] as they are."""

    def __init__(self, u: ArrayLike):
        self.energy = _tensor(u, "u", 2)


class LogisticUnary(Unary):
    """Energies L f: L [labels, K] applied to the features f [K, points]."""

    def __init__(self, L: ArrayLike, f: ArrayLike):
        weights, features = _tensor(L, "L", 2), _tensor(f, "f", 2)
        if weights.shape[1] != features.shape[0]:
            raise ValueError(
                "L must be [labels, K] and f [K, points], "
                f"got {list(weights.shape)} and {list(features.shape)}"
            )
        self.energy = weights @ features


class DenseCRF:
    """A CRF whose points are all connected, in any number of dimensions.

    Args:
        nvar: the number of points.
        nlabels: the number of labels.
        method: "lattice", pydensecrf's own approximation and numbers; "exact", all pairs; "auto", for each
            term the one of less modeled cost. The repr says which.
        tolerance: for "exact" on our kernels, the share of a point's weights that may be skipped, in pairs
            too far apart to matter: `segfast.functional.gaussian_filter`.

    It computes on what was torch's default device when it was made; arrays come from and go to the CPU.

    Example:
        >>> import numpy as np, segfast.crf as dcrf
        >>> d = dcrf.DenseCRF(100, 5)
        >>> d.setUnaryEnergy(np.random.rand(5, 100).astype(np.float32))
        >>> d.addPairwiseEnergy(np.random.rand(7, 100).astype(np.float32), compat=3)
        >>> d.inference(5).shape
        (5, 100)
        >>> d
        DenseCRF(nvar=100, nlabels=5, method='lattice' (lattice))
    """

    def __init__(self, nvar: int, nlabels: int, *, method: str = "lattice", tolerance: float = 1e-2):
        self._nvar, self._nlabel = _count(nvar, "nvar"), _count(nlabels, "nlabels")
        check_options(method, None)
        warn_of_one_label(self._nlabel)
        self._tolerance = check_tolerance(tolerance)
        self._method, self._device = method, torch.get_default_device()
        self._unary: Tensor | None = None
        self._terms: list[dense_crf.Term] = []

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds the term `compat * exp(-|f_i - f_j|^2 / 2)`; features [D, points], D any number.

        Args:
            compat: a number (Potts: its cost for two different labels), [labels] (the diagonal of energies)
                or [labels, labels] (all of them; only the symmetric half of it counts).
        """
        points = _tensor(features, "features", 2, exact=True)
        if points.shape[0] == 0 or points.shape[1] != self._nvar:
            raise ValueError(f"features must be [D, {self._nvar}] (points), got {list(points.shape)}")
        shift = far_offset(points, (1,))
        points = (points - shift).float().T
        self._add(points, "features", compat, kernel, normalization, moved=bool(shift.any()))

    def setUnary(self, u: Unary) -> None:
        """Sets the energies from an object that holds them."""
        self._set(u.energy)

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Sets the energies [labels, points], negative log probabilities; with f, `LogisticUnary(u, f)`'s."""
        self._set((ConstUnary(u) if f is None else LogisticUnary(u, f)).energy)

    def inference(self, niter: int) -> NDArray[np.float32]:
        """The probabilities [labels, points] after so many iterations of mean field."""
        niter = _whole(niter)
        check_iterations(niter)
        with torch.no_grad():
            return _array(dense_crf.infer(self._energies(), self._terms, niter))

    def map(self, niter: int) -> NDArray[np.int64]:
        """The most probable label of each point [points], after so many iterations."""
        return self.inference(niter).argmax(0)

    def startInference(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """The probabilities of the energies alone, and two arrays that `stepInference` takes by tradition."""
        nothing = np.empty((0, 0), np.float32)
        return _array(dense_crf.start(self._energies())), nothing, nothing.copy()

    def stepInference(
        self, Q: NDArray[np.float32], tmp1: ArrayLike | None = None, tmp2: ArrayLike | None = None
    ) -> None:
        """One iteration, which overwrites the probabilities Q [labels, points]."""
        with torch.no_grad():
            Q[...] = _array(dense_crf.step(self._probabilities(Q), self._energies(), self._terms))

    def klDivergence(self, Q: ArrayLike) -> float:
        """The KL divergence of Q [labels, points] from the CRF, up to a constant of the CRF."""
        with torch.no_grad():
            return float(dense_crf.kl_divergence(self._probabilities(Q), self._energies(), self._terms))

    def __repr__(self) -> str:
        chosen = f" ({', '.join(term.filter.method for term in self._terms)})" if self._terms else ""
        options = f"nlabels={self._nlabel}, method={self._method!r}{chosen}"
        return f"{type(self).__name__}({self._sizes()}, {options})"

    def _sizes(self) -> str:
        return f"nvar={self._nvar}"

    def _set(self, energy: Tensor) -> None:
        if tuple(energy.shape) != (self._nlabel, self._nvar):
            raise ValueError(
                f"the unary energy must be {[self._nlabel, self._nvar]} (labels, points), "
                f"got {list(energy.shape)}"
            )
        check_energies(energy, 0, "the unary energy")
        self._unary = energy.T.contiguous().to(self._device)

    def _add(
        self,
        points: Tensor,
        source: str,
        compat: float | ArrayLike,
        kernel: int,
        normalization: int,
        thetas: Thetas | None = None,
        moved: bool = False,
    ) -> None:
        """Adds the term of features [points, D]; thetas: `choose_kernels_method`'s.

        moved: they were far from zero, and are not.
        """
        points = check_features(points, source, torch.float32).contiguous().to(self._device)
        name, compatibility = self._options(compat, kernel, normalization)
        # densecrf takes points by fours, and pads them by points at zero.
        padded = self._nvar % 4 != 0 and not moved
        with torch.no_grad():
            if self._on_kernels(points.shape[1]):
                method = choose_kernels_method(self._method, self._nvar, thetas)
                padding = int(padded and method == "lattice")
                rows = _longer(points, padding)[None]
                found: Filter = _OfOne(feature_filters(rows, method, None, self._tolerance), padding)
                found = normalized(found, points, name)
            else:
                found = dense_crf.feature_filter(points, self._method, name, with_origin=padded)
        self._terms.append(dense_crf.Term(found, compatibility))

    def _on_kernels(self, dim: int) -> bool:
        """True if a filter of so many features runs our kernels."""
        like = torch.empty(1, dtype=torch.float32, device=self._device).expand(1, self._nvar, self._nlabel)
        return can_use_kernels("mean_field", like, self._nlabel, dim)

    def _energies(self) -> Tensor:
        if self._unary is None:
            return torch.zeros(self._nvar, self._nlabel, dtype=torch.float32, device=self._device)
        return self._unary

    def _probabilities(self, Q: ArrayLike) -> Tensor:
        q = _tensor(Q, "Q", 2)
        if tuple(q.shape) != (self._nlabel, self._nvar):
            raise ValueError(f"Q must be {[self._nlabel, self._nvar]} (labels, points), got {list(q.shape)}")
        return q.T.contiguous().to(self._device)

    def _options(
        self, compat: float | ArrayLike, kernel: int, normalization: int
    ) -> tuple[str | None, float | Tensor]:
        """The name of the normalization and the energies of a term."""
        KernelType(kernel)
        name = _NAMES[NormalizationType(normalization)]
        value: float | Tensor
        if np.ndim(compat) == 0:
            value = compat.item() if hasattr(compat, "item") else compat  # type: ignore[union-attr, assignment]
        else:
            value = _tensor(compat, "compat", np.ndim(compat))
            if not value.isfinite().all():
                raise ValueError("compat must be finite, got NaN or infinity in it")
            value = value.to(self._device)
        value = check_compatibility(value, self._nlabel, "compat", torch.float32, self._device)
        if isinstance(value, Tensor) and value.dim() == 2:
            value = (value + value.T) / 2
        return name, value


class DenseCRF2D(DenseCRF):
    """A CRF over the pixels of an image, in raster order: w columns, h rows.

    Example:
        >>> import numpy as np, segfast.crf as dcrf
        >>> d = dcrf.DenseCRF2D(24, 16, 2)
        >>> d.setUnaryEnergy(np.random.rand(2, 16 * 24).astype(np.float32))
        >>> d.addPairwiseGaussian(sxy=3, compat=3)
        >>> d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=np.zeros((16, 24, 3), np.uint8), compat=10)
        >>> d.inference(5).argmax(axis=0).reshape(16, 24).shape
        (16, 24)
    """

    def __init__(self, w: int, h: int, nlabels: int, *, method: str = "lattice", tolerance: float = 1e-2):
        self._w, self._h = _count(w, "w"), _count(h, "h")
        super().__init__(self._w * self._h, nlabels, method=method, tolerance=tolerance)

    def addPairwiseGaussian(
        self,
        sxy: float | Sequence[float],
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a term of the places alone; sxy in pixels, one standard deviation or (along x, along y)."""
        name, compatibility = self._options(compat, kernel, normalization)
        theta = positive(sxy, "sxy", 2)
        size = self._h, self._w
        like = torch.empty(1, 0, 0, dtype=torch.float32, device=self._device)
        with torch.no_grad():
            if self._on_kernels(2):
                grid: Filter = _OfOne(grid_filters(size, theta, self._method, name, like))
            else:
                grid = dense_crf.grid_filter(size, theta, self._method, name, like)
        self._terms.append(dense_crf.Term(grid, compatibility))

    def addPairwiseBilateral(
        self,
        sxy: float | Sequence[float],
        srgb: float | Sequence[float],
        rgbim: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a term of the places and the colors.

        Args:
            sxy: standard deviation in pixels, one or (along x, along y).
            srgb: standard deviation in the image's units, one or one a channel.
            rgbim: [h, w, 3]; other images by `utils.create_pairwise_bilateral` and `addPairwiseEnergy`.
        """
        image = _tensor(rgbim, "rgbim", 3, exact=True)
        if tuple(image.shape) != (self._h, self._w, 3):
            raise ValueError(f"rgbim must be {[self._h, self._w, 3]} (h, w, RGB), got {list(image.shape)}")
        thetas = positive(sxy, "sxy", 2), positive(srgb, "srgb", 3)
        if not np.issubdtype(utils.as_array(rgbim, "rgbim").dtype, np.integer):
            warn_of_colors(image, thetas[1], "rgbim", "srgb")
        shift = far_offset(image, (0, 1), min(thetas[1]))
        image = (image - shift).float()
        places = dense_crf.grid_features((self._h, self._w), thetas[0], image)
        colors = image.reshape(-1, 3) / image.new_tensor(thetas[1])
        points = torch.cat([places, colors], 1)
        self._add(points, "rgbim", compat, kernel, normalization, thetas, moved=bool(shift.any()))

    def _sizes(self) -> str:
        return f"w={self._w}, h={self._h}"


class _OfOne:
    """A filter of batches [B, N + padding, C], for one image [N, C]."""

    def __init__(self, batched: DeviceFilter, padding: int = 0):
        self.batched, self.method, self.padding = batched, batched.method, padding

    def __call__(self, values: Tensor) -> Tensor:
        return self.batched(_longer(values, self.padding)[None])[0][: values.shape[0]]

    def passes(self, values: Tensor) -> Passes:
        return passes_of(self(values))

    def scaled(self, before: Tensor | None, after: Tensor | None) -> "_OfOne":
        factors = (None if f is None else _longer(f[:, None], self.padding)[:, 0] for f in (before, after))
        return _OfOne(self.batched.scaled(*factors), self.padding)


def _whole(value: Any) -> Any:
    """An int for a float that is one, as Cython takes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any, name: str) -> int:
    return check_count(_whole(value), name)


def _longer(rows: Tensor, padding: int) -> Tensor:
    """[N, C] with so many rows of zeros behind."""
    return F.pad(rows, (0, 0, 0, padding)) if padding else rows


def _tensor(values: ArrayLike, name: str, ndim: int, exact: bool = False) -> Tensor:
    """A float32 tensor of its own memory; with `exact` float64, if float32 has not all of the numbers."""
    given = utils.as_array(values, name)
    if np.iscomplexobj(given):
        raise ValueError(f"{name} must be real, got complex numbers")
    array = np.array(given, np.result_type(given.dtype, np.float32) if exact else np.float32)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got the shape {list(array.shape)}")
    return torch.from_numpy(array)


def _array(values: Tensor) -> NDArray[np.float32]:
    """[points, labels] as [labels, points]."""
    return values.T.contiguous().cpu().numpy()


__all__ = [
    "CONST_KERNEL",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "ConstUnary",
    "DenseCRF",
    "DenseCRF2D",
    "KernelType",
    "LogisticUnary",
    "NormalizationType",
    "Unary",
    "utils",
]
