"""Exports for a range of sizes, and whether this torch's own operators admit them."""

import functools

import pytest
import torch


def dims(low: int, high: int) -> tuple[torch.export.Dim, torch.export.Dim]:
    """A free height and width; skips the test where torch's max pooling ties them to the example's parity."""
    if not _max_pool_is_free():
        pytest.skip("max_pool2d of this torch (2.11's) exports for even or odd sizes, not for both")
    height, width = (torch.export.Dim(name, min=low, max=high) for name in ("height", "width"))
    return height, width


@functools.cache
def _max_pool_is_free() -> bool:
    height, width = (torch.export.Dim(name, min=32, max=64) for name in ("height", "width"))
    sizes = ({2: height, 3: width},)
    try:
        torch.export.export(torch.nn.MaxPool2d(2), (torch.zeros(1, 1, 48, 40),), dynamic_shapes=sizes)
    except torch._dynamo.exc.UserError:
        return False
    return True
