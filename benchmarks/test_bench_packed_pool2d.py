"""Pooling and unpooling of SegNet with packed indices against PyTorch's pair."""

import pytest

from benchmarks.cases import CASES, directions

FAMILY = [case for case in CASES if case.family == "packed_pool2d"]
ROWS = [(case, direction) for case in FAMILY for direction in ("forward", *directions(case))]


@pytest.mark.parametrize(("case", "direction"), ROWS, ids=[f"{case.name}-{end}" for case, end in ROWS])
def test_packed_pooling(compare, case, direction):
    compare(case.replace(direction=direction))
