"""How calls of conv2d are run to be measured on a GPU: of one image, of several, of a pyramid's branches."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from .._cudnn import CALLS, conv2d_cudnn
from .._gpu_call import GPU_OPERATIONS, Bound, Draw, GpuCall, GpuOperation, with_operands
from .functional import OPERATIONS, conv2d
from .geometry import check_conv2d, check_images, cropped
from .parallel import parallel_conv2d

_NAMES = ("bias", "scale", "shift", "residual")


def _proofs(gradients: bool) -> tuple[str, ...]:
    return OPERATIONS[:3] if gradients else OPERATIONS[:1]


def _depth(call: GpuCall, pixels: int) -> int:
    """Terms of the longest sum: of an output, or of a weight's gradient."""
    taps = max(math.prod(shape[1:]) for shape in call.weights)
    return max(taps, pixels if call.gradients else 0)


def _conv2d(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, dilation, groups, *given, activation = call.options
    (image,), (filters,) = call.images, call.weights
    x, weight = draw(*image), draw.filters(filters)
    shape = check_conv2d(x, weight, None, stride, padding, dilation, groups)
    vector = (filters[0],)
    operands = draw.given(given, (vector, vector, vector, shape))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    function = with_operands(conv2d, _NAMES, given, **geometry, activation=activation)

    def fused(name: str, input: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        found = dict(zip([n for n, wanted in zip(_NAMES, given, strict=True) if wanted], rest, strict=True))
        bias, scale, shift, residual = (found.get(each) for each in _NAMES)
        args = (input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation)
        y = conv2d_cudnn(name, *args)
        if y is None:
            raise NotImplementedError(f"{name} does not take this call")
        return y

    candidates = {} if call.gradients else {name: partial(fused, name) for name in CALLS}
    pixels = shape[0] * shape[2] * shape[3]
    return Bound((x, weight, *operands), function, _depth(call, pixels), candidates)


def _of_images(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, dilation = call.options
    (filters,) = call.weights
    images, weight = [draw(*shape) for shape in call.images], draw.filters(filters)
    check_images(images)
    channels = sum(shape[1] for shape in call.images)
    shape = check_conv2d(cropped(images)[0], weight, None, stride, padding, dilation, 1, channels)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": "relu"}

    def function(*tensors: Tensor) -> Tensor:
        *inputs, weight, bias = tensors
        return conv2d(inputs, weight, bias, **options)

    pixels = shape[0] * shape[2] * shape[3]
    return Bound((*images, weight, draw(filters[0])), function, _depth(call, pixels))


def _parallel_conv2d(call: GpuCall, draw: Draw) -> Bound:
    dilations, *given, activation = call.options
    (image,), filters = call.images, call.weights
    weights = [draw.filters(shape) for shape in filters]
    channels = sum(shape[0] for shape in filters)

    def branches(x: Tensor, *tensors: Tensor, **rest: Any) -> Tensor:
        return parallel_conv2d(x, tensors, list(dilations), activation=activation, **rest)

    function = with_operands(branches, ("scale", "shift"), given, 1 + len(filters))
    operands = draw.given(given, ((channels,), (channels,)))
    return Bound((draw(*image), *weights, *operands), function, _depth(call, 0))


GPU_OPERATIONS["conv2d"] = GpuOperation("conv2d", _proofs, _conv2d)
GPU_OPERATIONS["conv2d_of_images"] = GpuOperation("conv2d", _proofs, _of_images, composite=True)
GPU_OPERATIONS["parallel_conv2d"] = GpuOperation(
    "conv2d", lambda gradients: OPERATIONS[3:], _parallel_conv2d, composite=True
)
