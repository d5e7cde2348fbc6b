"""Small tiles for the interpreter."""

import pytest

from tests.conftest import INTERPRETING
from tests.conv2d import reference
from tests.separable_conv2d import reference as separable_conv2d_reference


@pytest.fixture(autouse=True)
def small_tiles():
    """Few steps: a tile or two hold each of the sizes here."""
    if not INTERPRETING:
        yield
        return
    with (
        reference.tiles(64, 16, 64),
        separable_conv2d_reference.tiles(4, 8, 8, 2),
        separable_conv2d_reference.in_form("fused"),
    ):
        yield
