"""The depthwise and separable kernels compile for a GPU, also where a stride of 1 makes an offset a constant.

The interpreter passes every integer; the compiler builds those equal to 1 in.
"""

import pytest
import torch
from triton.backends.compiler import GPUTarget

from segfast import kernels

LAST = {"device": "meta", "dtype": torch.float16, "memory_format": torch.channels_last}

# (N, C, H, W), filters a channel, kernel, stride, padding.
NARROW = {
    "a kernel of one tap": ((1, 4, 5, 5), 1, (1, 1), 1, 0),
    "one tap, s2": ((1, 4, 4, 3), 1, (1, 1), 2, 0),
    "one channel": ((1, 1, 4, 4), 1, (3, 3), 2, 1),
    "one channel of one column": ((1, 1, 5, 1), 1, (3, 1), 1, (1, 0)),
    "one channel of one pixel, two filters": ((2, 1, 1, 1), 2, (3, 3), 1, 1),
}


def launches(name):
    (n, c, h, w), multiplier, kernel, stride, padding = NARROW[name]
    stride = (stride, stride)
    padding = padding if isinstance(padding, tuple) else (padding, padding)
    geometry = (stride, padding, (1, 1))
    size = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip((h, w), padding, kernel, stride, strict=True)]
    filters = c * multiplier
    x, y, z = (torch.empty(shape, **LAST) for shape in ((n, c, h, w), (n, filters, *size), (n, 8, *size)))
    weight = torch.empty(*kernel, 1, filters, device="meta", dtype=torch.float16).permute(3, 2, 0, 1)
    pointwise = torch.empty(8, filters, 1, 1, device="meta", dtype=torch.float16)
    tile = kernels.Tile(16, 16, 16, 4, 1, form="fused")
    none = (None, None, None)
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as recorded:
        kernels.depthwise_conv2d_forward(x, weight, *none, y, None, *geometry, "relu", 0.0)
        kernels.depthwise_conv2d_grad_input(y, weight, x, *geometry)
        kernels.depthwise_conv2d_grad_weight(x, y, torch.empty_like(weight), *geometry)
        with kernels.override_tile("separable_conv2d_forward", tile):
            kernels.separable_conv2d_forward(
                x, weight, *none, pointwise, *none, None, z, *geometry, "relu", None, 0.0
            )
    return recorded


@pytest.mark.parametrize("name", NARROW)
def test_strides_of_one_compile(name):
    recorded = launches(name)
    assert len(recorded) == 5
    for launch, pointers in recorded:
        assert kernels.compile_offline(launch, pointers, GPUTarget("cuda", 90, 32)).asm["ptx"]
