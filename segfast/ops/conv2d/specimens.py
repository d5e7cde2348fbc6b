"""Launches of the conv2d kernels for `segfast compile-report`: layers of real networks."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._geometry import output_size
from .._operands import load_kernels
from .geometry import cropped

# name: (batch, C_in, C_out, height, width, kernel, stride, padding, dilation, groups)
_LAYERS = {
    "unet_level1": (8, 64, 64, 570, 570, 3, 1, 0, 1, 1),
    "vgg_conv5": (8, 512, 512, 32, 32, 3, 1, 1, 1, 1),
    "resnet_layer3_d2": (8, 256, 256, 65, 65, 3, 1, 2, 2, 1),
    "resnet_layer4_d4": (8, 512, 512, 65, 65, 3, 1, 4, 4, 1),
    "resnet_layer4_d4_n1": (1, 512, 512, 33, 33, 3, 1, 4, 4, 1),
    "resnet_1x1": (8, 1024, 256, 65, 65, 1, 1, 0, 1, 1),
    "resnet_down": (8, 128, 128, 129, 129, 3, 2, 1, 1, 1),
    "resnet_stem": (8, 3, 64, 513, 513, 7, 2, 3, 1, 1),
    "aspp_r12": (8, 2048, 256, 33, 33, 3, 1, 12, 12, 1),
    "aspp_r18_n1": (1, 2048, 256, 33, 33, 3, 1, 18, 18, 1),
    "classifier_21": (8, 512, 21, 65, 65, 1, 1, 0, 1, 1),
    "resnext_32x8": (8, 256, 256, 65, 65, 3, 1, 2, 2, 32),
    "past_int32": (64, 64, 128, 800, 800, 3, 1, 1, 1, 1),
}
_WITH_RESIDUAL = ("resnet_1x1", "resnet_layer3_d2", "aspp_r12")
# (batch, C_in, side, dilations): DeepLabV3's heads.
_PYRAMIDS = {
    "aspp_33_n8": (8, 2048, 33, (1, 6, 12, 18)),
    "aspp_33_n1": (1, 2048, 33, (1, 6, 12, 18)),
    "aspp_65_n8": (8, 2048, 65, (1, 12, 24, 36)),
}


def _tensor(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.empty((batch, channels, height, width), dtype=dtype, device="meta").to(
        memory_format=torch.channels_last
    )


def _widest(row_bytes: int) -> int:
    """The widest access, at most 16 bytes, that every row of `row_bytes` allows."""
    return math.gcd(16, row_bytes)


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a call of a launcher, the width in bytes its stores must have), on meta tensors."""
    kernels = load_kernels()
    for name, layer in _LAYERS.items():
        batch, c_in, c_out, height, width, kernel, stride, padding, dilation, groups = layer
        geometry = ((stride, stride), (padding, padding), (dilation, dilation), groups)
        x = _tensor(dtype, batch, c_in, height, width)
        weight = _tensor(dtype, c_out, c_in // groups, kernel, kernel)
        y = _tensor(dtype, batch, c_out, *output_size(height, width, (kernel, kernel), *geometry[:3]))
        vector = torch.empty(c_out, dtype=torch.float32, device="meta")
        pixel = _widest(dtype.itemsize * c_out // groups)
        forward = partial(kernels.conv2d_forward, (x,), weight)

        plain = partial(forward, None, None, None, None, y, *geometry, None, 0.0)
        yield f"{name} forward", plain, pixel
        fused = partial(forward, None, vector, vector, None, y, *geometry, "relu", 0.0)
        yield f"{name} scale+relu", fused, pixel
        if name in _WITH_RESIDUAL:
            added = partial(forward, None, vector, vector, y, y, *geometry, "relu", 0.0)
            yield f"{name} residual", added, pixel
        grad_input = partial(kernels.conv2d_grad_input, y, weight, x, *geometry)
        yield f"{name} grad_input", grad_input, _widest(dtype.itemsize * c_in // groups)
        # Written in fp32 parts, whose rows hold all taps, then summed.
        grad_weight = partial(kernels.conv2d_grad_weight, x, y, weight, *geometry)
        yield f"{name} grad_weight", grad_weight, _widest(dtype.itemsize * c_in // groups * kernel**2)
    yield from _of_images(dtype)
    for name, (batch, channels, side, dilations) in _PYRAMIDS.items():
        x, out = _tensor(dtype, batch, channels, side, side), _tensor(dtype, batch, 4 * 256, side, side)
        weights = [_tensor(dtype, 256, channels, *(1, 1) if d == 1 else (3, 3)) for d in dilations]
        vector = torch.empty(4 * 256, dtype=torch.float32, device="meta")
        pairs = [(d, d) for d in dilations]
        options = (vector, vector, out, pairs, "relu", 0.0)
        yield f"{name} parallel", partial(kernels.parallel_conv2d_forward, x, weights, *options), 16


def _of_images(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """U-Net's decoder, unpadded: a cropped skip beside what was upsampled; and four images at once."""
    kernels = load_kernels()
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    for name, sizes in {
        "unet_decoder": ((128, 280), (128, 200)),
        "unet_plus_plus": ((64, 128), (64, 128), (24, 128), (64, 128)),
    }.items():
        images = cropped([_tensor(dtype, 8, channels, side, side) for channels, side in sizes])
        side = images[0].shape[2] - 2
        weight, y = _tensor(dtype, 128, sum([c for c, _ in sizes]), 3, 3), _tensor(dtype, 8, 128, side, side)
        vector = torch.empty(128, dtype=dtype, device="meta")
        options = (vector, None, None, None, y, *geometry, "relu", 0.0)
        yield f"{name} images", partial(kernels.conv2d_forward, images, weight, *options), 16
