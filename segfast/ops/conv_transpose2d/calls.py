"""How calls of transposed convolutions are run to be measured on a GPU."""

from .._gpu_call import GPU_OPERATIONS, Bound, Draw, GpuCall, GpuOperation, with_operands
from .functional import OPERATIONS, conv_transpose2d
from .geometry import check_conv_transpose2d
from .up_concat import up_concat


def _proofs(gradients: bool) -> tuple[str, ...]:
    return OPERATIONS if gradients else OPERATIONS[:1]


def _conv_transpose2d(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, extra, groups, dilation, *given, activation = call.options
    (image,), (filters,) = call.images, call.weights
    x, weight = draw(*image), draw.filters(filters)
    shape = check_conv_transpose2d(x, weight, None, stride, padding, extra, groups, dilation)
    shapes = (*[shape[1:2]] * 3, shape)
    names = ("bias", "scale", "shift", "residual")
    function = with_operands(
        conv_transpose2d,
        names,
        given,
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        dilation=dilation,
        activation=activation,
    )
    pixels = shape[0] * shape[2] * shape[3]
    depth = max(filters[0], pixels if call.gradients else 0) * filters[2] * filters[3]
    return Bound((x, weight, *draw.given(given, shapes)), function, depth)


def _up_concat(call: GpuCall, draw: Draw) -> Bound:
    stride, padding, bias, activation = call.options
    (image, skip), (filters,) = call.images, call.weights
    tensors = [draw(*image), draw(*skip), draw.filters(filters)]
    tensors += [draw(filters[1])] if bias else []
    options = {"stride": stride, "padding": padding, "activation": activation}
    depth = max(filters[0], skip[0] * skip[2] * skip[3] if call.gradients else 0) * filters[2] * filters[3]
    return Bound(tuple(tensors), with_operands(up_concat, ("bias",), [bias], 3, **options), depth)


GPU_OPERATIONS["conv_transpose2d"] = GpuOperation("conv_transpose2d", _proofs, _conv_transpose2d)
GPU_OPERATIONS["up_concat"] = GpuOperation("conv_transpose2d", _proofs, _up_concat, composite=True)
