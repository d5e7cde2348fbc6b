"""What the tests of cuDNN's candidates share: a layer, its values, and made-up tables of a GPU."""

import pytest
import torch

from segfast.kernels import _configs, _device
from segfast.ops import _backend, _cudnn, _cudnn_graph
from segfast.ops._conv2d_aten import conv2d_aten

PLAIN, FUSED = "ci8-co16-t9-g1-s1d2-bfloat16-p6", "ci8-co16-t9-g1-s1d2-fused-bfloat16-p6"
GEOMETRY = ((1, 1), (2, 2), (2, 2), 1)  # stride, padding, dilation, groups
BUCKET = (torch.bfloat16, torch.device("cpu"), 8, 16, 9, 1, 98, ((1, 1), (2, 2), (3, 3)))


def forget():
    """Read the rows anew."""
    _backend._look_up.cache_clear()
    _backend._rival.cache_clear()


@pytest.fixture
def rows(monkeypatch):
    """Measured rows, by bucket, of conv2d_forward; tensors of a CPU pass for a GPU's with cuDNN."""
    found = {}
    monkeypatch.setattr(_device, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_device, "gpu_slug", lambda device: "nvidia-test")
    monkeypatch.setattr(_configs, "proven_entries", lambda arch: {"conv2d_forward.bfloat16"})
    monkeypatch.setattr(_configs, "tables", lambda slug, arch: [{"operations": {"conv2d_forward": found}}])
    monkeypatch.setattr(_cudnn, "_has_cudnn", lambda input: True)
    monkeypatch.setattr(_cudnn_graph, "installed", lambda: True)
    forget()
    yield found
    forget()


def drawn(dtype=torch.bfloat16, groups=1):
    """x, weight, bias, scale, shift, residual of the layer in the table."""
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


RELU_FASTEST = {"us": 30.0, "aten_us": 40.0, "cudnn_relu_us": 20.0, "cudnn_graph_us": 25.0}
GRAPH_FASTEST = {"us": 30.0, "aten_us": 40.0, "cudnn_relu_us": 28.0, "cudnn_graph_us": 25.0}
