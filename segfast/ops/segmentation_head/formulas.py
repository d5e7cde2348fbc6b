"""The definitions on full-size logits, and the derivatives of the gradients: plain, differentiable torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import upsample, upsample_adjoint


def wide(logits: Tensor) -> Tensor:
    """The logits in fp32, or as they are if in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _labels(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels [N, 1, OH, OW], zero where ignored, and whether they count."""
    label = target[:, None].long()  # first: 156 == -100 in uint8
    counted = label != ignore_index
    return torch.where(counted, label, 0), counted


def cross_entropy(logits, target, weight, size, mode, align_corners, scales, ignore_index, smoothing,
                  per_pixel) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's results, in plain torch."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    weight = None if weight is None else weight.to(z.dtype)
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    lse = torch.logsumexp(z, 1)
    losses = F.cross_entropy(z, target.long(), weight, reduction="none", **options)
    if per_pixel:
        return losses, lse
    label, counted = _labels(target, ignore_index)
    weights = counted.to(z.dtype) if weight is None else torch.where(counted, weight[label], 0.0)
    return torch.stack([losses.sum(), weights.sum()]), lse


def cross_entropy_gradient(grad, logits, target, weight, lse, size, mode, align_corners, scales,
                           ignore_index, smoothing) -> Tensor:  # fmt: skip
    """dz = grad ((1 - smoothing) weight[label] (p - [label]) + smoothing / C (p sum(weight) - weight))."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    towards, spread, weights = _coefficients(z, target, weight, ignore_index, smoothing)
    p = torch.softmax(z, 1)
    label, _ = _labels(target, ignore_index)
    g = grad[:, None] if grad.dim() else grad
    factor = g * towards
    dz = p * (factor + g * spread * weights.sum()) - g * spread * weights[:, None, None]
    dz = dz.scatter_add(1, label, -factor)
    return upsample_adjoint(dz, logits.shape, mode, align_corners, scales).to(logits.dtype)


def _coefficients(z, target, weight, ignore_index, smoothing) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - smoothing) weight[label] and smoothing / C, [N, 1, OH, OW], 0 where ignored; weights [C]."""
    label, counted = _labels(target, ignore_index)
    weights = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    towards = torch.where(counted, (1 - smoothing) * weights[label], 0.0)
    return towards, torch.where(counted, smoothing / z.shape[1], 0.0).to(z.dtype), weights


def cross_entropy_second(u, grad, logits, target, weight, size, mode, align_corners, scales, ignore_index,
                         smoothing) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for grad and the logits of sum(u * gradient of the logits), u [N, C, H, W].

    That sum is over pixels of grad * (sum_c dz_c / grad * U_c) with U = upsample(u).
    """
    z = upsample(wide(logits), size, mode, align_corners, scales)
    full = upsample(u.to(z.dtype), size, mode, align_corners, scales)
    towards, spread, weights = _coefficients(z, target, weight, ignore_index, smoothing)
    label, _ = _labels(target, ignore_index)
    p = torch.softmax(z, 1)
    mean = (p * full).sum(1, keepdim=True)
    factor = towards + spread * weights.sum()
    against = (weights[:, None, None] * full).sum(1, keepdim=True)
    to_grad = (factor * mean - towards * full.gather(1, label) - spread * against)[:, 0]
    g = grad[:, None] if grad.dim() else grad
    to_z = g * factor * p * (full - mean)
    to_logits = upsample_adjoint(to_z, logits.shape, mode, align_corners, scales).to(logits.dtype)
    return (to_grad if grad.dim() else to_grad.sum()).to(grad.dtype), to_logits


def argmax(logits, size, mode, align_corners, scales, confidence) -> tuple[Tensor, Tensor]:
    """The operator's results, in plain torch."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    if not confidence:
        return z.argmax(1), z.new_empty((z.shape[0], 0, 0), dtype=torch.float32)
    largest, label = z.max(1)
    return label, (largest - torch.logsumexp(z, 1)).exp().float()


def dice_sums(logits, target, size, mode, align_corners, scales, ignore_index) -> tuple[Tensor, Tensor]:
    """The operator's results, in plain torch."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    return dice_sums_of(z, target, ignore_index), torch.logsumexp(z, 1)


def dice_sums_of(z: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The sums [3, C] of full-size logits."""
    p, (label, counted) = torch.softmax(z, 1), _labels(target, ignore_index)
    hit = torch.zeros_like(p).scatter(1, label, counted.to(p.dtype))
    return torch.stack([part.sum((0, 2, 3)) for part in (p * hit, p * counted, hit)])


def _dice_parts(grad, z, target, ignore_index) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax, the one-hot labels, whether pixels count, and q = grad[1] + [label] grad[0]."""
    p, (label, counted) = torch.softmax(z, 1), _labels(target, ignore_index)
    hit = torch.zeros_like(p).scatter(1, label, counted.to(p.dtype))
    return p, hit, counted, grad[1, :, None, None] + hit * grad[0, :, None, None]


def dice_gradient(grad, logits, target, lse, size, mode, align_corners, scales, ignore_index) -> Tensor:
    """dz = p (q - mean of q under p), for the gradient grad [3, C] of the sums."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    p, _, counted, q = _dice_parts(grad.to(z.dtype), z, target, ignore_index)
    dz = torch.where(counted, p * (q - (p * q).sum(1, keepdim=True)), 0.0)
    return upsample_adjoint(dz, logits.shape, mode, align_corners, scales).to(logits.dtype)


def dice_second(u, grad, logits, target, size, mode, align_corners, scales, ignore_index
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for grad and the logits of sum(u * gradient of the logits): of the covariance of U and q."""
    z = upsample(wide(logits), size, mode, align_corners, scales)
    full = upsample(u.to(z.dtype), size, mode, align_corners, scales)
    p, hit, counted, q = _dice_parts(grad.to(z.dtype), z, target, ignore_index)
    apart = full - (p * full).sum(1, keepdim=True)
    off = q - (p * q).sum(1, keepdim=True)
    to_q = torch.where(counted, p * apart, 0.0)
    to_grad = torch.stack([(to_q * hit).sum((0, 2, 3)), to_q.sum((0, 2, 3)), torch.zeros_like(grad[2])])
    to_z = torch.where(counted, p * (apart * off - (p * apart * off).sum(1, keepdim=True)), 0.0)
    to_logits = upsample_adjoint(to_z, logits.shape, mode, align_corners, scales).to(logits.dtype)
    return to_grad.to(grad.dtype), to_logits
