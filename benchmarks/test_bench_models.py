"""Whole networks against their plain torch.nn twins."""

import pytest

from benchmarks.cases import MODELS, find
from benchmarks.suite import make_problem


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_unet(compare, direction):
    compare(find("unet_572").replace(direction=direction))


@pytest.mark.parametrize("case", [m for m in MODELS if m["model"] != "unet"], ids=lambda case: case.name)
def test_other_models(compare, case):
    size = case if compare.device.type == "cuda" else case.cpu()
    try:
        problem = make_problem(size, compare.device)
    except LookupError as error:
        pytest.skip(str(error))
    compare(case, problem)
