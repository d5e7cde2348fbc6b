"""A convolution with its epilogue in ATen operations, in as few passes over the images as ATen allows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._epilogue import activate_, apply_epilogue, may_overwrite
from ._operator import needs_autograd

# To the left and right, up to which oneDNN computes a depthwise filter fast: with AVX-512; with AVX2 it is 4.
_FAST_PADDING = 6


def conv2d_aten(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """act(scale * (conv(input, weight) + bias) + shift + residual).

    Scale and shift go into the filter where that is smaller than the result, and where the dtype loses
    nothing by it: rounding a filter to 16 bits again would. What needs no gradient is activated in place,
    except under a transform: `vmap` may map the residual alone.
    """
    # Only for what is folded or added: asking for autocast costs.
    ends = scale is not None or shift is not None or residual is not None
    lossless = ends and input.dtype in (torch.float32, torch.float64) and not _autocasts(input)
    if lossless and (scale is not None or shift is not None) and _pays_to_fold(weight, input):
        weight, bias = _folded(weight, bias, scale, shift)
        scale = shift = None
    y = _convolution(input, weight, bias, stride, padding, dilation, groups)
    if lossless and scale is not None and shift is not None and not _needs_gradient(y, scale, shift):
        factor, term = (t.to(y.dtype).view(-1, 1, 1) for t in (scale, shift))
        y, scale, shift = torch.addcmul(term, y, factor), None, None
    if scale is None and shift is None and may_overwrite(y):
        if lossless and residual is not None and not residual.requires_grad:
            y, residual = y.add_(residual), None
        if residual is None:
            return activate_(y, activation, negative_slope)
    if _in_one_dtype(y, scale, shift, residual, activation):
        return activate_(_over(y, scale, shift, residual), activation, negative_slope)
    return apply_epilogue(y, scale, shift, residual, activation, negative_slope)


def _in_one_dtype(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str | None
) -> bool:
    """True if 16 bits need not be widened in memory: eager, no gradient, and rounding may come first."""
    return (
        y.dtype in (torch.float16, torch.bfloat16)
        and activation in (None, "relu", "relu6")
        and (scale is None) == (shift is None)
        and not torch.compiler.is_compiling()
        and not needs_autograd(y, scale, shift, residual)
    )


def _over(y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    """scale * y + shift + residual, written over y: as many passes, and roundings, as norm and sum take."""
    if scale is not None and shift is not None:
        torch.addcmul(shift[:, None, None], y, scale[:, None, None], out=y)
    return y if residual is None else y.add_(residual)


_functorch_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def _pays_to_fold(weight: Tensor, input: Tensor) -> bool:
    """True if passing over the filter, in a few operations, costs less than one pass over the result."""
    if torch.compiler.is_compiling():
        return True  # the sizes may be symbolic, and must not be asked
    pixels = input.shape[0] * input.shape[-2] * input.shape[-1]
    return weight.shape[0] * pixels > 4 * weight.numel() + 2**15


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if _tracing() is not None:
        return True  # as `may_overwrite` has it
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _convolution(input, weight, bias, stride, padding, dilation, groups: int) -> Tensor:
    """F.conv2d. On a CPU a dilated filter loses the taps that meet nothing but padding.

    oneDNN multiplies them all. Past the padding up to which it computes a depthwise filter fast it takes
    longer with a bias, where it has AVX2 alone, than for the sum afterwards.
    """
    plain = dilation in (1, (1, 1)) or torch.compiler.is_compiling() or _functorch_active()
    plain = plain or min(stride) < 1  # torch says so
    if not input.is_cpu or plain or input.dim() != 4 or weight.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    trimmed, pads, sizes, kernels = weight, list(padding), input.shape, weight.shape
    for axis in (0, 1):
        kernel = kernels[2 + axis]
        drop = _taps_in_padding(sizes[2 + axis], kernel, stride[axis], pads[axis], dilation[axis])
        if drop:
            trimmed = trimmed.narrow(2 + axis, drop, kernel - 2 * drop)
            pads[axis] -= drop * dilation[axis]
    inside = bias is None or groups == 1 or pads[1] <= _FAST_PADDING or bias.dtype != input.dtype
    if inside or _needs_gradient(input, weight, bias):
        return F.conv2d(input, trimmed, bias, stride, pads, dilation, groups)
    return F.conv2d(input, trimmed, None, stride, pads, dilation, groups).add_(bias[:, None, None])


def _taps_in_padding(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many taps at either end of an axis meet no pixel: as many, so that the paddings stay the same."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    drop = 0
    while (
        kernel - 2 * drop > 1
        and (kernel - 1 - drop) * dilation - padding >= size
        and (out - 1) * stride - padding + drop * dilation < 0 <= padding - (drop + 1) * dilation
    ):
        drop += 1
    return drop


def _autocasts(input: Tensor) -> bool:
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def _folded(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The filter and bias of scale * (conv + bias) + shift."""
    if scale is not None:
        weight = weight * scale.to(weight.dtype)[:, None, None, None]
        bias = None if bias is None else bias * scale.to(weight.dtype)
    if shift is not None:
        shift = shift.to(weight.dtype)
        bias = shift if bias is None else bias + shift
    return weight, bias
