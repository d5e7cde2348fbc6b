"""Transposed convolution with channelwise separable weights (FCN's bilinear upsampling), one axis at a time.

A weight that is zero off the channel diagonal and an outer product on it upsamples each channel alone, rows
and columns one after the other. A 64x64 kernel at stride 32 then costs 2 multiply-adds a tap and axis instead
of 64 * 64 * channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import is_channels_last

_LEAST_STRIDE = 8


class Factors(NamedTuple):
    """1-D kernels, outer product weight[c, c]: rows [C, kH], columns [C, kW]; [1, k] if all are alike.

    `channels_last`: whether the weight is, and asks for a result that is.
    """

    rows: Tensor
    columns: Tensor
    channels_last: bool = False


def channelwise_factors(input: Tensor, weight: Tensor, stride, groups: int, dilation) -> Factors | None:
    """The factors of `weight` if it is channelwise and separable, on a CPU, where looking pays; else None.

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
        or input.dim() != 4
        or weight.shape[0] != weight.shape[1]
        or weight.numel() == 0
        or input.shape[1] != weight.shape[0]
    ):
        return None
    # A trace with gradients is compared to one without.
    if weight.requires_grad and (torch.is_grad_enabled() or torch._C._get_tracing_state() is not None):
        return None
    diagonal = weight.detach().diagonal().permute(2, 0, 1)  # [C, kH, kW]
    if weight.count_nonzero() != diagonal.count_nonzero():
        return None
    channels, _, kernel_w = diagonal.shape
    flat = diagonal.reshape(channels, -1)
    peak = flat.abs().argmax(1)
    value = flat.gather(1, peak[:, None])
    each = torch.arange(channels, device=weight.device)
    columns = diagonal[each, peak // kernel_w]  # the row through the largest weight
    rows = diagonal[each, :, peak % kernel_w] / torch.where(value == 0, 1, value)
    if not torch.isfinite(flat).all():
        return None
    product = rows[:, :, None] * columns[:, None, :]
    # The product of two rounded factors differs from the rounded product by less than 2 eps.
    if ((product - diagonal).abs() > 2 * torch.finfo(weight.dtype).eps * value.abs()[..., None]).any():
        return None
    if (rows == rows[:1]).all() and (columns == columns[:1]).all():
        rows, columns = rows[:1], columns[:1]
    return Factors(rows, columns, is_channels_last(weight))


def _upsample_rows(x: Tensor, kernel: Tensor, stride: int, padding: int, out: int) -> Tensor:
    """The 1-D transposed convolution along the second to last dimension: [..., H, R] to [..., out, R].

    Output stride * j + phase is the sum over t of x[j - t] kernel[phase + t * stride]: one small matrix
    [stride, taps] for all j. `kernel` [F, k] holds one filter for all, or one for each index of the third to
    last dimension.
    """
    size, length = x.shape[-2], kernel.shape[-1]
    taps = -(-length // stride)
    steps = -(-(padding + out) // stride)
    padded = F.pad(x, (0, 0, taps - 1, steps - size))
    windows = padded.unfold(-2, taps, 1).transpose(-1, -2)  # [..., j, taps, R]
    filters = F.pad(kernel, (0, taps * stride - length)).unflatten(-1, (taps, stride))
    matrix = filters.flip(-2).transpose(-1, -2)  # [F, stride, taps], oldest input first as in the windows
    matrix = matrix[0] if kernel.shape[0] == 1 else matrix[:, None]
    y = _dense(matrix @ windows, (*x.shape[:-2], steps * stride, x.shape[-1]))  # [..., j * stride, R]
    return y.narrow(-2, padding, out)


def _dense(t: Tensor, shape: Sequence[int]) -> Tensor:
    """`t` as `shape`, with exactly that shape's strides: `contiguous` leaves those of sizes 1 as they are.

    By way of one dimension: torch 2.11 cannot export the merging of two out of several with free sizes.
    """
    return t.contiguous().flatten().view(shape)


def upsample_separable(
    input: Tensor, factors: Factors, stride, padding, output_padding, bias: Tensor | None
) -> Tensor:
    """The transposed convolution of [N, C, H, W] or [C, H, W] with the weight that `factors` stand for.

    Along the columns first: the intermediate then has the small height. channels_last if input or weight is.
    """
    geometry = []
    for axis, kernel in ((-2, factors.rows), (-1, factors.columns)):
        s, p, o = (v if isinstance(v, int) else v[axis % len(v)] for v in (stride, padding, output_padding))
        out = (input.shape[axis] - 1) * s - 2 * p + kernel.shape[1] + o
        if out < 1:
            raise RuntimeError(
                f"calculated output size {out} along axis {axis} is too small, for input {list(input.shape)}"
            )
        geometry.append((s, p, out))
    rows, columns = factors.rows.to(input.dtype), factors.columns.to(input.dtype)
    channels_last = input.dim() == 4 and (
        is_channels_last(input) or (factors.channels_last and input.numel() > 0)  # as torch has it
    )
    if channels_last and rows.shape[0] == columns.shape[0] == 1:
        y = _upsample_rows(input.permute(0, 2, 3, 1), columns, *geometry[1])  # [N, H, W_out, C]
        y = _upsample_rows(y.flatten(2), rows, *geometry[0]).unflatten(-1, y.shape[-2:]).permute(0, 3, 1, 2)
    else:
        y = _upsample_rows(input.transpose(-1, -2), columns, *geometry[1]).transpose(-1, -2)
        y = _upsample_rows(y.contiguous(), rows, *geometry[0])
    # Not `memory_format=`, which vmap does not know.
    if channels_last:
        y = y.permute(0, 2, 3, 1)
        y = _dense(y, y.shape).permute(0, 3, 1, 2)
    else:
        y = _dense(y, y.shape)
    # Under autocast the products are narrower than the bias.
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]
