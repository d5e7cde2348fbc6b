"""What norms were folded into, and what makes it stale."""

import copy

import pytest
import torch

import segfast
from segfast.nn import ASPP, ConvBNAct
from segfast.nn._norm import folded


def layers():
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), torch.nn.ReLU())


MODELS = {
    "ConvBNAct": (lambda: ConvBNAct(4, 8), "1"),
    "a chain": (lambda: segfast.optimize(layers()), "1"),
    "ASPP": (lambda: ASPP(4, [2, 3], 8), "convs.1.1"),
    "a block": (lambda: segfast.nn.InvertedResidual(4, 4), "conv.1.1"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_norm_alone_is_seen(name):
    """Recalibrating batch norm: training mode writes running statistics, and marks nothing as written."""
    torch.manual_seed(0)
    build, norm = MODELS[name]
    model = build().eval()
    x = torch.randn(4, 4, 64, 64)
    with torch.no_grad():
        stale = model(x)
        model.get_submodule(norm).train()
        model(x + 1)
        model.get_submodule(norm).eval()
        found = model(x)
        fresh = copy.deepcopy(model)(x)
    torch.testing.assert_close(found, fresh, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, stale, atol=1e-2)


def test_what_a_captured_graph_reads_is_kept(monkeypatch):
    import gc
    import weakref

    from segfast.nn import _norm

    norm = torch.nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        before = weakref.ref(folded(norm).scale)
        monkeypatch.setattr(_norm, "_is_captured", lambda tensors: True)
        assert folded(norm).scale is before()
        monkeypatch.undo()
        _norm.forget(norm)
        gc.collect()
        assert before() is not None
        # First computed in a capture, it is the graph's: nobody else gets it.
        monkeypatch.setattr(_norm, "_is_captured", lambda tensors: True)
        inside = folded(norm).scale
        monkeypatch.undo()
        assert folded(norm).scale is not inside
    del norm
    gc.collect()
    assert before() is None
