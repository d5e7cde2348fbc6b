"""The cases of `segfast doctor --prove`, on a device: what "auto" asks for before it takes a kernel."""

import importlib
import os

import pytest

from segfast.ops import FAMILIES
from segfast.ops._prove import DTYPES, prove

from .conftest import SIMULATED

pytestmark = pytest.mark.device
# So many cases of a family, where all of them would take half an hour; SEGFAST_WHOLE_PROOF=1 for all.
SOME = None if os.environ.get("SEGFAST_WHOLE_PROOF") == "1" or not SIMULATED else 4


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES)
def test_proof(family, dtype, device, monkeypatch):
    monkeypatch.setattr("segfast.ops.FAMILIES", (family,))
    rows = list(prove(device, (dtype,), SOME))
    assert rows and [str(row) for row in rows if not row.passed] == []
    if SOME is None:
        assert {row.operation for row in rows} == set(
            importlib.import_module(f"segfast.ops.{family}").OPERATIONS
        )
