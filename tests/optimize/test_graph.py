"""The graph of a forward: who reads what in it, and a digest of all but the values."""

import ctypes
import dataclasses
import functools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfast._optimize.graph import Graph, digest_of_values


class Net(nn.Module):
    """A convolution, a norm and an activation, and what `between` does with the convolution's result."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.dropout, self.between = nn.Dropout(0.5), between

    def forward(self, x):
        y = self.conv(x)
        return self.act(self.bn(self.between(self, y)))


def graph(between, training=False):
    return Graph(Net(between), (torch.randn(1, 3, 8, 8),), training)


def reader(found, name="conv"):
    output = found.output(name)
    return ("", "nothing leaves it") if output is None else found.reader(output)


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_follow_one_another(training):
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
        (lambda net, y: (setattr(y, "data", torch.ones(1, 4, 6, 6)), y)[1], "set follows"),
        (lambda net, y: torch.vmap(lambda t: t * 2)(y), "mul follows"),
        (lambda net, y: (torch.vmap(torch.sum)(y), y)[1], "sum follows"),
        (lambda net, y: (torch.vmap(torch.vmap(lambda t: t.mul_(2)))(y), y)[1], "mul follows"),
    ],
)
def test_what_comes_between(between, why):
    assert reader(graph(between)) == ("", why)


def test_layers_that_change_nothing_in_eval_come_between_too():
    assert reader(graph(lambda net, y: net.dropout(y))) == ("dropout", "")


def test_what_was_written_is_read():
    """By its other name: the norm reads what the activation made of the convolution's result."""
    found = graph(lambda net, y: (F.relu(y, inplace=True), y)[1])
    assert reader(found) == ("", "relu follows")


def test_modules_of_other_threads_are_none_of_it():
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
def test_what_the_model_keeps_is_a_result_of_it(keep, training):
    found = graph(lambda net, y: (setattr(net, "kept", keep(y)), y)[1], training)
    assert reader(found)[0] == ""


def test_a_result_in_an_object_is_one_too():
    class Features(Net):
        def forward(self, x):
            y = self.conv(x)
            return Kept((y, self.act(self.bn(y))))

    found = Graph(Features(None), (torch.randn(1, 3, 8, 8),), False)
    assert reader(found) == ("", "it is a result of the model")


def test_what_is_let_go_late_is_not_kept():
    def between(net, y):
        circle = [y]
        circle.append(circle)
        return y

    assert reader(graph(between)) == ("bn", "")


@torch.jit.script
def scripted_(y):
    y.mul_(2)


@torch.jit.script
def scripted(y):
    return torch.relu(y * 2) + 1


def test_operations_of_scripted_code_are_listed():
    assert reader(graph(lambda net, y: (scripted_(y), y)[1])) == ("", "mul follows")
    for _ in range(3):  # it compiles itself in the second run, or the third
        scripted(torch.ones(1, 4, 6, 6))
    assert reader(graph(lambda net, y: (scripted(y), y)[1])) == ("", "mul follows")
    asks = graph(lambda net, y: y * 2 if scripted(y).sum() < 0 else y)
    assert reader(asks) == ("", "mul follows")


@pytest.mark.parametrize(
    "ask",
    [
        lambda y: bool(y.sum() > 0),
        lambda y: y.max().item(),
        lambda y: y.tolist(),
        lambda y: y.numpy().sum(),
        lambda y: (ctypes.c_float * 2).from_address(y.data_ptr())[:],
        lambda y: torch.equal(y, y),
        lambda y: y[y > 0],
        lambda y: y.nonzero(),
    ],
)
def test_where_a_forward_asks_for_values_what_is_there_may_be_read_again(ask):
    def between(net, y):
        return y * 2 if ask(y) is None else y

    found = graph(between)
    assert reader(found)[0] == "" and found.digest is None


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, torch.ones(0).new_tensor])
def test_values_that_are_put_together_are_real_ones(make):
    """Torch reads them where nobody sees it."""
    found = graph(lambda net, y: (KEPT.update(y=make([y[0, 0, 0, 0], y[0, 0, 0, 1]])), y)[1])
    assert reader(found) == ("", "getitem follows") and found.digest


def test_values_of_what_depends_on_none_may_be_asked_for():
    assert reader(graph(lambda net, y: y if torch.ones(2).sum() > 1 else y * 2)) == ("bn", "")


