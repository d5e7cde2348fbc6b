"""Dilated and dense convolution and ASPP against ATen; on a GPU against cuDNN's fused calls too."""

import pytest
import torch

from benchmarks.cases import CASES, directions, find

FAMILY = [case for case in CASES if case.family == "conv2d"]
# On a CPU all batches are the same case, and the gradients of a few stand for all.
ON_GPU = torch.cuda.is_available()
OTHER_BATCHES = {case.name for case in FAMILY if case["n"] != 8 and "quick" not in case.uses}
FEW = ("resnet_layer3_d2_layer", "aspp_n8_33")


@pytest.mark.parametrize(
    "case", [c for c in FAMILY if ON_GPU or c.name not in OTHER_BATCHES], ids=lambda case: case.name
)
def test_forward(compare, case):
    compare(case)


@pytest.mark.parametrize(
    ("name", "direction"),
    [(c.name, direction) for c in FAMILY if ON_GPU or c.name in FEW for direction in directions(c)],
)
def test_gradients(compare, name, direction):
    compare(find(name).replace(direction=direction))


def test_aspp_of_one_image(compare):
    """On a CPU of other channels than the batches: padding is no work there, the pooled branch no image."""
    if ON_GPU:
        pytest.skip("among the forward cases")
    compare(find("aspp_n1_33"))
