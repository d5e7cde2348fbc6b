"""How calls of packed pooling are run to be measured on a GPU."""

from functools import partial

import torch

from .._gpu_call import GPU_OPERATIONS, Bound, Draw, GpuCall, GpuOperation
from .functional import OPERATIONS, packed_max_pool2d, packed_max_unpool2d


def _pool(call: GpuCall, draw: Draw) -> Bound:
    ((image,), (ceil_mode,)) = call.images, call.options
    return Bound((draw(*image),), partial(packed_max_pool2d, ceil_mode=ceil_mode), 1)


def _unpool(call: GpuCall, draw: Draw) -> Bound:
    pooled, image = call.images
    batch, channels, *size = pooled
    places = draw.labels(256, batch, -(-channels // 4), *size).to(torch.uint8)
    # Windows at the border may have but one row or column: no pixel below, or beside, the first.
    if 2 * size[0] > image[2]:
        places[:, :, -1] &= 0b01010101
    if 2 * size[1] > image[3]:
        places[..., -1] &= 0b10101010
    function = partial(packed_max_unpool2d, output_size=image[2:])
    return Bound((draw(*pooled), places), function, 1)


_FAMILY = "packed_pool2d"
GPU_OPERATIONS[OPERATIONS[0]] = GpuOperation(
    _FAMILY, lambda gradients: OPERATIONS[: 2 if gradients else 1], _pool
)
GPU_OPERATIONS[OPERATIONS[1]] = GpuOperation(
    _FAMILY, lambda gradients: OPERATIONS[1 : 3 if gradients else 2], _unpool
)
