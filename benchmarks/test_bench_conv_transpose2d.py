"""Transposed convolution against ATen: both layouts on a CPU, cuDNN and its fused calls too on a GPU."""

import pytest

from benchmarks.cases import CASES, find

FAMILY = [case for case in CASES if case.family == "conv_transpose2d"]


@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_forward(compare, case):
    compare(case)


@pytest.mark.parametrize("direction", ["backward", "train"])
@pytest.mark.parametrize("name", ["unet_up2", "unet_up4", "decoder_up4x4", "unet_up3_concat"])
def test_gradients(compare, name, direction):
    compare(find(name).replace(direction=direction))
