"""The cases of `segfast prove`, on a device: what "auto" asks for before it takes a kernel."""

import importlib

import pytest

from segfast.kernels import operations
from segfast.ops import FAMILIES
from segfast.ops._prove import DTYPES, prove

pytestmark = pytest.mark.device


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES)
def test_proof(family, dtype, device):
    rows = list(prove(device, (dtype,), families=(family,)))
    assert rows and [str(row) for row in rows if not row.passed] == []
    expected = set(importlib.import_module(f"segfast.ops.{family}").OPERATIONS)
    if family == "conv2d":  # whose results are normalized in training
        expected |= {name for name in operations() if name.startswith("batch_norm")}
    assert {row.operation for row in rows} == expected
