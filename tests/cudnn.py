"""Shared by the tests of cuDNN's fused calls: a layer, its values, a stand-in for a GPU with cuDNN."""

import pytest
import torch

from segfast.ops import _cudnn, _cudnn_graph
from segfast.ops._conv2d_aten import conv2d_aten

GEOMETRY = ((1, 1), (2, 2), (2, 2), 1)  # stride, padding, dilation, groups


@pytest.fixture
def has_cudnn(monkeypatch):
    """Tensors of a CPU pass for a GPU's, where cuDNN and its package of graphs are installed."""
    monkeypatch.setattr(_cudnn, "_has_cudnn", lambda input: True)
    monkeypatch.setattr(_cudnn_graph, "installed", lambda: True)


def drawn(dtype=torch.bfloat16, groups=1):
    """x, weight, bias, scale, shift, residual of the layer."""
    torch.manual_seed(0)
    sizes = ((2, 8, 7, 7), (16, 8 // groups, 3, 3), (16,), (16,), (16,), (2, 16, 7, 7))
    found = [torch.randn(size) for size in sizes]
    for i, t in enumerate(found):
        if t.dim() == 4:
            found[i] = t.contiguous(memory_format=torch.channels_last).to(dtype)
    found[2] = found[2].to(dtype)
    return found


def expected(x, weight, bias, scale, shift, residual, activation, groups=1):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    rest = [None if t is None else t.double() for t in (scale, shift, residual)]
    return conv2d_aten(*wide, *GEOMETRY[:3], groups, *rest, activation, 0.01)


def close(actual, reference, dtype=torch.bfloat16):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert (actual.double() - reference).norm() <= tolerance * reference.norm()
