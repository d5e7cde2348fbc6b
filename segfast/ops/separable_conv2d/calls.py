"""How calls of depthwise and separable convolutions are run to be measured on a GPU."""

import math
from collections.abc import Sequence

from torch import Tensor

from .._gpu_call import GPU_OPERATIONS, Bound, Draw, GpuCall, GpuOperation, with_operands
from .functional import OPERATIONS, depthwise_conv2d, separable_conv2d
from .geometry import check_depthwise, check_pointwise
from .operators import taps_major


def _laid_out(input: Tensor, weight: Tensor, *others: Tensor) -> Sequence[Tensor]:
    """The filters as `segfast.optimize` lays them out on a GPU."""
    return (input, taps_major(weight), *others)


def _depth(call: GpuCall, pixels: int) -> int:
    taps = math.prod(call.weights[0][2:]) * math.prod(call.weights[-1][1:2])
    return max(taps, pixels if call.gradients else 0)


def _depthwise_conv2d(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, dilation, *given, activation, statistics = call.options
    (image,), (filters,) = call.images, call.weights
    function = with_operands(
        depthwise_conv2d,
        ("bias", "scale", "shift"),
        given,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        return_statistics=statistics,
    )
    x, weight = draw(*image), draw.filters(filters)
    shape = check_depthwise("depthwise_conv2d", x, weight, None, stride, padding, dilation)
    pixels = shape[0] * shape[2] * shape[3]
    operands = draw.given(given, 3 * ((filters[0],),))
    depth = pixels if statistics else _depth(call, pixels)
    return Bound((x, weight, *operands), function, depth, laid_out=_laid_out)


def _separable_conv2d(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, dilation, *first, between, b, k, t, residual, activation = call.options
    (image,), (depthwise, pointwise) = call.images, call.weights
    tensors = x, *weights = draw(*image), draw.filters(depthwise), draw.filters(pointwise)
    shape = check_depthwise("separable_conv2d", x, weights[0], None, stride, padding, dilation)
    check_pointwise("separable_conv2d", shape[1], x, weights[1], None)
    given = [*first, b, k, t, residual]
    inner, outer = (depthwise[0],), (pointwise[0],)
    shapes = (inner, inner, inner, outer, outer, outer, (image[0], pointwise[0], *shape[2:]))
    function = with_operands(
        separable_conv2d,
        ("depthwise_bias", "depthwise_scale", "depthwise_shift", "bias", "scale", "shift", "residual"),
        given,
        3,
        stride=stride,
        padding=padding,
        dilation=dilation,
        depthwise_activation=between,
        activation=activation,
    )
    depth = _depth(call, image[0] * shape[2] * shape[3])
    return Bound((*tensors, *draw.given(given, shapes)), function, depth, laid_out=_laid_out)


def _depthwise_proofs(gradients: bool) -> tuple[str, ...]:
    return OPERATIONS[:3] if gradients else OPERATIONS[:1]


def _separable_proofs(gradients: bool) -> tuple[str, ...]:
    return OPERATIONS if gradients else OPERATIONS[3:]


GPU_OPERATIONS["depthwise_conv2d"] = GpuOperation("separable_conv2d", _depthwise_proofs, _depthwise_conv2d)
GPU_OPERATIONS["separable_conv2d"] = GpuOperation(
    "separable_conv2d", _separable_proofs, _separable_conv2d, composite=True
)
