"""Small images, and the operators that large ones run on."""

import pytest

from segfast.nn import _pair


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch):
    monkeypatch.setattr(_pair, "_PAYS_ON_CPU", 0)
