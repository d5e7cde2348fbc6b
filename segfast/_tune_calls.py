"""What `segfast tune` times: for each operation a call of ours and ATen's, on layers of real networks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tune_convolutions import CONV2D_LAYERS, CONV2D_OPERATIONS
from ._tune_crf import CRF_OPERATIONS, IMAGES
from ._tune_heads import HEAD_OPERATIONS, HEADS
from ._tune_layers import AnyLayer, Calls, Draw, Layer, Pyramid, calls_of

Maker = Callable[[Any, Draw], Calls]


@dataclass(frozen=True)
class Family:
    """A family's operations in the order they are tuned, and the layers they are tuned for.

    `parts` names, for an operation, those its call may launch in its place; `per_channel` the operations that
    C_OUT does not concern; `fused` those whose tables tell an epilogue apart; `kinds` those whose layers are
    of another kind than the first layer.
    """

    operations: Mapping[str, Maker]
    layers: tuple[AnyLayer, ...]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_channel: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    kinds: Mapping[str, type[AnyLayer]] = field(default_factory=dict)

    def kinds_of_layers(self) -> list[type[AnyLayer]]:
        """What its layers are."""
        return [type(self.layers[0]), *self.kinds.values()]

    def concerns(self, operation: str, layer: AnyLayer) -> bool:
        """Whether `layer` is of the kind that `operation` computes."""
        return type(layer) is self.kinds.get(operation, type(self.layers[0]))

    def layer_of(self, operation: str, layer: AnyLayer) -> AnyLayer:
        """`layer` as `operation` sees it: the same for layers that differ in nothing that concerns it."""
        if not isinstance(layer, Layer):
            return layer
        if operation in self.per_channel:
            layer = layer._replace(c_out=layer.c_in)
        return layer if operation in self.fused else layer._replace(fused=0)


def is_gradient(operation: str) -> bool:
    """Whether only training runs it."""
    return "_grad_" in operation or operation == "softmax_expectation"


def _conv_transpose2d(direction: str, layer: Layer, draw: Draw) -> Calls:
    from .functional import conv_transpose2d

    options = (None, layer.stride, layer.padding, 0, 1, layer.dilation)
    scale = layer.stride / (layer.kernel * math.sqrt(layer.c_in))
    x = draw(layer.batch, layer.c_in, layer.height, layer.width)
    weight = draw(layer.c_in, layer.c_out, layer.kernel, layer.kernel, scale=scale)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose2d(x, weight, *options)

    def aten(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, *options)

    return calls_of(ours, aten, x, (weight, weight), direction, draw)


def _filters(layer: Layer, draw: Draw) -> tuple[Tensor, Tensor]:
    """Depthwise filters as `segfast.optimize` lays them out, and as torch does: neither side copies."""
    from .ops.separable_conv2d.operators import taps_major

    filters = draw(layer.c_in, 1, layer.kernel, layer.kernel, scale=1 / layer.kernel)
    return taps_major(filters), filters


def _depthwise_conv2d(direction: str, layer: Layer, draw: Draw) -> Calls:
    from .functional import depthwise_conv2d

    options = (None, layer.stride, layer.padding, layer.dilation)
    x = draw(layer.batch, layer.c_in, layer.height, layer.width)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, *options)

    def aten(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, *options, layer.c_in)

    return calls_of(ours, aten, x, _filters(layer, draw), direction, draw)


def _pointwise_conv2d(layer: Layer, draw: Draw) -> Calls:
    from .kernels.separable_conv2d import pointwise_conv2d_forward

    size = layer.conv_size()
    x = draw(layer.batch, layer.c_in, *size)
    weight = draw(layer.c_out, layer.c_in, 1, 1, scale=1 / math.sqrt(layer.c_in))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        shape = (layer.batch, layer.c_out, *size)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        pointwise_conv2d_forward(x, weight, None, None, None, None, out, None, 0.0)
        return out

    return calls_of(ours, F.conv2d, x, (weight, weight), "forward", draw)


def _separable_conv2d(layer: Layer, draw: Draw) -> Calls:
    from .functional import separable_conv2d

    geometry = (layer.stride, layer.padding, layer.dilation)
    x = draw(layer.batch, layer.c_in, layer.height, layer.width)
    weight = draw(layer.c_out, layer.c_in, 1, 1, scale=1 / math.sqrt(layer.c_in))

    def ours(x: Tensor, filters: Tensor) -> Tensor:
        return separable_conv2d(x, filters, weight, None, None, *geometry)

    def aten(x: Tensor, filters: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, filters, None, *geometry, layer.c_in), weight)

    return calls_of(ours, aten, x, _filters(layer, draw), "forward", draw)


# Measured tables hold for up to four times the pixels, or a quarter: batch 8 and batch 1 cover 1 to 32.
_SEPARABLE = tuple(
    Layer(batch, *sizes)
    for batch in (8, 1)
    for sizes in (
        (256, 256, 129, 129, 3, 1, 1),  # DeepLabV3+'s decoder
        (128, 128, 257, 257, 3, 1, 1),  # Xception65: entry, middle
        (728, 728, 65, 65, 3, 1, 1),
        (2048, 256, 65, 65, 3, 1, 12, 12),  # DeepLabV3+'s ASPP
        (144, 24, 129, 129, 3, 1, 1),  # MobileNetV2
        (96, 24, 257, 257, 3, 2, 1),
        (144, 40, 128, 128, 5, 2, 2),  # EfficientNet-B0
        (672, 112, 32, 32, 5, 1, 2),
        (96, 96, 128, 128, 7, 1, 3),  # ConvNeXt-T
    )
)
FAMILIES = {
    "conv_transpose2d": Family(
        {
            f"conv_transpose2d_{direction}": partial(_conv_transpose2d, direction)
            for direction in ("forward", "grad_input", "grad_weight")
        },
        # U-Net's four up-convolutions, a 4x4 stride 2 decoder, and FCN's two.
        (
            Layer(16, 1024, 512, 28, 28, 2, 2, 0),
            Layer(16, 512, 256, 52, 52, 2, 2, 0),
            Layer(16, 256, 128, 100, 100, 2, 2, 0),
            Layer(16, 128, 64, 196, 196, 2, 2, 0),
            Layer(16, 256, 128, 64, 64, 4, 2, 1),
            Layer(16, 21, 21, 70, 70, 16, 8, 4),
            Layer(16, 21, 21, 16, 16, 64, 32, 16),
        ),
    ),
    "separable_conv2d": Family(
        {
            "depthwise_conv2d_forward": partial(_depthwise_conv2d, "forward"),
            "pointwise_conv2d_forward": _pointwise_conv2d,
            "separable_conv2d_forward": _separable_conv2d,
            "depthwise_conv2d_grad_input": partial(_depthwise_conv2d, "grad_input"),
            "depthwise_conv2d_grad_weight": partial(_depthwise_conv2d, "grad_weight"),
        },
        _SEPARABLE,
        {"separable_conv2d_forward": ("depthwise_conv2d_forward", "pointwise_conv2d_forward")},
        tuple(f"depthwise_conv2d_{name}" for name in ("forward", "grad_input", "grad_weight")),
    ),
    "dilated_conv2d": Family(
        CONV2D_OPERATIONS,
        CONV2D_LAYERS,
        fused=("conv2d_forward",),
        kinds={"parallel_conv2d_forward": Pyramid},
    ),
    "segmentation_head": Family(HEAD_OPERATIONS, HEADS),
    "dense_crf": Family(CRF_OPERATIONS, IMAGES),
}
