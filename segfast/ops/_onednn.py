"""oneDNN's convolutions with packed weights and everything after them in one pass, as candidates on a CPU.

They come with torch: inductor calls the same operators. These are private to torch, so nothing else speaks to
them, and what does not answer here is no candidate.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ._call import Call, Candidate
from ._epilogue import activate_

_CHANNELS_LAST = torch.channels_last
# Our activations by oneDNN's name, scalars and algorithm; leaky_relu's slope is put in at the call.
_ONEDNN_ACTIVATIONS: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": ("leaky_relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "hardswish": ("hardswish", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
}


def _conv2d(input, packed, bias, stride, padding, dilation, groups, residual, activation, slope) -> Tensor:
    operator = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        name, scalars, algorithm = _ONEDNN_ACTIVATIONS[activation]
        scalars = [slope] if activation == "leaky_relu" else scalars
        return operator.default(
            input, packed, bias, padding, stride, dilation, groups, name, scalars, algorithm
        )
    # With groups torch makes separate passes, and knows no relu among them in bf16.
    last = "relu" if activation == "relu" and groups == 1 else None
    y = operator.binary(
        input, residual, packed, bias, padding, stride, dilation, groups, "add", 1.0, last, [], ""
    )
    return y if last == activation else activate_(y, activation, slope)


# In oneDNN's description between the dtype and what is of 8 bytes again: whatever was there.
_GAP = slice(108, 112)


def _run_conv2d(
    call: Call, input: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    if residual is not None:
        residual = residual.contiguous(memory_format=_CHANNELS_LAST)
    return _conv2d(
        input.contiguous(memory_format=_CHANNELS_LAST),
        packed,
        bias,
        call.stride,
        call.padding,
        call.dilation,
        call.groups,
        residual,
        call.activation,
        slope,
    )


def _pack_conv2d(weight: Tensor, call: Call) -> Tensor:
    weight = weight.to(call.dtype).contiguous()
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, call.padding, call.stride, call.dilation, call.groups, call.input
    )


def _run_conv_transpose2d(
    call: Call, input: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    name, scalars, algorithm = _ONEDNN_ACTIVATIONS[None if residual is not None else call.activation]
    y = torch.ops.mkldnn._convolution_transpose_pointwise(
        input.contiguous(memory_format=_CHANNELS_LAST),
        packed,
        bias,
        call.padding,
        call.output_padding,
        call.stride,
        call.dilation,
        call.groups,
        name,
        [slope] if name == "leaky_relu" else scalars,
        algorithm,
    )
    return y if residual is None else activate_(y.add_(residual), call.activation, slope)


def _pack_conv_transpose2d(weight: Tensor, call: Call) -> Tensor:
    weight = weight.to(call.dtype).contiguous()
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, call.padding, call.output_padding, call.stride, call.dilation, call.groups, call.input
    )


@functools.cache
def _answers(operation: str, dtype: torch.dtype) -> bool:
    """True if this torch has the operators, with these arguments, and this CPU the instructions."""
    if not torch.backends.mkldnn.is_available():
        return False
    candidate = CONV_TRANSPOSE2D if operation == "conv_transpose2d" else CONV2D
    shape = (16, 16, 3, 3)
    pairs: Any = {"stride": (1, 1), "padding": (1, 1), "output_padding": (0, 0), "dilation": (1, 1)}
    call = Call(
        operation=operation,
        dtype=dtype,
        channels_last=True,
        input=(1, 16, 4, 4),
        weight=shape,
        groups=1,
        bias=True,
        residual=True,
        activation="relu",
        threads=torch.get_num_threads(),
        **pairs,
    )
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.no_grad():
            x = torch.ones(call.input, dtype=dtype, device="cpu")
            packed = candidate.prepare(torch.ones(shape, dtype=torch.float32, device="cpu"), call)
            _layout(packed)
            y = candidate.run(call, x, packed, torch.ones(16, dtype=dtype, device="cpu"), x, 0.01)
            return bool(y[0, 0, 1, 1] == 9 * 16 + 2)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _serves(call: Call) -> bool:
    known = call.dtype in (torch.float32, torch.bfloat16) and call.activation in _ONEDNN_ACTIVATIONS
    return known and _answers(call.operation, call.dtype)


def _form(call: Call) -> Any:
    """All that oneDNN chooses a layout by. A weight in another one is converted in every call, for long."""
    return call.input, call.threads


def _layout(packed: Tensor) -> bytes:
    """OneDNN's description of a packed weight, of which a few are enough for all sizes of images."""
    description = bytearray(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    description[_GAP] = bytes(4)
    return bytes(description)


CONV2D = Candidate(_serves, _pack_conv2d, _run_conv2d, _form, _layout)
CONV_TRANSPOSE2D = Candidate(_serves, _pack_conv_transpose2d, _run_conv_transpose2d, _form, _layout)
