"""Tensors that norms were folded into, and what makes them stale."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch.utils import _pytree

import segfast
from segfast.nn import ASPP, ConvBNAct
from segfast.nn._fused import folding
from segfast.nn._fused.folding import folded


def layers():
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), torch.nn.ReLU())


MODELS = {
    "ConvBNAct": (lambda: ConvBNAct(4, 8), "1"),
    "a sequence": (lambda: segfast.optimize(layers()), "1"),
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


@pytest.fixture
def capture(monkeypatch):
    """A context that stands for the capture of a CUDA graph."""

    @contextlib.contextmanager
    def capturing():
        with monkeypatch.context() as patch:
            patch.setattr(folding, "is_captured", lambda tensors: True)
            yield

    return capturing


def test_what_a_captured_graph_reads_is_kept(capture):
    norm = torch.nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        before = weakref.ref(folded(norm).scale)
        with capture():
            assert folded(norm).scale is before()
        folding.forget(norm)
        gc.collect()
        assert before() is not None
        other = torch.nn.BatchNorm2d(3).eval()
        with capture():  # first computed in a capture, it is the graph's: nobody else gets it
            inside = folded(other).scale
        assert folded(other).scale is not inside
    del norm
    gc.collect()
    assert before() is None


def read_aspp(conv, norm, aspp):
    aspp(torch.ones(1, 4, 96, 96))
    return folding._known[aspp].result


KEPT = {
    "scale and shift": lambda conv, norm, aspp: folded(norm),
    "filter": lambda conv, norm, aspp: folding.folded_filter(conv, norm),
    "pyramid": read_aspp,
}


@pytest.mark.parametrize("kind", KEPT)
def test_memory_that_captured_graphs_read_does_not_grow(kind, capture):
    """Train, capture a graph, and again: what the first graph reads is what the last one reads."""
    conv, aspp = torch.nn.Conv2d(4, 3, 1), ASPP(4, [2, 3], 8).eval()
    norm = torch.nn.BatchNorm2d(3).eval() if kind != "pyramid" else aspp.get_submodule("convs.1.1")

    def read():
        found = _pytree.tree_leaves(KEPT[kind](conv, norm, aspp))
        return [t for t in found if isinstance(t, torch.Tensor)]

    with torch.no_grad():
        first = read()
        for _ in range(3):
            with capture():
                assert [id(t) for t in read()] == [id(t) for t in first]
            before = [t.clone() for t in first]
            norm.running_var.mul_(4)
            folding.forget(norm, conv, aspp)
            read()
            assert any(not torch.equal(old, new) for old, new in zip(before, first, strict=True))
            fresh = read()
            assert [id(t) for t in fresh] == [id(t) for t in first]


def test_what_autograd_saved_is_not_written_to_without_need(capture):
    norm = torch.nn.BatchNorm2d(3).eval()
    norm.requires_grad_(False)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    folded(norm)
    with capture():
        folded(norm)
    y = (x * folded(norm).scale[:, None, None]).sum()
    folding.forget(norm)
    folded(norm)
    y.backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x) * norm.running_var.rsqrt()[0])


def test_many_captures_keep_a_table_of_zones_once(monkeypatch):
    from types import SimpleNamespace

    from segfast.kernels.conv2d import dilated

    monkeypatch.setattr(dilated, "_IN_GRAPHS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work = SimpleNamespace(is_cuda=True)
    launch = dilated.Zoned(lambda *args: None, work, torch.zeros(1), 1, None, 0.0)
    for _ in range(5):
        launch(None, [None], None, None, None, None, None)
    assert len(dilated._IN_GRAPHS) == 1
