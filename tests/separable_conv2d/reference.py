"""Depthwise and separable convolution by their definition, and operands to hold ours to it."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.kernels import Tile, override_tile

from ..fused_conv import check_fused, check_layer, draw, fused

DEPTHWISE_VECTORS = ("depthwise_bias", "depthwise_scale", "depthwise_shift")
VECTORS = ("bias", "scale", "shift")
WALKING = ("depthwise_conv2d_forward", "depthwise_conv2d_grad_input", "depthwise_conv2d_grad_weight")
BY_TAPS = ("depthwise_conv2d_taps", "depthwise_conv2d_grad_input_taps", "depthwise_conv2d_grad_weight_taps")


@contextlib.contextmanager
def tiles(rows, channels, columns, parts):
    """Rows, channels, columns (pixels for the kernels that go tap by tap), parts of the weight's gradient."""
    with contextlib.ExitStack() as stack:
        for operation in WALKING:
            tile = Tile(rows, channels, columns, 1, 1, parts)
            stack.enter_context(override_tile(operation, tile))
        for operation in BY_TAPS:
            stack.enter_context(override_tile(operation, Tile(2 * columns, channels, 1, 1, 1, parts)))
        yield


@contextlib.contextmanager
def in_form(form, pixels=16, outputs=16, depth=16):
    """Separable convolution in one of its forms, with small tiles."""
    tile = Tile(pixels, outputs, depth, 4, 1, form=form)
    with override_tile("separable_conv2d_forward", tile), override_tile("pointwise_conv2d_forward", tile):
        yield


def plain_depthwise(input, weight, bias=None, stride=1, padding=0, dilation=1) -> Tensor:
    """torch's own."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.shape[-3])


def define_separable(
    input, depthwise_weight, pointwise_weight, depthwise_bias=None, bias=None,
    stride=1, padding=0, dilation=1, *,
    depthwise_scale=None, depthwise_shift=None, depthwise_activation=None, **epilogue,
):  # fmt: skip
    """Two convolutions, each with its epilogue, in the operands' own dtype."""
    between = fused(plain_depthwise)(
        input, depthwise_weight, depthwise_bias, stride, padding, dilation,
        scale=depthwise_scale, shift=depthwise_shift, activation=depthwise_activation,
    )  # fmt: skip
    return fused(F.conv2d)(between, pointwise_weight, bias, **epilogue)


def pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def depthwise_operands(
    shape, multiplier=1, kernel=3, *, vectors=("bias",), dtype=torch.float32, channels_last=True
) -> dict[str, Tensor]:
    """{"input", "weight", and the vectors asked for}."""
    filters = shape[1] * multiplier
    tensors = {
        "input": draw(*shape, dtype=dtype, channels_last=channels_last),
        "weight": draw(filters, 1, *pair(kernel), dtype=dtype, channels_last=channels_last),
    }
    return tensors | {name: draw(filters, dtype=dtype, seed=i) for i, name in enumerate(vectors)}


def separable_operands(
    shape, channels_out, multiplier=1, kernel=3, *, residual_shape=None,
    vectors=DEPTHWISE_VECTORS + VECTORS, dtype=torch.float32, channels_last=True,
) -> dict[str, Tensor]:  # fmt: skip
    """{"input", both weights, the vectors asked for, "residual" where its shape is given}."""
    first = depthwise_operands(
        shape, multiplier, kernel, vectors=(), dtype=dtype, channels_last=channels_last
    )
    filters = shape[1] * multiplier
    pointwise = draw(channels_out, filters, 1, 1, dtype=dtype, channels_last=channels_last)
    tensors = {
        "input": first["input"],
        "depthwise_weight": first["weight"],
        "pointwise_weight": pointwise / 2 ** (filters.bit_length() // 2),
    }
    for i, name in enumerate(vectors):
        size = filters if name in DEPTHWISE_VECTORS else channels_out
        tensors[name] = draw(size, dtype=dtype, seed=i)
    if residual_shape is not None:
        tensors["residual"] = draw(*residual_shape, dtype=dtype, channels_last=channels_last)
    return tensors


def check_depthwise(tensors: dict[str, Tensor], activation=None, **geometry) -> dict[str, Tensor]:
    """Our kernels on the operands, values and all gradients, held to the error rule."""
    with segfast.backend("triton"):
        return check_fused(
            depthwise_conv2d, plain_depthwise, tensors, depthwise=True, activation=activation, **geometry
        )


def check_separable(
    tensors: dict[str, Tensor], activation=None, depthwise_activation=None, **geometry
) -> dict[str, Tensor]:
    """Our kernels on the operands, values and all gradients, held to the error rule."""
    pointwise, depthwise = tensors["pointwise_weight"], tensors["depthwise_weight"]
    taps, pixels = depthwise[0].numel(), tensors["input"].numel() // tensors["input"].shape[1]
    depth = {
        "output": taps + pointwise.shape[1],
        "input": depthwise.numel() // tensors["input"].shape[1] + pointwise.shape[0],
        "depthwise_weight": pixels + pointwise.shape[0],
        "residual": 1,
    }
    activations = {"activation": activation, "depthwise_activation": depthwise_activation}
    with segfast.backend("triton"):
        return check_layer(
            separable_conv2d, define_separable, tensors, depth, activations=activations, **geometry
        )
