"""conv2d's and parallel_conv2d's calls for `segfast tune`: ours, ATen's, and cuDNN's fused ones."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tune_layers import AnyLayer, Call, Calls, Draw, Layer, Pyramid, calls_of

Pair = tuple[int, int]


def _conv2d(direction: str, layer: Layer, draw: Draw) -> Calls:
    from .functional import conv2d

    x = draw(layer.batch, layer.c_in, layer.height, layer.width)
    scale = 1 / (layer.kernel * math.sqrt(layer.c_in))
    weight = draw(layer.c_out, layer.c_in, layer.kernel, layer.kernel, scale=scale)
    geometry = _geometry(layer)
    bucket = _bucket(layer, draw, direction)
    if direction == "forward":
        return _forward(layer, x, weight, geometry, draw)._replace(bucket=bucket)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return conv2d(x, weight, None, *geometry)

    def aten(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, *geometry)

    return calls_of(ours, aten, x, (weight, weight), direction, draw)._replace(bucket=bucket)


def _geometry(layer: Layer) -> tuple[Pair, Pair, Pair]:
    return (layer.stride,) * 2, (layer.padding,) * 2, (layer.dilation,) * 2


def _bucket(layer: Layer, draw: Draw, direction: str) -> str:
    """What the choice of backend looks up, whichever kernel computes a gradient."""
    from .kernels._configs import geometry_variant, log2, stem

    sides = [(size, size) for size in (layer.stride, layer.dilation, layer.kernel)]
    variant = geometry_variant(*sides) + ("-fused" if layer.fused and direction == "forward" else "")
    prefix = stem(layer.c_in, layer.c_out, layer.kernel**2, 1, draw.dtype, variant)
    return f"{prefix}{log2(layer.batch * layer.height * layer.width)}"


def _forward(layer: Layer, x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair], draw: Draw) -> Calls:
    from .functional import conv2d
    from .ops._conv2d_aten import conv2d_aten

    scale, shift = _affine(layer.c_out, draw) if layer.fused else (None, None)
    activation = "relu" if layer.fused else None
    operands = (x, weight, None, *geometry, 1, scale, shift, None, activation)

    def ours() -> Tensor:
        return conv2d(x, weight, None, *geometry, scale=scale, shift=shift, activation=activation)

    rivals = {name: partial(run, *operands) for name, run in _rivals(x, weight, activation).items()}
    return Calls(ours, partial(conv2d_aten, *operands, 0.0), rivals=rivals)


def _affine(channels: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """The scale and shift of a folded batch norm."""
    scale, shift = (torch.rand(channels, device=draw.device, generator=draw.generator) for _ in range(2))
    return scale + 0.5, shift


def _rivals(x: Tensor, weight: Tensor, activation: str | None) -> dict[str, Callable[..., Tensor]]:
    from .ops._cudnn import RUN, rivals

    return {name: RUN[name] for name in rivals(x, weight, None, None, None, None, activation)}


def _parallel_conv2d(pyramid: Pyramid, draw: Draw) -> Calls:
    from .functional import parallel_conv2d
    from .ops._conv2d_aten import conv2d_aten

    x = draw(pyramid.batch, pyramid.c_in, pyramid.height, pyramid.width)
    dilations = pyramid.dilations()
    weights = []
    for kernel in (1, *[3 for _ in dilations[1:]]):
        scale = 1 / (kernel * math.sqrt(pyramid.c_in))
        weights.append(draw(pyramid.c_out, pyramid.c_in, kernel, kernel, scale=scale))
    affine = _affine(len(weights) * pyramid.c_out, draw)
    parts = [vector.split(pyramid.c_out) for vector in affine]

    def ours() -> Tensor:
        return parallel_conv2d(x, weights, dilations, scale=affine[0], shift=affine[1], activation="relu")

    def separately(convolution: Callable[..., Tensor], *ending: float) -> Tensor:
        found = []
        for weight, d, scale, shift in zip(weights, dilations, *parts, strict=True):
            padding = (d * (weight.shape[2] // 2),) * 2
            geometry = ((1, 1), padding, (d, d), 1)
            found.append(convolution(x, weight, None, *geometry, scale, shift, None, "relu", *ending))
        return torch.cat(found, 1)

    found: dict[str, Call] = {
        name: partial(separately, run) for name, run in _rivals(x, weights[0], "relu").items()
    }
    return Calls(ours, partial(separately, conv2d_aten, 0.0), rivals=found)


# (C_IN, C_OUT, H, W, KERNEL, STRIDE, PADDING, DILATION)
_SIZES = (
    (256, 256, 65, 65, 3, 1, 2, 2),  # ResNet's dilated layers at output stride 8 and 513 pixels
    (512, 512, 65, 65, 3, 1, 4, 4),
    (512, 512, 65, 65, 3, 1, 2, 2),
    (256, 256, 65, 65, 3, 1, 1),
    (64, 64, 129, 129, 3, 1, 1),  # the rest of it
    (128, 128, 65, 65, 3, 1, 1),
    (128, 128, 129, 129, 3, 2, 1),
    (3, 64, 513, 513, 7, 2, 3),
    (64, 256, 129, 129, 1, 1, 0),
    (256, 64, 129, 129, 1, 1, 0),
    (128, 512, 65, 65, 1, 1, 0),
    (512, 128, 65, 65, 1, 1, 0),
    (256, 1024, 65, 65, 1, 1, 0),
    (1024, 256, 65, 65, 1, 1, 0),
    (512, 2048, 65, 65, 1, 1, 0),
    (2048, 512, 65, 65, 1, 1, 0),
    (1280, 256, 65, 65, 1, 1, 0),  # DeepLabV3's projection, FCN's head
    (1024, 256, 65, 65, 3, 1, 1),
    (2048, 512, 65, 65, 3, 1, 1),
    (64, 64, 570, 570, 3, 1, 0),  # U-Net, unpadded, at 572 pixels: down and up
    (64, 128, 284, 284, 3, 1, 0),
    (128, 128, 282, 282, 3, 1, 0),
    (256, 256, 138, 138, 3, 1, 0),
    (512, 512, 66, 66, 3, 1, 0),
    (1024, 1024, 30, 30, 3, 1, 0),
    (1024, 512, 56, 56, 3, 1, 0),
    (512, 256, 104, 104, 3, 1, 0),
    (256, 128, 200, 200, 3, 1, 0),
    (128, 64, 392, 392, 3, 1, 0),
    (64, 64, 698, 698, 3, 1, 1),  # VGG16 in FCN-8s at 500 pixels and a first padding of 100
    (128, 128, 349, 349, 3, 1, 1),
    (256, 256, 175, 175, 3, 1, 1),
    (512, 512, 88, 88, 3, 1, 1),
    (512, 4096, 22, 22, 7, 1, 0),
    (4096, 4096, 16, 16, 1, 1, 0),
)
_PYRAMIDS = ((33, 6), (65, 12))  # side and rate, of 2048 channels to 256 each
# With an epilogue, as inference runs them, then bare, as training does. Batch 8 and batch 1 cover 1 to 32.
CONV2D_LAYERS: tuple[AnyLayer, ...] = (
    *[Layer(n, *sizes)._replace(fused=fused) for fused in (1, 0) for n in (8, 1) for sizes in _SIZES],
    *[Pyramid(n, 2048, 256, side, side, rate) for n in (8, 1) for side, rate in _PYRAMIDS],
)
CONV2D_OPERATIONS: dict[str, Callable[[Any, Draw], Calls]] = {
    "parallel_conv2d_forward": _parallel_conv2d,
    **{f"conv2d_{name}": partial(_conv2d, name) for name in ("forward", "grad_input", "grad_weight")},
}