class Asks(nn.Module):
    """Two times the same layers, and a question between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(lambda net, y: y), Net(lambda net, y: y)
        self.second.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if y.sum() > -1e9 else y


def test_layers_before_a_question_follow_one_another_and_those_after_it_may_not():
    found = Graph(Asks(), (torch.randn(1, 3, 8, 8),), False)
    assert reader(found, "first.conv") == ("first.bn", "")
    assert reader(found, "first.bn") == ("first.act", "")
    assert reader(found, "second.conv") == ("", "bool asks for values")
    assert reader(found, "first.act")[0] == ""
    assert found.digest is None


def test_tensors_of_other_classes_are_listed():
    net = Net(lambda net, y: y)
    net.bn.weight = nn.Parameter(type("Own", (torch.Tensor,), {})(net.bn.weight.data))
    assert reader(Graph(net, (torch.randn(1, 3, 8, 8),), False)) == ("bn", "")


def test_a_model_that_cannot_be_copied_is_listed():
    net = Net(lambda net, y: y)
    net.lock = threading.Lock()
    assert reader(Graph(net, (torch.randn(1, 3, 8, 8),), False)) == ("bn", "")


@pytest.mark.parametrize(
    "here",
    [
        lambda x: x.device.type == "cpu",
        lambda x: x.is_cpu,
        lambda x: not (x.is_cuda or x.is_meta),
        lambda x: x.device == torch.zeros(1).device and type(x) is torch.Tensor,
        lambda x: torch.zeros(3, device=x.device).to(x.dtype).is_cpu,
    ],
)
def test_a_forward_that_asks_for_the_device_is_told_the_real_one(here):
    assert reader(graph(lambda net, y: y if here(y) else y * 2)) == ("bn", "")


@functools.lru_cache
def positions(height, width, device):
    return torch.linspace(0, 1, height, device=device)[:, None] * torch.arange(width, device=device)


KEPT = {}


def keeping(make):
    """Adds what is kept outside of the model by the shape, made the first time."""

    def between(net, y):
        if y.shape not in KEPT:
            KEPT[y.shape] = make(net, y)
        return y + KEPT[y.shape]

    return between


def drawn(net, y):
    table = torch.zeros(1, 1, *y.shape[2:])
    table[:, :, ::2] = y[:, :1, ::2].detach()
    table.mul_(2)
    return table


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda net, y: positions(*y.shape[2:], y.device),
        lambda net, y: net.bn(net.conv(torch.ones(1, 3, 8, 8))).sigmoid(),
        lambda net, y: F.dropout(torch.ones_like(y)) * 0,
        drawn,
        lambda net, y: scripted(y[:1, :1]),
    ],
)
def test_what_somebody_keeps_has_the_values_of_a_run(make, training, asks):
    """A cache of the module's, by sizes: the caller's model runs as if it had never been listed."""

    def between(net, y):
        y = keeping(make)(net, y)
        return y if not asks or y.sum() < 1e9 else y * 2

    KEPT.clear()
    positions.cache_clear()
    torch.manual_seed(0)
    net, x = Net(between).train(training), torch.randn(1, 3, 8, 8)
    state = torch.get_rng_state()
    Graph(net, (x,), training)
    assert torch.equal(torch.get_rng_state(), state)
    (kept,) = KEPT.values()
    kept = kept.clone()
    with torch.no_grad():
        y = net(x)
        KEPT.clear()
        positions.cache_clear()
        torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(kept, *KEPT.values())


def test_what_a_hook_takes_has_the_values_of_a_run():
    net, x, taken = Net(lambda net, y: y), torch.randn(1, 3, 8, 8), []
    net.bn.register_forward_hook(lambda module, args, output: taken.append(output.detach()))
    Graph(net.eval(), (x,), False)
    with torch.no_grad():
        net(x)
    first, second = taken
    torch.testing.assert_close(first, second)


def test_a_number_amid_a_large_array_makes_another_digest():
    table, x = np.zeros(2000, np.float32), torch.zeros(1, 3, 8, 8)
    net = Net(lambda net, y: y + torch.from_numpy(table).sum()).eval()
    first = Graph(net, (x,), False).digest
    assert first is not None and first == Graph(net, (x,), False).digest
    table[1000] = 1
    assert first != Graph(net, (x,), False).digest


def test_the_random_state_and_buffers_stay():
    net = Net(lambda net, y: y + torch.rand(1).item()).train()
    state, before = torch.get_rng_state(), net.bn.running_mean.clone()
    Graph(net, (torch.zeros(1, 3, 8, 8),), True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.bn.running_mean, before) and not net.bn.num_batches_tracked


def test_a_constant_is_told_by_its_value():
    digests = []
    for value in (2.0, 2.0, 3.0):
        net = Net(lambda net, y: y * net.factor)
        net.factor = torch.tensor(value)
        digests.append(Graph(net, (torch.zeros(1, 3, 8, 8),), False).digest)
    assert digests[0] == digests[1] != digests[2]


def test_what_a_hook_writes_to_the_callers_own_model_is_put_back():
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


def test_torchs_compiler_is_not_imported():
    """That takes a second, of each process that optimizes a model."""
    code = (
        "import sys, torch\n"
        "from segfast._optimize.graph import Graph\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()\n"
        "assert Graph(net, (torch.zeros(1, 3, 8, 8),), False).digest\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
