"""Shared by all tests: what needs Triton's interpreter, and poisoned allocations."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"

# More threads than one only fight on a small machine that runs something else beside.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "interpreter: runs Triton kernels on CPU tensors; needs TRITON_INTERPRET=1 set before the start",
    )


def pytest_collection_modifyitems(config, items):
    """Each test runs in one of two sessions: with Triton's interpreter, or without it."""
    for item in items:
        if ("interpreter" in item.keywords) != INTERPRETING:
            wanted = "TRITON_INTERPRET=1" if not INTERPRETING else "TRITON_INTERPRET unset"
            item.add_marker(pytest.mark.skip(reason=f"runs in the session with {wanted}"))


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty filled with NaN, so that an output the kernels leave unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        result = empty(*args, **kwargs)
        if result.is_floating_point() and result.device.type != "meta":
            result.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch, "empty", poisoned)
