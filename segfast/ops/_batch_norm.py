"""Batch norm in training, an addition and an activation as one function, for which one image is kept.

y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and variance over the batch. Autograd
keeps x for the norm; the layers keep the activation's input or result besides. Here what the activation's
derivative needs is computed again from x, and the result itself where the next layer would keep it
(`_kept.keeping_less`).
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._epilogue import activate_, activation_backward, keeps_output
from ._kept import can_be_remade, is_remade, take_left

_aten = torch.ops.aten


class Norm(NamedTuple):
    """A batch norm in training.

    `weight`, `bias` [C] or None; `running_mean`, `running_var` [C], written to, or None; `momentum` the part
    of the new in them. `group`: the process group whose ranks share their statistics, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float
    group: Any = None


def can_train(activation: str | None, negative_slope: float, residual: Tensor | None) -> bool:
    """True if `batch_norm_act` has this: after an addition, the result must tell the derivative."""
    return residual is None or activation is None or keeps_output(activation, negative_slope)


def batch_norm_act(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """act(batch_norm(input) + residual), as `torch.nn.functional.batch_norm` in training has it.

    Args:
        input: [N, C, H, W], floating point.
        norm: its parameters and running statistics; these are updated.
        residual: of the input's shape and dtype, added before the activation. `can_train` says with which.
        activation: None, or a name `segfast.nn.Conv2d` knows.
        negative_slope: leaky_relu's.

    Raises:
        ValueError: one value per channel, which has no variance.
    """
    if norm.group is None:
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    with torch.no_grad():
        mean, var, count = _statistics(input, norm)
    # The residual is needed for the activation's derivative and to make the result again. The next layer
    # keeps one of the two anyway: the residual, where that is not made again itself.
    solid = residual is None or not is_remade(residual)
    output = _BatchNormAct.apply(
        input, residual, norm.weight, norm.bias, mean, var, norm, activation, negative_slope, solid, count
    )
    if solid and output.requires_grad:
        can_be_remade(output, functools.partial(_computed, norm.eps, activation, negative_slope))
    return output


def _statistics(input: Tensor, norm: Norm) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, [C], and of how many values; updates the running ones."""
    count = input.numel() // input.shape[1]
    if norm.group is None:
        mean, var = _aten.batch_norm_update_stats(input, norm.running_mean, norm.running_var, norm.momentum)
        return mean, var, count
    mean, var, count = _merged(input, count, norm.group)
    if norm.running_mean is not None and norm.running_var is not None:
        unbiased = var * (count / max(1, count - 1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), norm.momentum)
    return mean, var, count


def _merged(input: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, int]:
    """The statistics of all ranks' images together (Chan et al.: sums of squares about the common mean)."""
    if count:
        mean, var = _aten.batch_norm_update_stats(input, None, None, 0.0)
    else:
        dtype = torch.promote_types(input.dtype, torch.float32)
        mean = var = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    # In float64, where the number of values is exact.
    own = torch.cat([mean, var, mean.new_full((1,), 0)]).double()
    own[-1] = count
    ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(ranks, own, group=group)
    every = torch.stack(ranks)
    total = int(every[:, -1].sum())
    means, variances = every[:, :-1].chunk(2, 1)
    share = every[:, -1:] / total
    merged = (share * means).sum(0)
    spread = (share * (variances + (means - merged).square())).sum(0)
    return merged.to(mean.dtype), spread.to(mean.dtype), total


def _computed(
    eps: float, activation: str | None, negative_slope: float, input: Tensor, weight: Any, bias: Any,
    mean: Tensor, var: Tensor, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The result, in eval's way, with the batch's own statistics."""
    z = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    if residual is not None:
        z += residual
    return activate_(z, activation, negative_slope)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias, mean, var, norm, activation, negative_slope, solid, count
    ):
        ctx.eps, ctx.group, ctx.count = norm.eps, norm.group, count
        ctx.activation, ctx.negative_slope, ctx.solid = activation, negative_slope, solid
        output = _computed(norm.eps, activation, negative_slope, input, weight, bias, mean, var, residual)
        kept = residual if solid else output if activation is not None else None
        ctx.save_for_backward(input, weight, bias, mean, var, kept)
        return output

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        input, weight, bias, mean, var, kept = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()
        if differentiable and ctx.group is not None:
            raise NotImplementedError(
                "a gradient of the gradient does not exist for batch norm that is synchronized over processes"
            )

        def norm() -> Tensor:
            if differentiable:
                return F.batch_norm(input, None, None, weight, bias, True, 0.0, ctx.eps)
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, ctx.eps)

        normalized = norm() if differentiable else None

        def before_activation() -> Tensor:
            z = norm() if normalized is None else normalized
            return z if kept is None else z + kept if differentiable else z.add_(kept)

        output = None if ctx.solid else kept
        made = take_left(ctx)
        if made is not None and not differentiable and keeps_output(ctx.activation, ctx.negative_slope):
            output = made
        grad = activation_backward(grad, output, before_activation, ctx.activation, ctx.negative_slope)
        made = output = kept = None  # before there are more gradients
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        if normalized is not None:
            wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
            found = iter(torch.autograd.grad(normalized, wanted, grad, create_graph=True) if wanted else ())
            grads = [next(found) if need else None for need in needs]
        elif ctx.group is None:
            invstd = (var + ctx.eps).sqrt().reciprocal()  # as torch rounds it
            grads = _aten.native_batch_norm_backward(
                grad, input, weight, None, None, mean, invstd, True, ctx.eps, needs
            )
        else:
            grads = _synchronized_backward(grad, input, weight, mean, var, ctx)
        grad_residual = grad if ctx.needs_input_grad[1] else None
        return grads[0], grad_residual, grads[1], grads[2], *(None,) * 7


def _synchronized_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; of the parameters this rank's part, as of any other layer's."""
    invstd = (var + ctx.eps).sqrt().reciprocal()  # as torch rounds it
    centered = (input - mean[:, None, None]) * invstd[:, None, None]
    sums = torch.stack([grad.sum((0, 2, 3), dtype=mean.dtype), (grad * centered).sum((0, 2, 3))])
    grad_bias, grad_weight = sums.clone()
    torch.distributed.all_reduce(sums, group=ctx.group)
    of_mean, of_var = (sums / ctx.count)[:, :, None, None]
    scale = invstd if weight is None else invstd * weight
    grad_input = (grad - of_mean - centered * of_var) * scale[:, None, None]
    return grad_input.to(input.dtype), grad_weight, grad_bias
