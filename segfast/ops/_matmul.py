"""Convolutions that are one matrix product over the pixels, as candidates on a CPU.

1x1 convolutions of stride 1, and transposed ones whose windows lie side by side (kernel and stride alike).
"""

import math

import torch
from torch import Tensor

from ._call import Call, Candidate
from ._epilogue import activate_

_DTYPES = (torch.float32, torch.bfloat16)
_ONE, _NONE = (1, 1), (0, 0)
# BLAS takes several times as long for fewer columns of the result, of which the transpose has few rows.
_FEW = 16


def _serves_conv2d(call: Call) -> bool:
    geometry = (call.weight[2:], call.stride, call.padding)
    return geometry == (_ONE, _ONE, _NONE) and call.groups == 1 and call.dtype in _DTYPES


def _as_matrix(weight: Tensor, call: Call) -> Tensor:
    """[C_in, C_out]."""
    return _laid_out(weight.flatten(1).t().to(call.dtype))


def _run_conv2d(
    call: Call, input: Tensor, matrix: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    y = _product(input, matrix, bias)
    if residual is not None:
        y.add_(_rows(residual))
    batch, _, height, width = call.input
    y = activate_(y, call.activation, slope)
    y = y.view(batch, height, width, -1).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)


def _serves_conv_transpose2d(call: Call) -> bool:
    plain = (call.padding, call.output_padding, call.dilation) == (_NONE, _NONE, _ONE)
    return plain and call.weight[2:] == call.stride and call.groups == 1 and call.dtype in _DTYPES


def _as_windows(weight: Tensor, call: Call) -> Tensor:
    """[C_in, kH * kW * C_out]."""
    return _laid_out(weight.permute(0, 2, 3, 1).flatten(1).to(call.dtype))


def _run_conv_transpose2d(
    call: Call, input: Tensor, matrix: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    batch, _, height, width = call.input
    rows, columns = call.stride
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(math.prod(call.stride))
    y = _product(input, matrix, bias)
    if residual is None:
        y = activate_(y, call.activation, slope)
    y = y.view(batch, height, width, rows, columns, -1).permute(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, height * rows, width * columns, -1).permute(0, 3, 1, 2)
    return y if residual is None else activate_(y.add_(residual), call.activation, slope)


def _laid_out(matrix: Tensor) -> Tensor:
    """The matrix as `_product` reads it."""
    return matrix.t().contiguous().t() if matrix.shape[1] < _FEW else matrix.contiguous()


def _product(input: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """A row for each pixel; of few columns, one column after the other in memory."""
    pixels = _rows(input)
    if matrix.shape[1] < _FEW:
        columns, pixels = matrix.t(), pixels.t()
        y = torch.mm(columns, pixels) if bias is None else torch.addmm(bias[:, None], columns, pixels)
        return y.t()
    return torch.mm(pixels, matrix) if bias is None else torch.addmm(bias, pixels, matrix)


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] as a row of channels for each pixel."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


CONV2D = Candidate(_serves_conv2d, _as_matrix, _run_conv2d)
CONV_TRANSPOSE2D = Candidate(_serves_conv_transpose2d, _as_windows, _run_conv_transpose2d)
