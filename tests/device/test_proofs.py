"""The cases of `segfast prove`, on a device: what "auto" asks for before it takes a kernel."""

import importlib

import pytest

from segfast.ops import FAMILIES
from segfast.ops._prove import DTYPES, prove

pytestmark = pytest.mark.device


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES)
def test_proof(family, dtype, device):
    rows = list(prove(device, (dtype,), families=(family,)))
    assert rows and [str(row) for row in rows if not row.passed] == []
    assert {row.operation for row in rows} == set(importlib.import_module(f"segfast.ops.{family}").OPERATIONS)
