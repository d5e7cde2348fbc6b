"""The dense CRF as registered operators, and their autograd: what compilers, exporters and transforms see.

Each runs the functions of `compute`, to which the vertices of a lattice and the lists of tiles are nobody
else's business; a gradient's operator runs the forward again. The calling thread's backend is an argument:
gradients are computed in a thread of their own, and must be those of the same method. Eager calls need none
of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._backend import backend_of_this_thread, get_backend
from .._layout import in_format
from .._operator import Differentiable, Operator, needs_autograd
from . import compute
from .arguments import check_theta
from .filters import choose_grid_method, choose_method


def _mean_field(unary, features, bilateral, spatial, learned_gamma, gamma, iterations, normalization,
                method, tolerance, eight_bit, alpha, beta) -> Tensor:  # fmt: skip
    if learned_gamma is not None:
        gamma = check_theta(learned_gamma, "theta_gamma", 2, learned_gamma)
    thetas = None if alpha is None else (tuple(alpha), tuple(beta))
    crf = compute.Crf(
        features,
        bilateral,
        spatial,
        gamma,
        iterations,
        normalization,
        method,
        tolerance,
        eight_bit,
        thetas,
    )
    return compute.mean_field(unary, crf)


def _like(tensor, *_) -> Tensor:
    """An unwritten tensor of the same shape, dtype and memory format."""
    memory_format = compute.format_of(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


def _nothing(tensor: Tensor) -> Tensor:
    """A stand-in for a gradient that is not asked for."""
    return tensor.new_empty((tensor.shape[0], 0))


def _forward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(tensor, *args):
        *rest, name = args
        with backend_of_this_thread(name), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            result = function(tensor, *rest)
        # The strides of sizes 1 too are those of the fake.
        if result.dim() == 4:
            return in_format(result, compute.format_of(tensor))
        return result.view(-1).view(result.shape)

    return run


_AUTOGRAD_KEYS = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator: also below a tensor mode, where the dispatcher has left it out."""
    excluded = [key for key in _AUTOGRAD_KEYS if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    try:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        with torch.enable_grad():
            yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _backward(function: Callable[..., Tensor], count: int) -> Callable[..., tuple[Tensor, ...]]:
    """`run(grad, *arguments, needs)`: the gradients that `needs` asks for of function's first `count`."""

    def run(grad, *args):
        *args, name, needs = args
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(args[:count], needs, strict=True)
        ]
        with backend_of_this_thread(name), _autograd(), torch.autocast(grad.device.type, enabled=False):
            result = function(*inputs, *args[count:])
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(result, wanted, grad, materialize_grads=True))
        return tuple(
            next(found).clone(memory_format=compute.format_of(tensor)) if need else _nothing(grad)
            for tensor, need in zip(inputs, needs, strict=True)
        )

    return run


def _fake_gradients(count: int) -> Callable[..., tuple[Tensor, ...]]:
    def run(grad, *args):
        pairs = zip(args[:count], args[-1], strict=True)
        return tuple(_like(tensor) if need else _nothing(grad) for tensor, need in pairs)

    return run


def _decomposition(
    run: Callable[..., Any], is_exact: Callable[..., bool], choice: int = -1
) -> Callable[..., Any]:
    """`run` on ATen; where it is to be traced, and would look for a lattice's vertices, it stays an operator.

    `choice` is the place of the argument that names the backend.
    """

    def reference(*args):
        if torch._C._len_torch_dispatch_stack() and not is_exact(*args):
            return NotImplemented
        chosen = list(args)
        chosen[choice] = "aten"
        return run(*chosen)

    return reference


def _filter_is_exact(values, features, method, *_) -> bool:
    return choose_method(method, math.prod(features.shape[2:]), features.shape[1]) == "exact"


def _mean_field_is_exact(unary, features, bilateral, spatial, learned_gamma, gamma, iterations,
                         normalization, method, *_) -> bool:  # fmt: skip
    size = unary.shape[2:]
    return (features is None or choose_method(method, *features.shape[1:]) == "exact") and (
        spatial is None or choose_grid_method(method, size) == "exact"
    )


def _filter_flops(values, features, method, normalization, *_, **__) -> int:
    """FLOPs of a filter. A lattice's are splat and slice: how much there is to blur, the points decide."""
    batch, channels, *places = values
    points, dim = math.prod(places), features[1]
    channels += normalization is not None
    if choose_method(method, points, dim) == "exact":
        return batch * points**2 * (2 * channels + 2 * dim + 4)
    return batch * points * 4 * (dim + 1) * channels


def _mean_field_flops(unary, features, bilateral, spatial, learned_gamma, gamma, iterations, normalization,
                      method, *_, **__) -> int:  # fmt: skip
    batch, labels, height, width = unary
    pixels = height * width
    total = 0
    if features is not None:
        total += _filter_flops(unary, (batch, features[2]), method, None)
    if spatial is not None and choose_grid_method(method, (height, width)) == "exact":
        total += 2 * batch * labels * pixels * (height + width)
    elif spatial is not None:
        total += _filter_flops(unary, (batch, 2), "lattice", None)
    for energies in (bilateral, spatial):
        if energies is not None:
            total += 2 * batch * pixels * labels * (labels if len(energies) == 2 else 1)
    return iterations * total


