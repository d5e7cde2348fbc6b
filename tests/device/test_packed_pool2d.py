"""Packed pooling on a device, to the last bit: values, places, unpooled images, gradients, in any layout."""

import pytest
import torch

import segfast
from segfast.kernels._launch import _LAUNCHES

from ..packed_pool2d.reference import check, image
from .tester import place

pytestmark = pytest.mark.device

# Images, the rounding of odd sides, the layout.
CASES = {
    "even": ((2, 8, 6, 4), False, ""),
    "odd, up": ((1, 21, 7, 5), True, ""),
    "odd, down": ((1, 9, 5, 7), False, "crop"),
    "odd strides": ((2, 5, 3, 8), True, "wide"),
    "off 16 bytes": ((1, 16, 5, 4), True, "off16"),
    "NCHW": ((1, 12, 4, 7), True, "NCHW"),
    "several programs": ((1, 72, 9, 10), True, ""),
    "a row of one channel": ((3, 1, 1, 5), True, ""),
    "a pixel": ((2, 4, 1, 1), True, ""),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pooling_and_unpooling_are_torchs(name, dtype, device):
    shape, ceil_mode, layout = CASES[name]
    launches = []
    for seed in range(2):  # the second time as remembered
        x = image(shape, dtype, seed=seed)
        with segfast.backend("triton"):
            check(x, ceil_mode, place(x.to(device), layout))
        launches.append(dict(_LAUNCHES))
    assert launches[0] and launches[0] == launches[1]
