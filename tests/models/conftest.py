"""Small images, and the operators that large ones run on."""

import pytest

from segfast.nn._fused import separable


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch):
    monkeypatch.setattr(separable, "_PAYS_ON_CPU", 0)
