"""The gradients of batch norm in training with an activation, in two passes over the gradient and the image.

g, the gradient before the activation, is computed in both from the normalized image h. The first sums g and
g h over the pixels, which are the gradients of bias and weight; of these sums and g the second makes
grad_input = weight / std (g - mean(g) - h mean(g h)).
"""

import torch
import triton
import triton.language as tl

from ._batch_norm import _before_activation, _normalized, row_candidates, rows_of
from ._launch import Launch, launch_for, layout_key
from ._split import reduce_partials
from ._tiles import register_candidates


@triton.jit
def _slope(z, negative_slope, ACTIVATION: tl.constexpr):
    # The activation's derivative, from what it is given; at its corners as torch has it.
    if ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, 1.0, negative_slope)
    elif ACTIVATION == "relu6":
        return tl.where((z > 0.0) & (z < 6.0), 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        return s * (1.0 - s)
    elif ACTIVATION == "hardswish":
        return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, 1.0))
    elif ACTIVATION == "hardsigmoid":
        return tl.where((z > -3.0) & (z < 3.0), 1.0 / 6.0, 0.0)


@triton.jit
def _gradient_before(
    grad_ptr, normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok, negative_slope,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad_ptr + offsets, mask=ok, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        z = _before_activation(normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok)
        g *= _slope(z, negative_slope, ACTIVATION)
    return g


@triton.jit
def _batch_norm_grad_sums_kernel(
    grad_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, partials_ptr,
    pixels, C, steps, eps, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    of_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, steps):
        row = (chunk * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = (row < pixels)[:, None] & c_ok[None, :]
        offsets = row[:, None] * C + c[None, :]
        normalized, _ = _normalized(x_ptr, mean_ptr, var_ptr, offsets, ok, c, c_ok, eps)
        g = _gradient_before(
            grad_ptr, normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok, negative_slope,
            ACTIVATION,
        )  # fmt: skip
        of_bias += g
        of_weight += g * normalized
    tl.store(partials_ptr + 2 * chunk * C + c, tl.sum(of_bias, 0), mask=c_ok)
    tl.store(partials_ptr + (2 * chunk + 1) * C + c, tl.sum(of_weight, 0), mask=c_ok)


@triton.jit
def _batch_norm_grad_input_kernel(
    grad_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, sums_ptr,
    grad_input_ptr, grad_residual_ptr, pixels, C, eps, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C
    ok = (row < pixels)[:, None] & c_ok[None, :]
    offsets = row[:, None] * C + c[None, :]
    normalized, scale = _normalized(x_ptr, mean_ptr, var_ptr, offsets, ok, c, c_ok, eps)
    g = _gradient_before(
        grad_ptr, normalized, weight_ptr, bias_ptr, residual_ptr, offsets, ok, c, c_ok, negative_slope,
        ACTIVATION,
    )  # fmt: skip
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + offsets, g.to(grad_residual_ptr.dtype.element_ty), mask=ok)
    mean_g = tl.load(sums_ptr + c, mask=c_ok, other=0.0) / pixels
    mean_gh = tl.load(sums_ptr + C + c, mask=c_ok, other=0.0) / pixels
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    grad_input = (g - mean_g[None, :] - normalized * mean_gh[None, :]) * scale[None, :]
    tl.store(grad_input_ptr + offsets, grad_input.to(grad_input_ptr.dtype.element_ty), mask=ok)


def batch_norm_grad_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    sums: torch.Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> None:
    """sums fp32 [2, C] = gradients of the bias and the weight; the rest as `batch_norm_apply` has it."""

    def make() -> tuple[Launch, int]:
        rows = rows_of("batch_norm_grad_sums", x, sums=True)
        blocks = {"BLOCK_M": rows.tile.block_m, "BLOCK_N": rows.tile.block_n}
        scalars = (rows.pixels, rows.channels, rows.steps, float(eps), float(negative_slope))
        constants = {"ACTIVATION": activation, **blocks}
        launch = Launch(_batch_norm_grad_sums_kernel, rows.grid, scalars, constants, rows.tile)
        return launch, rows.chunks

    tensors = (grad, x, mean, var, weight, bias, residual)
    key = ("batch_norm_grad_sums", x.device, layout_key(*tensors, sums), eps, activation, negative_slope)
    launch, chunks = launch_for(key, make)
    partials = torch.empty((chunks, *sums.shape), dtype=torch.float32, device=x.device)
    launch(*tensors, partials)
    reduce_partials(partials, sums)


def batch_norm_grad_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    sums: torch.Tensor,
    grad_input: torch.Tensor,
    grad_residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> None:
    """grad_input and, if given, grad_residual; `sums` are `batch_norm_grad_sums`'s."""

    def make() -> Launch:
        rows = rows_of("batch_norm_grad_input", x, sums=False)
        blocks = {"BLOCK_M": rows.tile.block_m, "BLOCK_N": rows.tile.block_n}
        scalars = (rows.pixels, rows.channels, float(eps), float(negative_slope))
        constants = {"ACTIVATION": activation, **blocks}
        return Launch(_batch_norm_grad_input_kernel, rows.grid, scalars, constants, rows.tile)

    tensors = (grad, x, mean, var, weight, bias, residual, sums, grad_input, grad_residual)
    key = ("batch_norm_grad_input", x.device, layout_key(*tensors), eps, activation, negative_slope)
    launch_for(key, make)(*tensors)


register_candidates("batch_norm_grad_sums", row_candidates, uses=("_batch_norm",))
register_candidates("batch_norm_grad_input", row_candidates, uses=("_batch_norm",))
