"""Small images, and the operators that large ones run on."""

import pytest


@pytest.fixture(autouse=True)
def operators_of_large_images(fused_at_any_size):
    """Of every test here."""
