"""Small tiles for the interpreter."""

import pytest

from tests import dilated, separable
from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few steps: a tile or two hold each of the sizes here."""
    if not INTERPRETING:
        yield
        return
    # The interpreter takes as long for a program without work as for another.
    monkeypatch.setattr("segfast.kernels.dense_crf.lists.processors", lambda device: 1)
    with dilated.tiles(64, 16, 64), separable.tiles(4, 8, 8, 2), separable.in_form("fused"):
        yield
