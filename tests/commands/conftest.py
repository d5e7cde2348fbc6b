"""For tests of commands: modules of models that they wrote are imported anew."""

import sys

import pytest


@pytest.fixture(autouse=True)
def modules_as_before():
    """Forget modules that a command imported for MODEL by name: `models` is another one in each test."""
    before = set(sys.modules)
    yield
    for name in {"models", "package", "package.inner"} - before:
        sys.modules.pop(name, None)
