"""Launches of the depthwise and separable kernels for `segfast compile-report`: layers of real networks."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._geometry import output_size
from .._operands import load_kernels

# name: (batch, C, multiplier, size, kernel, stride, padding, dilation)
_DEPTHWISE = {
    "xception_middle": (8, 728, 1, 65, 3, 1, 1, 1),
    "mobilenet_144": (8, 144, 1, 129, 3, 1, 1, 1),
    "mobilenet_96_s2": (8, 96, 1, 257, 3, 2, 1, 1),
    "aspp_d12": (8, 2048, 1, 65, 3, 1, 12, 12),
    "efficientnet_k5": (8, 672, 1, 33, 5, 1, 2, 1),
    "efficientnet_k5_s2": (8, 144, 1, 129, 5, 2, 2, 1),
    "convnext_k7": (8, 96, 1, 128, 7, 1, 3, 1),
    "kernel_1": (8, 64, 1, 65, 1, 1, 0, 1),
    "one_channel": (8, 1, 1, 65, 3, 1, 1, 1),
    "channels_24": (8, 24, 1, 99, 3, 1, 1, 1),
    "multiplier_2": (8, 64, 2, 65, 3, 1, 1, 1),
    "kernel_31": (8, 128, 1, 65, 31, 1, 15, 1),
    "s2_d2": (8, 128, 1, 65, 3, 2, 2, 2),
}
# name: (batch, C, C_out, size, kernel, stride, padding, dilation)
_SEPARABLE = {
    "decoder_256": (8, 256, 256, 129, 3, 1, 1, 1),
    "entry_128": (8, 128, 128, 257, 3, 1, 1, 1),
    "middle_728": (8, 728, 728, 65, 3, 1, 1, 1),
    "mobilenet_144_24": (8, 144, 24, 129, 3, 1, 1, 1),
    "mobilenet_192_64_s2": (8, 192, 64, 65, 3, 2, 1, 1),
    "efficientnet_k5": (8, 672, 112, 33, 5, 1, 2, 1),
}


def _tensor(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.empty((batch, channels, height, width), dtype=dtype, device="meta").to(
        memory_format=torch.channels_last
    )


def _filter(dtype: torch.dtype, channels: int, kernel: int) -> torch.Tensor:
    """[C, 1, K, K] with its channels side by side."""
    return torch.empty((kernel, kernel, 1, channels), dtype=dtype, device="meta").permute(3, 2, 0, 1)


def _width(dtype: torch.dtype, channels: int, taps: int) -> int:
    """Bytes of a store: a thread's channels, as far as every pixel's address allows."""
    most = 16 if taps <= 9 else 8 if taps <= 25 else 4
    return math.gcd(max(most, dtype.itemsize), dtype.itemsize * channels)


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a call of a launcher, the width in bytes its stores must have), on meta tensors."""
    yield from _depthwise_specimens(dtype)
    yield from _separable_specimens(dtype)


def _depthwise_specimens(dtype: torch.dtype):
    kernels = load_kernels()
    for name, (batch, channels, multiplier, size, kernel, *steps) in _DEPTHWISE.items():
        stride, padding, dilation = ((n, n) for n in steps)
        x = _tensor(dtype, batch, channels, size, size)
        weight = _filter(dtype, channels * multiplier, kernel)
        out = output_size(size, size, (kernel, kernel), stride, padding, dilation)
        y = _tensor(dtype, batch, channels * multiplier, *out)
        vector = torch.empty(channels * multiplier, dtype=dtype, device="meta")
        affine = torch.empty(channels * multiplier, device="meta")
        sums = torch.empty((batch, 2, channels), device="meta")
        walks = multiplier == 1 and kernel <= 7 and (stride == (1, 1) or dilation == (1, 1))
        width = _width(dtype, channels, kernel * kernel) if walks else math.gcd(16, dtype.itemsize * channels)
        geometry = (stride, padding, dilation)
        forward = partial(kernels.depthwise_conv2d_forward, x, weight)
        yield f"{name} forward", partial(forward, vector, None, None, y, None, *geometry, None, 0.01), width
        if name in ("xception_middle", "mobilenet_144", "convnext_k7"):
            epilogue = (None, affine, affine, y)
            yield f"{name} scale+relu6", partial(forward, *epilogue, None, *geometry, "relu6", 0.01), width
            yield f"{name} gelu", partial(forward, *epilogue, None, *geometry, "gelu", 0.01), width
            yield (
                f"{name} statistics",
                partial(forward, *epilogue, sums, *geometry, "silu", 0.01),
                min(4, width),
            )
        yield (
            f"{name} grad_input",
            partial(kernels.depthwise_conv2d_grad_input, y, weight, x, *geometry),
            width,
        )
        grad_weight = partial(kernels.depthwise_conv2d_grad_weight, x, y, weight, *geometry)
        yield f"{name} grad_weight", grad_weight, dtype.itemsize  # the filter itself is small


def _separable_specimens(dtype: torch.dtype):
    kernels = load_kernels()
    for name, (batch, channels, channels_out, size, kernel, *steps) in _SEPARABLE.items():
        stride, padding, dilation = ((n, n) for n in steps)
        x = _tensor(dtype, batch, channels, size, size)
        out = output_size(size, size, (kernel, kernel), stride, padding, dilation)
        y = _tensor(dtype, batch, channels_out, *out)
        weight = _tensor(dtype, channels_out, channels, 1, 1)
        between = [torch.empty(channels, device="meta") for _ in range(2)]
        after = [torch.empty(channels_out, device="meta") for _ in range(2)]
        call = partial(kernels.separable_conv2d_forward, x, _filter(dtype, channels, kernel), None)
        options = (stride, padding, dilation)
        width = math.gcd(_width(dtype, channels, kernel * kernel), dtype.itemsize * channels_out)
        fused = partial(call, *between, weight, None, *after, None, y, *options, "relu6", "relu", 0.01)
        yield f"{name} separable", fused, width
        if name == "mobilenet_144_24":
            added = partial(call, *between, weight, None, *after, y, y, *options, "relu6", None, 0.01)
            yield f"{name} separable residual", added, width