_FILTER = "Tensor values, Tensor features, str method, str? normalization, float tolerance, str backend"
_CRF = (
    "Tensor unary, Tensor? features, Tensor? bilateral, Tensor? spatial, Tensor? learned_gamma, "
    "float[]? gamma, SymInt iterations, str? normalization, str method, float tolerance, bool eight_bit, "
    "float[]? alpha, float[]? beta, str backend"
)
GAUSSIAN_FILTER = Operator(
    f"gaussian_filter({_FILTER}) -> Tensor",
    kernels=_forward(compute.gaussian_filter),
    reference=_decomposition(_forward(compute.gaussian_filter), _filter_is_exact),
    fake=_like,
    per_sample=(0, 1),
    flops=_filter_flops,
)
GAUSSIAN_FILTER_BACKWARD = Operator(
    f"gaussian_filter_backward(Tensor grad, {_FILTER}, bool[2] needs) -> (Tensor, Tensor)",
    kernels=_backward(compute.gaussian_filter, 2),
    reference=_decomposition(
        _backward(compute.gaussian_filter, 2), lambda grad, *args: _filter_is_exact(*args), -2
    ),
    fake=_fake_gradients(2),
    per_sample=(0, 1, 2),
    flops=lambda grad, *args, **__: 3 * _filter_flops(*args),
)
MEAN_FIELD = Operator(
    f"mean_field({_CRF}) -> Tensor",
    kernels=_forward(_mean_field),
    reference=_decomposition(_forward(_mean_field), _mean_field_is_exact),
    fake=_like,
    per_sample=(0, 1),
    flops=_mean_field_flops,
)
MEAN_FIELD_BACKWARD = Operator(
    f"mean_field_backward(Tensor grad, {_CRF}, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels=_backward(_mean_field, 5),
    reference=_decomposition(_backward(_mean_field, 5), lambda grad, *args: _mean_field_is_exact(*args), -2),
    fake=_fake_gradients(5),
    flops=lambda grad, *args, **__: 3 * _mean_field_flops(*args),
)


class _GaussianFilter(Differentiable):
    @staticmethod
    def forward(*args):
        return GAUSSIAN_FILTER(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, features, *ctx.options = inputs
        ctx.save_for_backward(values, features)

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:2])
        args = (grad, *ctx.saved_tensors, *ctx.options, needs)
        run = _GaussianFilterGradients.call if needs_autograd(*args[:3]) else GAUSSIAN_FILTER_BACKWARD
        return (*_needed(run(*args), needs), *[None] * 4)


class _GaussianFilterGradients(Differentiable):
    @staticmethod
    def forward(*args):
        return GAUSSIAN_FILTER_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        _once_only("gaussian_filter")


class _MeanField(Differentiable):
    @staticmethod
    def forward(*args):
        return MEAN_FIELD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:5])
        args = (grad, *ctx.saved_tensors, *ctx.options, needs)
        run = _MeanFieldGradients.call if needs_autograd(*args[:6]) else MEAN_FIELD_BACKWARD
        return (*_needed(run(*args), needs), *[None] * 9)


class _MeanFieldGradients(Differentiable):
    @staticmethod
    def forward(*args):
        return MEAN_FIELD_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        _once_only("mean_field")


def _once_only(name: str) -> None:
    raise NotImplementedError(
        f"{name} has gradients of gradients in eager calls only, not under torch.compile or torch.func"
    )


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def gaussian_filter(values: Tensor, features: Tensor, *options) -> Tensor:
    """`compute.gaussian_filter` as one operator."""
    run = _GaussianFilter.call if needs_autograd(values, features) else GAUSSIAN_FILTER
    return run(values, features, *options, get_backend())


def mean_field(unary: Tensor, crf: compute.Crf) -> Tensor:
    """`compute.mean_field` as one operator, to which a compatibility that is a number is a diagonal."""
    learned = crf.gamma if crf.spatial is not None and isinstance(crf.gamma, Tensor) else None
    tensors = (
        unary,
        crf.features,
        *[_diagonal(energies, unary) for energies in (crf.bilateral, crf.spatial)],
        learned,
    )
    gamma = None if isinstance(crf.gamma, Tensor) else list(crf.gamma)
    alpha, beta = (None, None) if crf.thetas is None else map(list, crf.thetas)
    run = _MeanField.call if needs_autograd(*tensors) else MEAN_FIELD
    return run(*tensors, gamma, *crf[4:-1], alpha, beta, get_backend())


def _diagonal(energies: compute.Compatibility | None, unary: Tensor) -> Tensor | None:
    if isinstance(energies, Tensor):
        return energies if energies.dim() > 0 else -energies.expand(unary.shape[1])
    if energies is None:
        return None
    dtype = compute.compute_dtype(unary)
    return torch.full((unary.shape[1],), -energies, dtype=dtype, device=unary.device)
