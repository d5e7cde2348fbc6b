"""Dilated convolutions of stride 1 tap by tap, each where it meets the image, as a candidate on a CPU.

With a large dilation most taps meet nothing but padding in most of the image. oneDNN's depthwise convolutions
know no fast way from a padding of about 8 pixels on. Its dense ones leave such taps out, but not all of them
in bf16: with AMX it multiplies the padding at the left and right.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._call import Call, Candidate
from ._epilogue import activate_
from ._operands import Pair

_DTYPES = (torch.float32, torch.bfloat16)
# A dense convolution gains nothing where so many of its taps meet the image.
_MOST_USEFUL = 3 / 4


class _Tap(NamedTuple):
    """A tap, the rows and columns of the output that it reaches, and how far away it reads the input."""

    row: int
    column: int
    rows: Pair
    columns: Pair
    shift: Pair

    @property
    def pixels(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def of_input(self, images: Tensor) -> Tensor:
        """The part of `images` [N, H, W, C] that it reads."""
        (top, bottom), (left, right), (down, across) = self.rows, self.columns, self.shift
        return images[:, top + down : bottom + down, left + across : right + across]

    def of_output(self, images: Tensor) -> Tensor:
        """The part of `images` [N, H, W, C] that it adds to."""
        return images[:, self.rows[0] : self.rows[1], self.columns[0] : self.columns[1]]


@functools.lru_cache(4096)
def _taps(size: Pair, out: Pair, kernel: Pair, padding: Pair, dilation: Pair) -> tuple[_Tap, ...]:
    """The taps that meet the image, the most useful first."""
    rows, columns = (
        [_reached(size[axis], out[axis], k * dilation[axis] - padding[axis]) for k in range(kernel[axis])]
        for axis in (0, 1)
    )
    found = [
        _Tap(i, j, rows[i], columns[j], (i * dilation[0] - padding[0], j * dilation[1] - padding[1]))
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return tuple(sorted((tap for tap in found if tap.pixels), key=lambda tap: -tap.pixels))


def _reached(size: int, out: int, shift: int) -> Pair:
    """Where o + shift is one of `size` pixels, of the `out` values of o."""
    begin = min(max(-shift, 0), out)
    return begin, max(begin, min(size - shift, out))


def _taps_of(call: Call) -> tuple[_Tap, ...]:
    height, width = call.weight[2:]
    return _taps(call.input[2:], call.output()[2:], (height, width), call.padding, call.dilation)  # type: ignore[arg-type]


def _serves(call: Call) -> bool:
    if call.stride != (1, 1) or max(call.dilation) == 1 or call.dtype not in _DTYPES:
        return False
    if call.groups > 1:
        return call.weight[:2] == (call.groups, 1)
    out = call.output()
    every = out[2] * out[3] * call.weight[2] * call.weight[3]
    useful = sum([tap.pixels for tap in _taps_of(call)])
    return call.dtype == torch.bfloat16 and useful <= _MOST_USEFUL * every


def _by_tap(weight: Tensor, call: Call) -> Tensor:
    """[kH, kW, C_in, C_out] in the call's dtype; [kH, kW, C] in fp32 of a depthwise convolution."""
    if call.groups > 1:
        return weight[:, 0].permute(1, 2, 0).to(call.dtype).float().contiguous()
    return weight.permute(2, 3, 1, 0).to(call.dtype).contiguous()


def _run(
    call: Call, input: Tensor, by_tap: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float
) -> Tensor:
    batch, channels, height, width = call.output()
    shape = (batch, height, width, channels)
    images, taps = input.permute(0, 2, 3, 1), _taps_of(call)
    start = torch.zeros(channels, dtype=torch.float32, device="cpu") if bias is None else bias.float()
    if call.groups == 1:
        y = start.repeat(*shape[:3], 1)
        _add_products(y, images, by_tap, taps)
    else:
        y = _depthwise(start, shape, images.float(), by_tap, taps)
    if residual is not None:
        y.add_(residual.permute(0, 2, 3, 1))
    return activate_(y, call.activation, slope).to(call.dtype).permute(0, 3, 1, 2)


def _add_products(y: Tensor, images: Tensor, by_tap: Tensor, taps: Sequence[_Tap]) -> None:
    for tap in taps:
        part = tap.of_output(y)
        product = torch.mm(tap.of_input(images).reshape(-1, images.shape[3]), by_tap[tap.row, tap.column])
        part.add_(product.view(part.shape))


def _depthwise(
    start: Tensor, shape: tuple[int, ...], images: Tensor, by_tap: Tensor, taps: Sequence[_Tap]
) -> Tensor:
    if taps and taps[0].pixels == shape[1] * shape[2]:
        first, *taps = taps
        y = torch.addcmul(start, first.of_input(images), by_tap[first.row, first.column])
    else:
        y = start.repeat(*shape[:3], 1)
    for tap in taps:
        tap.of_output(y).addcmul_(tap.of_input(images), by_tap[tap.row, tap.column])
    return y


CONV2D = Candidate(_serves, _by_tap, _run)
