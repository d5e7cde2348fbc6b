"""Mean field of a dense CRF as a layer: CRF-as-RNN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ._rules import Rule


class DenseCRF(torch.nn.Module):
    """Refines a network's logits by mean field in a CRF over all pairs of pixels, whose weights it learns.

    logits [B, L, H, W] and image [B, C, H, W] to refined logits [B, L, H, W], the logarithm of the
    probabilities, for a cross-entropy loss or an argmax. Learned are the labels' mixing by either kernel,
    `bilateral_weight` and `spatial_weight` [L, L], and `compatibility` [L, L], the energy that label i pays
    for label j. The standard deviations stay as they are.

    Args:
        num_labels: L.
        iterations: in training.
        eval_iterations: in evaluation; None for the same number.
        theta_alpha, theta_beta, theta_gamma, normalization, method: `segfast.functional.mean_field`'s.
        bilateral_weight, spatial_weight: what the weights start from, times the identity; compatibility
            starts from Potts.

    Source: Zheng et al., "Conditional Random Fields as Recurrent Neural Networks" (2015).

    Example:
        >>> import torch, segfast
        >>> crf = segfast.nn.DenseCRF(21)
        >>> crf(torch.randn(2, 21, 12, 16), torch.rand(2, 3, 12, 16) * 255).shape
        torch.Size([2, 21, 12, 16])
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.iterations = iterations
        self.eval_iterations = iterations if eval_iterations is None else eval_iterations
        self.theta_alpha, self.theta_beta, self.theta_gamma = theta_alpha, theta_beta, theta_gamma
        self.normalization, self.method = normalization, method
        self._starts = bilateral_weight, spatial_weight
        self.bilateral_weight, self.spatial_weight, self.compatibility = (
            torch.nn.Parameter(torch.empty(num_labels, num_labels, device=device, dtype=dtype))
            for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights times the identity, and Potts."""
        parameters = (self.bilateral_weight, self.spatial_weight, self.compatibility)
        with torch.no_grad():
            for parameter, start in zip(parameters, (*self._starts, -1.0), strict=True):
                torch.nn.init.eye_(parameter).mul_(start)

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
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
        )
        return q.clamp_min(torch.finfo(q.dtype).tiny).log().to(logits.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.compatibility.shape[0]}, iterations={self.iterations}, "
            f"eval_iterations={self.eval_iterations}, theta_alpha={self.theta_alpha}, "
            f"theta_beta={self.theta_beta}, theta_gamma={self.theta_gamma}, method={self.method!r}"
        )


# Nothing in a network is replaced.
RULES: list[Rule] = []
