"""cuDNN's graphs for convolutions, with a stand-in for the `cudnn` package that computes in ATen."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from segfast.ops import _cudnn, _cudnn_graph
from tests.cudnn import GEOMETRY, close, drawn, expected, has_cudnn

__all__ = ["has_cudnn"]


class _Node:
    """A tensor of a graph: a key of the pointers."""

    def set_output(self, flag):
        self.output = flag
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


class _Graph:
    """Stands for cudnn.pygraph: keeps the nodes, and computes them in ATen when it is executed."""

    def __init__(self, package, **options):
        self.package, self.options, self.nodes = package, options, []

    def tensor_like(self, tensor):
        tensor.__dlpack__()  # as the package does; refuses what requires a gradient
        return _Node()

    def __getattr__(self, kind):
        def node(**arguments):
            self.nodes.append((kind, arguments, _Node()))
            return self.nodes[-1][2]

        return node

    def build(self, modes):
        if self.package.refuses:
            raise ValueError("no engine\nat all")

    def get_workspace_size(self):
        return 64

    def execute(self, pointers, workspace, handle):
        assert workspace.numel() == 64 and workspace.dtype == torch.uint8
        self.package.executed.append(handle)
        values = {key: t.float() for key, t in pointers.items()}
        for kind, given, node in self.nodes:
            options = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
            if kind == "conv_fprop":
                groups = values[given["image"]].shape[1] // values[given["weight"]].shape[1]
                y = F.conv2d(values[given["image"]], values[given["weight"]], **options, groups=groups)
            elif kind == "conv_dgrad":
                y = F.conv_transpose2d(values[given["loss"]], values[given["filter"]], **options)
                assert list(y.shape) == node.dim
            elif kind in ("mul", "add"):
                y = getattr(torch, kind)(values[given["a"]], values[given["b"]])
            elif kind == "swish":
                y = F.silu(values[given["input"]])
            else:
                y = {"relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}[kind](values[given["input"]])
                y = y.clamp(max=given.get("upper_clip", 1e9))
            values[node] = y
        assert self.nodes[-1][2].output
        pointers[self.nodes[-1][2]].copy_(y)


@pytest.fixture
def package(monkeypatch):
    """Stands for the `cudnn` package."""
    fake = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="f16", FLOAT="f32"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="fallback"),
        handles=[], graphs=[], streams=[], executed=[], refuses=False,
    )  # fmt: skip
    fake.create_handle = lambda: fake.handles.append(len(fake.handles)) or fake.handles[-1]
    fake.set_stream = lambda handle, stream: fake.streams.append(stream)
    fake.pygraph = lambda **options: fake.graphs.append(_Graph(fake, **options)) or fake.graphs[-1]
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(_cudnn_graph, "_PLANS", {})
    monkeypatch.setattr(_cudnn_graph, "_HANDLES", {})
    fake.stream = 11
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=fake.stream))
    return fake


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "gelu", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_graph_is_the_layer(package, activation, groups):
    x, weight, bias, scale, shift, residual = drawn(torch.float32, groups)
    geometry = (*GEOMETRY[:3], groups)
    y = _cudnn.conv2d_graph(x, weight, bias, *geometry, scale, shift, residual, activation)
    close(y, expected(x, weight, bias, scale, shift, residual, activation, groups), torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (graph,) = package.graphs
    kinds = [kind for kind, *_ in graph.nodes]
    assert kinds[:4] == ["conv_fprop", "mul", "add", "add"] and len(kinds) == 4 + (activation is not None)
    assert graph.options["compute_data_type"] == "f32"
    bare = _cudnn.conv2d_graph(x, weight, bias, *geometry, None, None, None, activation)
    close(bare, expected(x, weight, bias, None, None, None, activation, groups), torch.float32)


def test_a_layer_that_is_being_trained(package):
    x, weight, bias, *rest = [t.requires_grad_() for t in drawn(torch.float32)]
    with torch.no_grad():
        y = _cudnn.conv2d_graph(x, weight, bias, *GEOMETRY, *rest, "relu")
    close(y, expected(x, weight, bias, *rest, "relu"), torch.float32)


def test_a_plan_is_built_once_for_a_layout_and_set_to_the_current_stream(package):
    x, weight, *_ = drawn(torch.float32)

    def call(x, dilation=(2, 2), activation="relu"):
        _cudnn.conv2d_graph(x, weight, None, (1, 1), (2, 2), dilation, 1, None, None, None, activation)

    call(x)
    call(x.clone(memory_format=torch.preserve_format))
    package.stream = 12
    thread = threading.Thread(target=call, args=(x,))
    thread.start()
    thread.join()
    assert len(package.graphs) == len(package.handles) == 1
    assert package.streams == [11, 11, 12] and package.executed == [0, 0, 0]
    call(x[:1])
    call(x, dilation=(1, 1))
    call(x, activation="relu6")
    call(torch.empty_strided(x.shape, [2 * s for s in x.stride()]).copy_(x))  # made dense first
    assert len(package.graphs) == 4 and len(package.handles) == 1
    _cudnn_graph._PLANS.update({i: None for i in range(_cudnn_graph._MOST_PLANS)})
    call(x[:, :, 1:])
    assert len(_cudnn_graph._PLANS) == 1


def test_strides_that_torch_leaves_open_are_those_of_channels_last():
    t = torch.empty(4, 1, 3, 3)
    assert t.is_contiguous(memory_format=torch.channels_last)
    assert _cudnn_graph._channels_last(t).stride() == (9, 1, 3, 1)
    assert _cudnn_graph._channels_last(torch.empty(1, 6, 1, 1)[:, :3]).stride() == (3, 1, 3, 3)


def test_a_graph_without_an_engine_is_left_to_aten_and_not_tried_again(package, has_cudnn):
    package.refuses = True
    x, weight, *_ = drawn()
    args = (x, weight, None, *GEOMETRY, None, None, None, "relu")
    for _ in range(2):
        assert _cudnn.conv2d_cudnn(_cudnn.GRAPH, *args) is None
    assert len(package.graphs) == 1
    with pytest.raises(_cudnn_graph.GraphRefused, match=r"^ValueError: no engine$"):
        _cudnn.conv2d_graph(*args)


def test_without_the_package_nothing_is_imported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _cudnn_graph.installed.cache_clear()
    assert not _cudnn_graph.installed()
    _cudnn_graph.installed.cache_clear()
    assert "cudnn" not in sys.modules
