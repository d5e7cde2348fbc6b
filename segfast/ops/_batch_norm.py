"""Batch norm in training, an addition and an activation as one function, for which one image is kept.

y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and variance over the batch. Autograd
keeps x for the norm; the layers keep the activation's input or result besides. Here what the activation's
derivative needs is computed again from x, and the result itself where the next layer would keep it
(`_kept.keeping_less`). ATen computes it, and where they are asked for by name our kernels: two passes over
the image there, and two over it and the gradient back.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import kernel_reason_not, use_triton
from ._epilogue import activate_, activation_backward, keeps_output
from ._kept import can_be_remade, is_remade, take_left
from ._layout import fit_vectors, in_format, is_channels_last
from ._operands import load_kernels

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


class _Options(NamedTuple):
    """All that is no tensor; `kernels` says that ours compute it."""

    eps: float
    activation: str | None
    negative_slope: float
    kernels: bool


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
        NotImplementedError: backend "triton" was asked for and has no kernels for the input.
    """
    if norm.group is None:
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    kernels = use_triton("batch_norm_act", _reason_not, input, norm.group)
    options = _Options(norm.eps, activation, negative_slope, kernels)
    with torch.no_grad():
        mean, var, count = _statistics(input, norm, kernels)
    # The residual is needed for the activation's derivative and to make the result again. The next layer
    # keeps one of the two anyway: the residual, where that is not made again itself.
    solid = residual is None or not is_remade(residual)
    output = _BatchNormAct.apply(
        input, residual, norm.weight, norm.bias, mean, var, norm.group, options, solid, count
    )
    if solid and output.requires_grad:
        can_be_remade(output, functools.partial(_computed, options))
    return output


def _reason_not(backend: str, input: Tensor, group: Any) -> str | None:
    """None if our kernels compute the norm, else why not."""
    reason = kernel_reason_not(backend, input)
    if reason is None and group is not None:
        reason = "the statistics are shared by several processes"
    return reason or (None if backend == "triton" else "not measured on this GPU")


def _statistics(input: Tensor, norm: Norm, kernels: bool) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel, [C], and of how many values; updates the running ones."""
    count = input.numel() // input.shape[1]
    if norm.group is None and not kernels:
        mean, var = _aten.batch_norm_update_stats(input, norm.running_mean, norm.running_var, norm.momentum)
        return mean, var, count
    if kernels:
        mean, var = (torch.empty(input.shape[1], dtype=torch.float32, device=input.device) for _ in range(2))
        load_kernels().batch_norm_statistics(_as_rows(input), mean, var)
    else:
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
    options: _Options, input: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The result, in eval's way, with the batch's own statistics."""
    eps, activation, negative_slope, kernels = options
    if kernels:
        output = torch.empty_like(input, memory_format=torch.channels_last)
        tensors = (_as_rows(input), mean, var, *fit_vectors(weight, bias), _as_rows(residual), output)
        load_kernels().batch_norm_apply(*tensors, eps, activation, negative_slope)
        return _like(output, input)
    z = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    if residual is not None:
        z += residual
    return activate_(z, activation, negative_slope)


def _as_rows(t: Any) -> Any:
    """As the kernels read it: dense, pixel by pixel."""
    return None if t is None else in_format(t, torch.channels_last)


def _like(t: Tensor, input: Tensor) -> Tensor:
    """`t`, that the kernels wrote, in the input's memory format."""
    return t if is_channels_last(input) else t.contiguous()


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, mean, var, group, options, solid, count):
        ctx.group, ctx.count, ctx.options, ctx.solid = group, count, options, solid
        output = _computed(options, input, weight, bias, mean, var, residual)
        kept = residual if solid else output if options.activation is not None else None
        ctx.save_for_backward(input, weight, bias, mean, var, kept)
        return output

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        input, weight, bias, mean, var, kept = ctx.saved_tensors
        eps, activation, negative_slope, kernels = ctx.options
        differentiable = torch.is_grad_enabled()
        if differentiable and ctx.group is not None:
            raise NotImplementedError(
                "a gradient of the gradient does not exist for batch norm that is synchronized over processes"
            )
        made = take_left(ctx)
        if kernels and not differentiable and not torch._C._are_functorch_transforms_active():
            made = None
            return (*_gradients_by_kernels(ctx, grad), *(None,) * 6)

        def norm() -> Tensor:
            if differentiable:
                return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

        normalized = norm() if differentiable else None

        def before_activation() -> Tensor:
            z = norm() if normalized is None else normalized
            return z if kept is None else z + kept if differentiable else z.add_(kept)

        output = None if ctx.solid else kept
        if made is not None and not differentiable and keeps_output(activation, negative_slope):
            output = made
        grad = activation_backward(grad, output, before_activation, activation, negative_slope)
        made = output = kept = None  # before there are more gradients
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        if normalized is not None:
            wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
            found = iter(torch.autograd.grad(normalized, wanted, grad, create_graph=True) if wanted else ())
            grads = [next(found) if need else None for need in needs]
        elif ctx.group is None:
            invstd = (var + eps).sqrt().reciprocal()  # as torch rounds it
            grads = _aten.native_batch_norm_backward(
                grad, input, weight, None, None, mean, invstd, True, eps, needs
            )
        else:
            grads = _synchronized_backward(grad, input, weight, mean, var, ctx)
        grad_residual = grad if ctx.needs_input_grad[1] else None
        return grads[0], grad_residual, grads[1], grads[2], *(None,) * 6


def _synchronized_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; of the parameters this rank's part, as of any other layer's."""
    invstd = (var + ctx.options.eps).sqrt().reciprocal()  # as torch rounds it
    centered = (input - mean[:, None, None]) * invstd[:, None, None]
    sums = torch.stack([grad.sum((0, 2, 3), dtype=mean.dtype), (grad * centered).sum((0, 2, 3))])
    grad_bias, grad_weight = sums.clone()
    torch.distributed.all_reduce(sums, group=ctx.group)
    of_mean, of_var = (sums / ctx.count)[:, :, None, None]
    scale = invstd if weight is None else invstd * weight
    grad_input = (grad - of_mean - centered * of_var) * scale[:, None, None]
    return grad_input.to(input.dtype), grad_weight, grad_bias


def _gradients_by_kernels(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, residual, weight and bias."""
    input, weight, bias, mean, var, kept = ctx.saved_tensors
    eps, activation, negative_slope, _ = ctx.options
    if not ctx.solid and activation is not None:
        # The output tells the derivative, where the residual was not kept.
        grad, kept = activation_backward(grad, kept, lambda: kept, activation, negative_slope), None
        activation = None
    wants_input, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    options = eps, activation, negative_slope
    tensors = (_as_rows(grad), _as_rows(input), mean, var, *fit_vectors(weight, bias), _as_rows(kept))
    sums = torch.empty((2, input.shape[1]), dtype=torch.float32, device=input.device)
    load_kernels().batch_norm_grad_sums(*tensors, sums, *options)
    grad_input = grad_residual = None
    if wants_input or wants_residual:
        grad_input = torch.empty_like(input, memory_format=torch.channels_last)
        if wants_residual and activation is not None:
            grad_residual = torch.empty_like(grad_input)
        load_kernels().batch_norm_grad_input(*tensors, sums, grad_input, grad_residual, *options)
        grad_input = _like(grad_input, input)
        grad_residual = grad if activation is None else grad_residual
    grad_weight = sums[1].to(weight.dtype) if wants_weight else None
    grad_bias = sums[0].to(bias.dtype) if wants_bias else None
    return grad_input, grad_residual if wants_residual else None, grad_weight, grad_bias
