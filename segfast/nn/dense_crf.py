"""Mean field of a dense CRF as a layer: CRF-as-RNN."""

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from .. import functional as F
from ..ops._operator import is_traced
from ..ops.dense_crf import chosen_methods
from ..ops.dense_crf.arguments import (
    check_count,
    check_iterations,
    check_options,
    check_tolerance,
    positive,
)
from ._rules import Rule
from ._scripting import Unscriptable


class DenseCRF(Unscriptable, torch.nn.Module):
    """Refines a network's logits by mean field in a CRF over all pairs of pixels, whose weights it learns.

    logits [B, L, H, W] and image [B, C, H, W] to refined logits [B, L, H, W], the logarithm of the
    probabilities, for a cross-entropy loss or an argmax. The image in 0..255: `theta_beta` is in its units,
    and of an image in 0..1 the default sees one color. Learned are the labels' mixing by either kernel,
    `bilateral_weight` and `spatial_weight` [L, L], and `compatibility` [L, L], the energy that label i pays
    for label j; with `learn_thetas` also the standard deviations. Computes in float32 (float64 for float64),
    under autocast too; gradients go to logits and image as well.

    Args:
        num_labels: L.
        iterations: in training.
        eval_iterations: in evaluation; None for the same number.
        theta_alpha, theta_beta, theta_gamma, normalization, method, tolerance:
            `segfast.functional.mean_field`'s, with the defaults of Zheng et al. Once it was called, the repr
            says which methods "auto" took for the image's term and for the spatial one.
        bilateral_weight, spatial_weight: what the weights start from, times the identity; compatibility
            starts from Potts.
        learn_thetas: `theta_alpha` [2], `theta_beta` [C] (3 if a number is given) and `theta_gamma` [2] are
            parameters that start from these values. They are to stay positive: on a CPU others are an error.

    Raises:
        ValueError: a number of iterations below 0, a theta that is not positive, an unknown option; in
            `forward` what `mean_field` raises.

    Source: Zheng et al., "Conditional Random Fields as Recurrent Neural Networks" (2015).

    Example:
        >>> import torch, segfast
        >>> crf = segfast.nn.DenseCRF(21)
        >>> crf(torch.randn(2, 21, 12, 16), torch.rand(2, 3, 12, 16) * 255).shape
        torch.Size([2, 21, 12, 16])
    """

    # With `learn_thetas` parameters.
    theta_alpha: float | Sequence[float]
    theta_beta: float | Sequence[float]
    theta_gamma: float | Sequence[float]

    def __init__(
        self,
        num_labels: int,
        iterations: int = 5,
        eval_iterations: int | None = 10,
        *,
        theta_alpha: float | Sequence[float] = 160.0,
        theta_beta: float | Sequence[float] = 3.0,
        theta_gamma: float | Sequence[float] = 3.0,
        bilateral_weight: float = 5.0,
        spatial_weight: float = 3.0,
        normalization: str | None = "symmetric",
        method: str = "auto",
        tolerance: float = 1e-2,
        learn_thetas: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count(num_labels, "num_labels")
        self.iterations = iterations
        self.eval_iterations = iterations if eval_iterations is None else eval_iterations
        for count in (self.iterations, self.eval_iterations):
            check_iterations(count)
        check_options(method, normalization)
        self.normalization, self.method, self.tolerance = normalization, method, check_tolerance(tolerance)
        self.learn_thetas = learn_thetas
        self._chosen: tuple[str, str] | None = None
        self._starts = bilateral_weight, spatial_weight
        self.bilateral_weight, self.spatial_weight, self.compatibility = (
            torch.nn.Parameter(torch.empty(num_labels, num_labels, device=device, dtype=dtype))
            for _ in range(3)
        )
        several = isinstance(theta_beta, Sized) and getattr(theta_beta, "ndim", 1) != 0
        channels = len(theta_beta) if several else 3  # type: ignore[arg-type]
        self._theta_starts = {}
        for name, theta, count in (
            ("theta_alpha", theta_alpha, 2),
            ("theta_beta", theta_beta, channels),
            ("theta_gamma", theta_gamma, 2),
        ):
            self._theta_starts[name] = positive(theta, name, count)
            learned = torch.empty(count, device=device, dtype=dtype) if learn_thetas else None
            given = self._theta_starts[name] if hasattr(theta, "ndim") else theta
            setattr(self, name, given if learned is None else torch.nn.Parameter(learned))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights times the identity, Potts, and the thetas as they were given."""
        parameters = (self.bilateral_weight, self.spatial_weight, self.compatibility)
        with torch.no_grad():
            for parameter, start in zip(parameters, (*self._starts, -1.0), strict=True):
                torch.nn.init.eye_(parameter).mul_(start)
            if self.learn_thetas:
                for name, theta in self._theta_starts.items():
                    getattr(self, name).copy_(torch.tensor(theta))

    def forward(self, logits: Tensor, image: Tensor | None) -> Tensor:
        if not logits.is_floating_point():
            raise ValueError(f"logits must be floating point, got {logits.dtype}")
        # A half's least probability would not do.
        energies = -logits if logits.dtype == torch.float64 else -logits.float()
        q = F.mean_field(
            energies,
            image,
            iterations=self.iterations if self.training else self.eval_iterations,
            theta_alpha=self.theta_alpha,
            theta_beta=self.theta_beta,
            theta_gamma=self.theta_gamma,
            bilateral_weight=self.bilateral_weight,
            spatial_weight=self.spatial_weight,
            compatibility=self.compatibility,
            normalization=self.normalization,
            method=self.method,
            tolerance=self.tolerance,
        )
        if self.method == "auto" and image is not None and not is_traced():
            channels, thetas = image.shape[-3], None
            if not self.learn_thetas:
                alpha = positive(self.theta_alpha, "theta_alpha", 2)
                thetas = alpha, positive(self.theta_beta, "theta_beta", channels)
            self._chosen = chosen_methods(energies, channels, thetas)
        return q.clamp_min(torch.finfo(q.dtype).tiny).log().to(logits.dtype)

    def extra_repr(self) -> str:
        given = [f"{name}={getattr(self, name)}" for name in self._theta_starts]
        thetas = "learn_thetas=True" if self.learn_thetas else ", ".join(given)
        chosen = "" if self._chosen is None else f" ({', '.join(self._chosen)})"
        if self.normalization != "symmetric":
            chosen += f", normalization={self.normalization!r}"
        if self.tolerance != 1e-2:
            chosen += f", tolerance={self.tolerance:g}"
        return (
            f"{self.compatibility.shape[0]}, iterations={self.iterations}, "
            f"eval_iterations={self.eval_iterations}, {thetas}, method={self.method!r}{chosen}"
        )


# Nothing in a network is replaced.
RULES: list[Rule] = []
