"""Convolutions where no kernel of ours runs: by the candidate that was fastest on this CPU, else by ATen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dilated_taps, _matmul, _onednn, _winograd
from ._backend import change_explanation, is_noting
from ._call import CANDIDATES, Call, Candidate
from ._choice import ATEN, PLAIN, ZEROS, can_choose, choices, choose, fits, prepared
from ._conv2d_aten import conv2d_aten
from ._epilogue import activate_, apply_epilogue
from ._operands import Pair
from ._operator import autocast_dtype

_NO_PADDING = (0, 0)
_DTYPES = (torch.float32, torch.bfloat16)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """act(scale * (conv(input, weight) + bias) + shift + residual)."""
    # A shift alone is a bias.
    if input.is_cpu and scale is None and (bias is None or shift is None):
        geometry = (stride, padding, _NO_PADDING, dilation, groups)
        term = bias if shift is None else shift
        y = chosen("conv2d", input, weight, term, *geometry, residual, activation, negative_slope)
        if y is not None:
            return y
    operands = (input, weight, bias, stride, padding, dilation, groups)
    return conv2d_aten(*operands, scale, shift, residual, activation, negative_slope)


def bound(
    operation: str,
    dtype: torch.dtype,
    shape: torch.Size,
    channels_last: bool,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Pair, Pair, Pair, Pair, int],
    residual: bool,
    activation: str | None,
) -> tuple[Call, Candidate, object, Tensor | None] | None:
    """The call of an operation on images of `shape`, its candidate, and weight and bias as that takes them.

    `geometry` is stride, padding, output padding, dilation and groups. None where nothing is chosen, or where
    weight or bias are of another dtype, which autocast alone casts.
    """
    allowed = (dtype, torch.float32) if torch.is_autocast_enabled("cpu") else (dtype,)
    threads = torch.get_num_threads()
    rest = (*geometry, bias is not None, residual, activation, threads)
    call = Call(operation, dtype, channels_last, shape, weight.shape, *rest)
    plain = all([t is None or (type(t) in PLAIN and t.dtype in allowed) for t in (weight, bias)])
    name = choose(call, weight, bias) if dtype in _DTYPES and plain else None
    if name is None or not fits(call, bias, None):
        return None
    try:
        ready = prepared(weight, call, name)
    except RuntimeError:
        return None  # as oneDNN refuses some geometries
    bias = None if bias is None else bias.detach().to(dtype)
    return call, CANDIDATES[operation][name], ready, bias


def conv_transpose2d_chosen(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor | None:
    """act(convT(input, weight) + bias + residual), or None where ATen is to compute it."""
    geometry = (stride, padding, output_padding, dilation, groups)
    return chosen("conv_transpose2d", input, weight, bias, *geometry, residual, activation, negative_slope)


def chosen(
    operation: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
) -> Tensor | None:
    if input.dim() != 4 or weight.dim() != 4 or not can_choose(input, weight, bias, residual):
        return None
    autocast = autocast_dtype(input)
    dtype = autocast or input.dtype
    if dtype not in _DTYPES or not _in_dtype(dtype, autocast, weight, bias, residual):
        return None
    call = Call(
        operation,
        dtype,
        input.is_contiguous(memory_format=torch.channels_last),
        input.shape,
        weight.shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        bias is not None,
        residual is not None,
        activation,
        torch.get_num_threads(),
    )
    name = choose(call, weight, bias, residual)
    plain = name == ATEN and autocast is None and call.channels_last
    if name is None or plain or not fits(call, bias, residual):
        return None
    if name == ZEROS:
        y = torch.empty(call.output(), dtype=dtype, device="cpu", memory_format=torch.channels_last)
        return y.zero_()
    candidate = CANDIDATES[operation][name]
    if autocast is not None:
        input = input.to(dtype)
        bias, residual = [None if t is None else t.to(dtype) for t in (bias, residual)]
    try:
        y = candidate.run(call, input, prepared(weight, call, name), bias, residual, slope)
    except RuntimeError:
        return None  # as oneDNN refuses some geometries: what is wrong with another, torch says
    if is_noting():
        change_explanation(name, _because(call))
    return y


def _in_dtype(
    dtype: torch.dtype, autocast: torch.dtype | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None,
) -> bool:  # fmt: skip
    """True if the operands are of the dtype, or ones that autocast casts to it."""
    allowed = (dtype,) if autocast is None else (dtype, torch.float32)
    return all([t is None or t.dtype in allowed for t in (weight, bias, residual)])


def _because(call: Call) -> str:
    choice = choices().find(call)
    return "preferred until it is measured" if choice is None else str(choice)


def _cast(weight: Tensor, call: Call) -> Tensor:
    return weight.to(call.dtype)


def _always(call: Call) -> bool:
    return True


# In channels_last, as all candidates: a layer that changed the layout would cost those after it more.
def _aten_conv2d(call, input, weight, bias, residual, slope) -> Tensor:
    input = input.contiguous(memory_format=torch.channels_last)
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    return conv2d_aten(input, weight, bias, *geometry, None, None, residual, call.activation, slope)


def _aten_conv_transpose2d(call, input, weight, bias, residual, slope) -> Tensor:
    input = input.contiguous(memory_format=torch.channels_last)
    geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
    y = F.conv_transpose2d(input, weight, bias, *geometry)
    if residual is None:
        return activate_(y, call.activation, slope)
    return apply_epilogue(y, None, None, residual, call.activation, slope)


# Preferred first, while nothing is measured.
CANDIDATES["conv2d"] = {
    "onednn": _onednn.CONV2D,
    "winograd": _winograd.CONV2D,
    "matmul": _matmul.CONV2D,
    "taps": _dilated_taps.CONV2D,
    ATEN: Candidate(_always, _cast, _aten_conv2d),
}
CANDIDATES["conv_transpose2d"] = {
    "onednn": _onednn.CONV_TRANSPOSE2D,
    "matmul": _matmul.CONV_TRANSPOSE2D,
    ATEN: Candidate(_always, _cast, _aten_conv_transpose2d),
}
