"""Transposed convolution with channelwise separable weights (FCN's bilinear upsampling) as two 1-D matrix products.

A weight that is zero off the channel diagonal and an outer product on it upsamples each channel alone, rows
and columns one after the other. A 64x64 kernel at stride 32 then costs 2 multiply-adds a tap and axis instead
of 64 * 64 * channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST_STRIDE = 8


class Factors(NamedTuple):
    """The 1-D kernels of each channel: rows [C, kH] and columns [C, kW]; weight[c, c] is their outer product."""

    rows: Tensor
    columns: Tensor


def channelwise_factors(input: Tensor, weight: Tensor, stride, groups: int, dilation) -> Factors | None:
    """The factors of `weight` if it is channelwise and separable, on a CPU, where looking pays; otherwise None.

    Looked for where C_in == C_out, groups == 1, dilation == 1, every stride is at least 8 and the weight
    needs no gradient.
    """
    if input.device.type != "cpu" or (stride if isinstance(stride, int) else min(stride)) < _LEAST_STRIDE:
        return None
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return None  # the answer depends on values
    if (
        groups != 1
        or dilation not in (1, (1, 1))
        or not weight.is_floating_point()
        or input.dtype != weight.dtype
    ):
        return None
    if (
        weight.dim() != 4
        or weight.shape[0] != weight.shape[1]
        or weight.numel() == 0
        or input.shape[-3] != weight.shape[0]
    ):
        return None
    if torch.is_grad_enabled() and weight.requires_grad:
        return None
    diagonal = weight.detach().diagonal().permute(2, 0, 1)  # [C, kH, kW]
    if weight.count_nonzero() != diagonal.count_nonzero():
        return None
    channels, _, kernel_w = diagonal.shape
    flat = diagonal.reshape(channels, -1)
    peak = flat.abs().argmax(1)
    value = flat.gather(1, peak[:, None])
    each = torch.arange(channels)
    columns = diagonal[each, peak // kernel_w]  # the row through the largest weight
    rows = diagonal[each, :, peak % kernel_w] / torch.where(value == 0, 1, value)
    if not torch.isfinite(flat).all():
        return None
    product = rows[:, :, None] * columns[:, None, :]
    if ((product - diagonal).abs() > 8 * torch.finfo(weight.dtype).eps * value.abs()[..., None]).any():
        return None
    return Factors(rows, columns)


def _spread(kernel: Tensor, size: int, out: int, stride: int, padding: int) -> Tensor:
    """[C, out, size] with entry (o, i) = kernel[o + padding - stride * i], zero outside the kernel."""
    tap = (
        torch.arange(out, device=kernel.device)[:, None]
        + padding
        - stride * torch.arange(size, device=kernel.device)
    )
    inside = (tap >= 0) & (tap < kernel.shape[1])
    return torch.where(
        inside,
        kernel[:, tap.clamp(0, kernel.shape[1] - 1)],
        torch.zeros((), dtype=kernel.dtype, device=kernel.device),
    )


def upsample_separable(
    input: Tensor, factors: Factors, stride, padding, output_padding, bias: Tensor | None
) -> Tensor:
    """The transposed convolution of [N, C, H, W] with the weight that `factors` stand for."""
    matrices = []
    for axis, kernel in zip((2, 3), factors, strict=True):
        s, p, o = (
            v if isinstance(v, int) else v[(axis - 2) % len(v)] for v in (stride, padding, output_padding)
        )
        size = input.shape[axis]
        out = (size - 1) * s - 2 * p + kernel.shape[1] + o
        if out < 1:
            raise RuntimeError(
                f"calculated output size {out} along axis {axis} is too small, for input {list(input.shape)}"
            )
        if (kernel == kernel[:1]).all():
            kernel = kernel[:1]  # one matrix for all channels: one large product instead of many small ones
        matrices.append(_spread(kernel, size, out, s, p).to(input.dtype))
    rows, columns = matrices
    # Columns first: the intermediate has the small height.
    y = rows @ (input @ columns.transpose(1, 2))
    if bias is not None:
        y = y + bias[:, None, None]
    if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        y = y.contiguous(memory_format=torch.channels_last)
    return y
