"""The graph of a forward: listed on a copy without values, exported where values are asked for."""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfast._optimize import graph as graph_module
from segfast._optimize.graph import Graph, digest_of_values


class Net(nn.Module):
    """A convolution, a norm and an activation, and what `between` does with the convolution's result."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.dropout, self.between, self.ran = nn.Dropout(0.5), between, False

    def forward(self, x):
        y = self.conv(x)
        self.ran = True
        return self.act(self.bn(self.between(self, y)))


def graph(between, training=False):
    net = Net(between).train(training)
    found = Graph(net, (torch.randn(1, 3, 8, 8),), training)
    assert not net.ran  # but a copy
    return found


def reader(found, name="conv"):
    output = found.output(name)
    return ("", "nothing leaves it") if output is None else found.reader(output)


@pytest.fixture
def no_export(monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_follow_one_another(training, no_export):
    found = graph(lambda net, y: y, training)
    assert reader(found) == ("bn", "")
    assert reader(found, "bn") == ("act", "")
    assert reader(found, "act") == ("", "it is a result of the model")


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda net, y: y.contiguous(), "contiguous follows"),
        (lambda net, y: y + F.relu(y), "relu follows"),
        (lambda net, y: y * 2, "mul follows"),
        (lambda net, y: y.data, "get follows"),
        (lambda net, y: (y[:, :1].relu_(), y)[1], "getitem follows"),
        (lambda net, y: (y.view(-1).mul_(2), y)[1], "view follows"),
        (lambda net, y: (torch.add(y, 1, out=y), y)[1], "add follows"),
    ],
)
def test_what_comes_between(between, why, no_export):
    assert reader(graph(between)) == ("", why)


def test_layers_that_change_nothing_in_eval_come_between_too(no_export):
    assert reader(graph(lambda net, y: net.dropout(y))) == ("dropout", "")


def test_what_was_written_is_read(no_export):
    """By its other name: the norm reads what the activation made of the convolution's result."""
    found = graph(lambda net, y: (F.relu(y, inplace=True), y)[1])
    assert reader(found) == ("", "relu follows")


def test_modules_of_other_threads_are_none_of_it(no_export):
    def between(net, y):
        thread = threading.Thread(target=nn.ReLU(), args=(torch.zeros(1),))
        thread.start()
        thread.join()
        return y

    assert reader(graph(between)) == ("bn", "")


@dataclasses.dataclass
class Kept:
    """An object that no pytree knows."""

    tensor: torch.Tensor


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keep", [lambda y: y, lambda y: [{"y": y}], Kept, lambda y: y[:1]])
def test_what_the_model_keeps_is_a_result_of_it(keep, training, no_export):
    found = graph(lambda net, y: (setattr(net, "kept", keep(y)), y)[1], training)
    assert reader(found)[0] == ""


def test_a_result_in_an_object_is_one_too(no_export):
    class Features(Net):
        def forward(self, x):
            y = self.conv(x)
            return Kept((y, self.act(self.bn(y))))

    found = Graph(Features(None), (torch.randn(1, 3, 8, 8),), False)
    assert reader(found) == ("", "it is a result of the model")


def test_what_is_let_go_late_is_not_kept(no_export):
    def between(net, y):
        circle = [y]
        circle.append(circle)
        return y

    assert reader(graph(between)) == ("bn", "")


@torch.jit.script
def scripted_(y):
    y.mul_(2)


def test_operations_of_scripted_code_are_exported(monkeypatch):
    exported = []
    monkeypatch.setattr(graph_module, "_exported", lambda *args: exported.append(args) or [])
    graph(lambda net, y: (scripted_(y), y)[1])
    assert len(exported) == 1


def asks_for_values(net, y):
    return y if torch.compiler.is_compiling() or y.sum() > 0 else y * 2


def test_a_forward_that_asks_for_values_is_exported():
    assert reader(graph(asks_for_values)) == ("bn", "")


def test_tensors_that_are_more_than_shape_and_values_are_not_listed(monkeypatch):
    exported = []
    monkeypatch.setattr(graph_module, "_exported", lambda *args: exported.append(args) or [])
    net = Net(lambda net, y: y)
    net.bn.weight = nn.Parameter(type("Own", (torch.Tensor,), {})(net.bn.weight.data))
    Graph(net, (torch.randn(1, 3, 8, 8),), False)
    assert len(exported) == 1


def test_the_random_state_and_buffers_stay(no_export):
    net = Net(lambda net, y: y + torch.rand(1).item()).train()
    state, before = torch.get_rng_state(), net.bn.running_mean.clone()
    Graph(net, (torch.zeros(1, 3, 8, 8),), True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.bn.running_mean, before) and not net.bn.num_batches_tracked


def test_a_constant_is_told_by_its_value(no_export):
    digests = []
    for value in (2.0, 2.0, 3.0):
        net = Net(lambda net, y: y * net.factor)
        net.factor = torch.tensor(value)
        digests.append(Graph(net, (torch.zeros(1, 3, 8, 8),), False).digest)
    assert digests[0] == digests[1] != digests[2]


def test_what_a_hook_writes_to_the_callers_own_model_is_put_back(no_export):
    net = Net(lambda net, y: y)
    net.register_buffer("count", torch.zeros(()))

    def count(*_):
        net.count += 1

    net.conv.register_forward_hook(count)
    Graph(net, (torch.zeros(1, 3, 8, 8),), False)
    assert net.count == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(4),
        torch.arange(8.0)[::2],
        torch.arange(8)[::8],
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(4).to(torch.complex64).conj(),
        torch.arange(4).to(torch.complex64).conj().imag,
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.arange(4).bfloat16(),
    ],
)
def test_a_digest_is_of_the_values_however_they_lie(tensor):
    same = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    assert digest_of_values(tensor) == digest_of_values(same)
    if tensor.numel():
        assert digest_of_values(tensor) != digest_of_values(same.logical_not().to(tensor.dtype))
