"""Launches of the transposed-convolution kernels for `segfast compile-report`: layers of real networks."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._operands import load_kernels
from .operators import output_size

# name: (batch, C_in, C_out, height, width, kernel, stride, padding, groups, dilation)
_LAYERS = {
    "unet_up1": (16, 1024, 512, 28, 28, 2, 2, 0, 1, 1),
    "unet_up2": (16, 512, 256, 52, 52, 2, 2, 0, 1, 1),
    "unet_up3": (16, 256, 128, 100, 100, 2, 2, 0, 1, 1),
    "unet_up4": (16, 128, 64, 196, 196, 2, 2, 0, 1, 1),
    "decoder_up4x4": (16, 256, 128, 64, 64, 4, 2, 1, 1, 1),
    "fcn8s_up8": (16, 21, 21, 70, 70, 16, 8, 4, 1, 1),
    "fcn32s_up32": (16, 21, 21, 16, 16, 64, 32, 16, 1, 1),
    "up3x3": (16, 256, 128, 64, 64, 3, 2, 1, 1, 1),
    "up3x3_groups": (16, 96, 48, 64, 64, 3, 2, 1, 2, 2),
    "up24": (16, 48, 24, 99, 101, 2, 2, 0, 1, 1),
    "past_int32": (64, 128, 64, 400, 400, 2, 2, 0, 1, 1),
}
# Whose forward writes beside a skip that is cropped, as in an unpadded U-Net.
_WITH_SKIP = ("unet_up2", "unet_up4", "up24")
_WITH_EPILOGUE = ("unet_up3", "decoder_up4x4", "up3x3")


def _tensor(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.empty((batch, channels, height, width), dtype=dtype, device="meta").to(
        memory_format=torch.channels_last
    )


def _widest(row_bytes: int) -> int:
    """The widest access, at most 16 bytes, that every row of `row_bytes` allows."""
    return math.gcd(16, row_bytes)


def _forward(
    x, weight, vector, y, geometry, *, affine=None, residual=None, skip=None, activation=None
) -> None:
    channels = y.shape[1] + (0 if skip is None else skip.shape[1])
    out = _tensor(y.dtype, y.shape[0], channels, *y.shape[2:])
    crop = (0, 0) if skip is None else (4, 4)
    load_kernels().conv_transpose2d_forward(
        x, weight, vector, affine, affine, residual, skip, out, *geometry, crop, activation, 0.01
    )


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a call of a launcher, the width in bytes its stores must have), on meta tensors."""
    kernels = load_kernels()
    for name, layer in _LAYERS.items():
        batch, c_in, c_out, height, width, kernel, stride, padding, groups, dilation = layer
        strides, paddings, dilations = (stride, stride), (padding, padding), (dilation, dilation)
        x = _tensor(dtype, batch, c_in, height, width)
        weight = _tensor(dtype, c_in, c_out // groups, kernel, kernel)
        size = output_size(x, weight, strides, paddings, (0, 0), dilations)
        y = _tensor(dtype, batch, c_out, *size)
        vector = torch.empty(c_out, dtype=dtype, device="meta")
        geometry = (strides, paddings, dilations, groups)
        forward = partial(_forward, x, weight, vector, y, geometry)
        pixel = _widest(dtype.itemsize * c_out // groups)

        yield f"{name} forward", forward, pixel
        if name in _WITH_SKIP:
            skip = _tensor(dtype, batch, c_out, size[0] + 8, size[1] + 8)
            yield f"{name} up_concat", partial(forward, skip=skip, activation="relu"), pixel
        if name in _WITH_EPILOGUE:
            fused = partial(forward, affine=vector, residual=y, activation="gelu")
            yield f"{name} scale+residual+gelu", fused, pixel
        grad_input = partial(kernels.conv_transpose2d_grad_input, y, weight, x, *geometry)
        yield f"{name} grad_input", grad_input, _widest(dtype.itemsize * c_in // groups)
        # Written in fp32 parts, whose rows hold all taps, then summed.
        grad_weight = partial(kernels.conv_transpose2d_grad_weight, x, y, weight, *geometry)
        yield f"{name} grad_weight", grad_weight, _widest(dtype.itemsize * c_out // groups * kernel**2)
