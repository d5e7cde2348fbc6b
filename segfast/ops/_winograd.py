"""Dense 3x3 convolution on a CPU in fp32 with a quarter of the multiplications: Winograd's F(4x4, 3x3).

The output is cut into tiles of 4x4, each computed from 6x6 of the input: Y = A' [(G g G') * (B' d B)] A,
where the product in the middle is, for each of the 36 points, a matrix product over channels. B' and A' stand
for evaluation and interpolation of polynomials at 0, 1, -1, 1/2, -2 and infinity. Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015; the points after Barabasz et al., "Error Analysis and
Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018.

Of a dilated convolution every d-th row and column is an image of its own, and not dilated.

Few rows of tiles are computed at a time, by one thread, so that all between input and output stays in a
core's own cache; but of few tiles in all torch divides every step between its threads, or each of them would
read all weights:

    rows of the image --B'--> [row, 6, column, C] --gather--> [tile, 6, 6, C] --B'--> [tile, 36, C]
    --products over C--> [tile, 36, K] --A'--> [tile, 4, 6, K] --A'--> [tile, 4, 4, K] --> output

oneDNN multiplies tiles that lie so; MKL is faster with few channels, and has the axes the other way round.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import Call, Candidate
from ._epilogue import activate_
from ._team import each_on_team, team_size
from ._winograd_scratch import FEW, INPUT, MANY, WEIGHT64, Sizes, scratches

_CHANNELS_LAST = torch.channels_last
_onednn = torch.ops.mkldnn
# From so many products of channels on oneDNN's 1x1 convolution is faster than MKL's batched product.
_PACKED = 128 * 256
# With fewer channels the transforms take longer than they save; with fewer tiles, reading the weights does.
_LEAST_CHANNELS = 32
_LEAST_PRODUCTS = 32 * 64
_LEAST_TILES = 9
_LEAST_FILLED = 0.6  # of the tiles, by the output
# With fewer tiles a thread, reading the weights is what takes the time, and threads do it together.
_LEAST_STRIP = 32
_TRANSFORMED_AT_ONCE = 4096  # filters
# Of the point 1 all four rows of A' are one: what is added there is added to each output.
_ONE = 7


class TransformedWeight(NamedTuple):
    """A weight at the 36 points: packed by oneDNN for few tiles or for many, or plain [36, C, K] for MKL."""

    points: Tensor
    few: bool

    @property
    def out_channels(self) -> int:
        return self.points.shape[0] // 36 if self.points.is_mkldnn else self.points.shape[2]


@functools.cache
def _has_onednn() -> bool:
    names = "_convolution_pointwise", "_reorder_convolution_weight"
    return torch.backends.mkldnn.is_available() and all(hasattr(_onednn, name) for name in names)


def _full_precision() -> bool:
    """The transforms are matrix products, in which bf16 would cost a convolution far more than its own."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


