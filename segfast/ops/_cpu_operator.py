"""The operator of a compiled graph that runs what is chosen for a convolution on this CPU.

A compiler sees through `_cpu`, where candidates are Python; this it calls as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _cpu
from ._epilogue import apply_epilogue
from ._layout import output_format
from ._operator import LIBRARY

_NAME = "cpu_convolution"
LIBRARY.define(
    f"{_NAME}(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, bool transposed, int[2] stride, "
    "int[2] padding, int[2] output_padding, int[2] dilation, int groups, str? activation, "
    "float negative_slope) -> Tensor",
    # Inductor hands over the layout that the tensors have in its own program.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """act(conv(input, weight) + bias + residual) in the layout of `input`."""
    pairs = [tuple(each) for each in (stride, padding, output_padding, dilation)]
    geometry: tuple[Any, ...] = (*pairs, groups)
    image = input.contiguous(memory_format=torch.channels_last)
    operation = "conv_transpose2d" if transposed else "conv2d"
    ending = (residual, activation, negative_slope)
    y = _cpu.chosen(operation, image, weight, bias, *geometry, *ending)  # type: ignore[call-arg]
    if y is None:
        y = _by_aten(input, weight, bias, transposed, geometry)
        y = apply_epilogue(y, None, None, residual, activation, negative_slope)
    return y.contiguous(memory_format=output_format(input, weight))


def _by_aten(input, weight, bias, transposed, geometry) -> Tensor:
    stride, padding, output_padding, dilation, groups = geometry
    if transposed:
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _fake(input, weight, bias, residual, transposed, stride, padding, output_padding, dilation, groups, *_):
    y = _by_aten(input, weight, bias, transposed, (stride, padding, output_padding, dilation, groups))
    return torch.empty_like(y, memory_format=output_format(input, weight))


LIBRARY.impl(_NAME, _run, "CPU")
torch.library.register_fake(f"segfast::{_NAME}", _fake, lib=LIBRARY)
cpu_convolution = torch.ops.segfast.cpu_convolution.default


@register_flop_formula(torch.ops.segfast.cpu_convolution)
def _flops(input, weight, bias, residual, transposed, *_, out_shape=None, **__) -> int:
    return conv_flop_count(input, weight, out_shape, transposed=transposed)
