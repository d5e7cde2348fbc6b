"""The fused epilogue, act(scale * (conv + bias) + shift + residual), in ATen operations, and its gradient.

Scale and shift are 1-D over output channels, residual has the output's shape. Evaluated in fp32 and rounded
once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

ACTIVATIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "relu6": lambda z, slope: F.relu6(z),
    "gelu": lambda z, slope: F.gelu(z),
    "gelu_tanh": lambda z, slope: F.gelu(z, approximate="tanh"),
    "silu": lambda z, slope: F.silu(z),
    "sigmoid": lambda z, slope: torch.sigmoid(z),
    "hardswish": lambda z, slope: F.hardswish(z),
    "hardsigmoid": lambda z, slope: F.hardsigmoid(z),
}


_IN_PLACE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, slope: F.relu(z, inplace=True),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope, inplace=True),
    "relu6": lambda z, slope: F.relu6(z, inplace=True),
    "silu": lambda z, slope: F.silu(z, inplace=True),
    "sigmoid": lambda z, slope: z.sigmoid_(),
    "hardswish": lambda z, slope: F.hardswish(z, inplace=True),
    "hardsigmoid": lambda z, slope: F.hardsigmoid(z, inplace=True),
}
_functorch_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def may_overwrite(y: Tensor) -> bool:
    """True if writing over `y` hides nothing from a gradient or a transform.

    In no trace: `torch.jit.trace` compares it to one without gradients.
    """
    return not (y.requires_grad or _functorch_active() or _tracing() is not None)


def activate_(y: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """The activation of `y`, written over it where it may be."""
    if activation in _IN_PLACE and may_overwrite(y):
        return _IN_PLACE[activation](y, negative_slope)
    return ACTIVATIONS[activation](y, negative_slope)


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad, z)
    sigmoid = torch.sigmoid(z)  # ATen's own has no derivative
    return grad * sigmoid * (1 + z * (1 - sigmoid))


def _hardsigmoid_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.hardsigmoid_backward(grad, z)
    return torch.where((z > -3) & (z < 3), grad / 6, 0)  # ATen's own has no derivative


# Gradients from the output y, where the output tells; from the pre-activation z, which is computed again,
# otherwise.
_FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda g, y, slope: _aten.threshold_backward(g, y, 0),
    "leaky_relu": lambda g, y, slope: _aten.leaky_relu_backward(g, y, slope, True),
    "relu6": lambda g, y, slope: _aten.hardtanh_backward(g, y, 0, 6),
    "sigmoid": lambda g, y, slope: _aten.sigmoid_backward(g, y),
}
_FROM_INPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda g, z: _aten.gelu_backward(g, z),
    "gelu_tanh": lambda g, z: _aten.gelu_backward(g, z, approximate="tanh"),
    "silu": lambda g, z: _silu_backward(g, z),
    "hardswish": lambda g, z: _aten.hardswish_backward(g, z),
    "hardsigmoid": lambda g, z: _hardsigmoid_backward(g, z),
}


def keeps_output(activation: str | None, negative_slope: float) -> bool:
    """True if the gradient follows from the output: not where a slope of zero or less hides the sign."""
    return activation in _FROM_OUTPUT and not (activation == "leaky_relu" and negative_slope <= 0)


def check_activation(activation: str | None) -> None:
    """Raise ValueError for a name no epilogue knows."""
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {names}, got {activation!r}")


def check_epilogue(
    shape: tuple[int, ...],
    device: torch.device,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise for operands of the epilogue that do not fit an output [N, C, H, W] or [C, H, W] on `device`."""
    channels = shape[-3]
    for name, operand in (("scale", scale), ("shift", shift), ("residual", residual)):
        if operand is not None and operand.device != device:
            raise RuntimeError(f"input and {name} must share a device, got {device} and {operand.device}")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise RuntimeError(
                f"{name} must have shape [{channels}] (output channels), got {list(vector.shape)}"
            )
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise RuntimeError(f"residual must have the output's shape {list(shape)}, got {list(residual.shape)}")


def apply_epilogue(
    conv: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """The epilogue in ATen operations, on a convolution [N, C, H, W] or [C, H, W] that has its bias."""
    if scale is None and shift is None and residual is None:
        return conv if activation is None else ACTIVATIONS[activation](conv, negative_slope)
    z = _widened(conv)
    if scale is not None:
        z = z * scale[:, None, None].to(z.dtype)
    if shift is not None:
        z = z + shift[:, None, None].to(z.dtype)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return ACTIVATIONS[activation](z, negative_slope).to(conv.dtype)


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _channel_sums(t: Tensor) -> Tensor:
    """Sums over all but the channels, in fp32 at least: in fp16 they could overflow before they are cast."""
    dtype = torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
    return t.sum((0, 2, 3), dtype=dtype)


class EpilogueGradients(NamedTuple):
    """The epilogue's gradients: of the convolution's result, bias, scale, shift and residual."""

    conv: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None


def activation_backward(
    grad: Tensor,
    output: Tensor | None,
    recompute: Callable[[], Tensor],
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """The gradient before the activation, from its output where `keeps_output`, else from `recompute()`."""
    if activation is None:
        return grad
    if output is not None:
        return _FROM_OUTPUT[activation](grad, output, negative_slope)
    z = recompute()
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(grad, z, negative_slope, False)
    if activation in _FROM_INPUT:
        return _FROM_INPUT[activation](grad, z)
    # Of these, ReLU's and ReLU6's derivatives are the same from the input.
    z = torch.sigmoid(z) if activation == "sigmoid" else z
    return _FROM_OUTPUT[activation](grad, z, negative_slope)


def epilogue_backward(
    grad: Tensor,
    output: Tensor | None,
    recompute: Callable[..., Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: tuple[bool, bool, bool, bool],
) -> EpilogueGradients:
    """Gradients through the epilogue, in differentiable ATen operations: double backward follows by itself.

    `recompute(bias, scale, shift, residual)` computes the layer again without its activation; it is called
    only where the output does not tell the gradient, or where `scale` needs one. `needs` says which of (bias,
    scale, shift, residual) do.
    """
    grad_z = activation_backward(
        grad, output, lambda: recompute(bias, scale, shift, residual), activation, negative_slope
    )
    need_bias, need_scale, need_shift, need_residual = needs
    grad_scale = grad_shift = grad_bias = None
    if need_shift and shift is not None:
        grad_shift = _channel_sums(grad_z).to(shift.dtype)
    if need_scale and scale is not None:
        conv = recompute(bias, None, None, None)
        grad_scale = (_widened(grad_z) * _widened(conv)).sum((0, 2, 3)).to(scale.dtype)
    grad_conv = grad_z
    if scale is not None:
        grad_conv = (grad_z * scale[:, None, None]).to(grad_z.dtype)
    if need_bias and bias is not None:
        grad_bias = _channel_sums(grad_conv).to(bias.dtype)
    grad_residual = grad_z.to(residual.dtype) if need_residual and residual is not None else None
    return EpilogueGradients(grad_conv, grad_bias, grad_scale, grad_shift, grad_residual)