def tiles(input_shape: tuple[int, ...], padding: tuple[int, int], dilation: int = 1) -> int:
    """The number of 4x4 tiles of the output that an input [N, C, H, W] gives."""
    count = input_shape[0] * dilation**2
    for size, p in zip(input_shape[2:], padding, strict=True):
        count *= -(-(-(-size // dilation) + 2 * (p // dilation) - 2) // 4)
    return count


def transform_weight(weight: Tensor, tiles: int = MANY, threads: int = 1) -> TransformedWeight:
    """A weight [K, C, 3, 3] as `convolution` takes it, laid out for so many tiles and threads.

    It is right for any number of them. Computed in fp64 and rounded once. It takes four times the memory of
    the weight.
    """
    out_channels, in_channels = weight.shape[:2]
    packed, few = _packing(in_channels * out_channels, tiles, threads)
    with torch.no_grad():
        points = _at_points(weight.detach())
        if not packed:
            return TransformedWeight(points.mT.contiguous(), few)
        points = points.reshape(36 * out_channels, in_channels, 1, 1)
        size = [1, 36 * in_channels, 1, min(tiles, FEW) if few else MANY]
        return TransformedWeight(_onednn._reorder_convolution_weight(points, [0], [1], [1], 36, size), few)


def _packing(products: int, tiles: int, threads: int) -> tuple[bool, bool]:
    """True and True if a weight of so many products of channels is packed, and packed for few tiles."""
    packed = tiles < MANY or products >= _PACKED
    return packed, packed and tiles < MANY * threads


def _at_points(weight: Tensor) -> Tensor:
    """[36, K, C] of a weight [K, C, 3, 3], few output channels at a time, which a core's own cache holds."""
    out_channels, in_channels = weight.shape[:2]
    matrix = torch.einsum("ai,bj->baij", WEIGHT64, WEIGHT64).reshape(36, 9)
    points = torch.empty(36, out_channels, in_channels, dtype=torch.float32, device="cpu")
    step = max(1, _TRANSFORMED_AT_ONCE // in_channels)
    for part, target in zip(weight.split(step), points.split(step, 1), strict=True):
        target.copy_(torch.mm(matrix, part.reshape(-1, 9).double().t()).view(target.shape))
    return points


def convolution(
    input: Tensor,
    transformed: TransformedWeight,
    bias: Tensor | None,
    padding: tuple[int, int],
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    dilation: int = 1,
) -> Tensor:
    """act(conv2d(input, weight, bias, 1, padding, dilation) + residual), [N, K, H, W] in channels_last.

    `input` [N, C, H, W] and `residual` of any strides, `bias` [K]; a padding is a multiple of the dilation.
    Without gradients. An infinity or NaN in the input can make NaN of all outputs of the tiles that read it.
    """
    # Long, as `compute`, which threads call for each strip, reads most of these names where they are.
    if dilation > 1:
        size = [s + 2 * (p - dilation) for s, p in zip(input.shape[2:], padding, strict=True)]
        phases = _phases(input.detach(), dilation)
        added = None if residual is None else _phases(residual.detach(), dilation)
        padding = padding[0] // dilation, padding[1] // dilation
        output = convolution(phases, transformed, bias, padding, added, activation, negative_slope)
        return _together(output, dilation, *size)
    images, in_channels, height, width = input.shape
    out_channels = transformed.out_channels
    packed = transformed.points.is_mkldnn
    out_height, out_width = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    rows, columns = -(-out_height // 4), -(-out_width // 4)
    sizes = Sizes(columns, padding[1], width, in_channels, out_channels, packed, transformed.few)
    output = torch.empty(
        (images, out_channels, out_height, out_width),
        dtype=torch.float32,
        device="cpu",
        memory_format=_CHANNELS_LAST,
    )

    def lines(t: Tensor) -> Tensor:
        """[N * H, W, C]"""
        return t.permute(0, 2, 3, 1).reshape(-1, t.shape[3], t.shape[1])

    with torch.no_grad():
        source = lines(input.detach().contiguous(memory_format=_CHANNELS_LAST)).flatten(1)
        target = output.permute(0, 2, 3, 1).view(-1, out_width, out_channels)
        added = None if residual is None else lines(residual.detach())
        at_one = None
        if bias is not None and packed:
            at_one = torch.zeros(36, out_channels, dtype=torch.float32, device="cpu")
            at_one[_ONE] = bias.detach()
            at_one = at_one.flatten()

    threads = team_size()
    kept = scratches(threads)

    def compute(begin: int, end: int, thread: int) -> None:
        workspace = kept[thread].workspace(sizes, end - begin)
        for border in workspace.borders:
            border.zero_()
        for i, evaluated in zip(range(begin, end), workspace.evaluated, strict=True):
            image, row = divmod(i, rows)
            top = 4 * row - padding[0]
            low, high = max(top, 0), min(top + 6, height)
            if low < high:
                matrix = INPUT if high - low == 6 else INPUT[:, low - top : high - top]
                torch.mm(matrix, source[image * height + low : image * height + high], out=evaluated)
            else:
                evaluated.zero_()
        workspace.gathered.copy_(workspace.overlapping)
        torch.bmm(workspace.to_points, workspace.gathered_rows, out=workspace.points)
        if packed:
            product = _onednn._convolution_pointwise(
                workspace.pixels, transformed.points, at_one, [0, 0], [1, 1], [1, 1], 36, "none", [], ""
            ).permute(0, 2, 3, 1)
        else:
            product = torch.bmm(workspace.points_by, transformed.points, out=workspace.product)
            if bias is not None:
                product[_ONE].add_(bias)
        product = product.view(workspace.product_shape)[: len(workspace.half)]
        torch.bmm(workspace.from_points, product, out=workspace.half)
        torch.bmm(workspace.from_half, workspace.half_rows, out=workspace.whole)

        def line(i: int) -> int:
            return i // rows * out_height + i % rows * 4

        strip = target[line(begin) : line(end)]
        if out_height % 4 == 0 and out_width % 4 == 0:
            strip.view(-1, 4, columns, 4, out_channels).copy_(workspace.tiles)
        else:
            for i, tiles_of_row in zip(range(begin, end), workspace.tiles, strict=True):
                part = target[line(i) : min(line(i + 1), line(i) + 4)]
                whole, rest = divmod(out_width, 4)
                tiles_of_row = tiles_of_row[: len(part)]
                part[:, : 4 * whole].unflatten(1, (whole, 4)).copy_(tiles_of_row[:, :whole])
                if rest:
                    part[:, 4 * whole :].copy_(tiles_of_row[:, whole, :rest])
        if added is not None:
            strip.add_(added[line(begin) : line(end)])
        activated = activate_(strip, activation, negative_slope)
        if activated is not strip:
            strip.copy_(activated)

    total = images * rows
    divided = total * columns < _LEAST_STRIP * threads
    many = MANY if min(in_channels, out_channels) >= 128 and not packed else 2 * MANY
    strips = max(1, total // -(-many // columns))
    if not divided and (transformed.few or not packed):
        strips = max(strips, min(threads, total))
    ends = [total * i // strips for i in range(strips + 1)]
    if divided:
        with torch.no_grad():
            for begin, end in itertools.pairwise(ends):
                compute(begin, end, 0)
    else:
        each_on_team([functools.partial(compute, *some) for some in itertools.pairwise(ends)])
    return output


def _phases(t: Tensor, step: int) -> Tensor:
    """[N * step * step, C, H / step, W / step] of [N, C, H, W]: every step-th row and column."""
    behind = (0, -t.shape[3] % step, 0, -t.shape[2] % step)
    t = F.pad(t, behind) if any(behind) else t
    t = t.unflatten(2, (-1, step)).unflatten(4, (-1, step)).permute(0, 3, 5, 2, 4, 1)
    return t.reshape(-1, *t.shape[3:]).permute(0, 3, 1, 2)


def _together(phases: Tensor, step: int, height: int, width: int) -> Tensor:
    """[N, C, height, width] in channels_last of its `_phases`."""
    t = phases.permute(0, 2, 3, 1).unflatten(0, (-1, step, step)).permute(0, 3, 1, 4, 2, 5)
    t = t.reshape(len(t), t.shape[1] * step, t.shape[3] * step, -1).permute(0, 3, 1, 2)
    return t[:, :, :height, :width].contiguous(memory_format=_CHANNELS_LAST)


def _serves(call: Call) -> bool:
    """Dense 3x3 in fp32 of some channels and pixels. A padding is a multiple of the dilation."""
    step = call.dilation[0]
    if call.dtype != torch.float32 or call.groups != 1 or call.weight[2:] != (3, 3):
        return False
    if call.stride != (1, 1) or call.dilation != (step, step) or any(p < 0 or p % step for p in call.padding):
        return False
    output, inner = call.output(), call.weight[:2]
    if min(inner) < _LEAST_CHANNELS or math.prod(inner) < _LEAST_PRODUCTS or min(*call.input, *output) <= 0:
        return False
    count = tiles(call.input, call.padding, step)
    filled = output[0] * output[2] * output[3] / (16 * count)
    return count >= _LEAST_TILES and filled >= _LEAST_FILLED and _has_onednn() and _full_precision()


def _transform(weight: Tensor, call: Call) -> TransformedWeight:
    return transform_weight(weight, tiles(call.input, call.padding, call.dilation[0]), call.threads)


def _form(call: Call) -> tuple[bool, bool]:
    count = tiles(call.input, call.padding, call.dilation[0])
    return _packing(math.prod(call.weight[:2]), count, call.threads)


def _run(
    call: Call,
    input: Tensor,
    transformed: TransformedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> Tensor:
    operands = input, transformed, bias, call.padding, residual, call.activation, slope
    return convolution(*operands, call.dilation[0])


CONV2D = Candidate(_serves, _transform, _run, _form)
