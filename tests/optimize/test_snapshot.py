"""A run of a model changes the objects that it holds: their contents are put back, in the same objects."""

import collections
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

import segfast
from segfast._optimize.snapshot import Snapshot
from segfast._optimize.verify import undisturbed


class Own:
    """An object of somebody's class."""

    def __init__(self):
        self.count, self.seen = 0, {"first": [1]}

    def see(self, value=2):
        self.count += 1
        self.seen["first"].append(value)
        self.new = value


def own():
    made = Own()
    return made, made.see, lambda: (made.count, made.seen, getattr(made, "new", None))


def dictionary():
    made = {"a": 1, "b": 2}
    return made, lambda: (made.pop("a"), made.update(c=3)), lambda: list(made.items())


def ordered():
    made = collections.OrderedDict(a=1, b=2)
    return made, lambda: made.move_to_end("a"), lambda: (list(made), list(reversed(made)), dict(made))


def counter():
    made = collections.defaultdict(list, a=[1])
    return made, lambda: (made["a"].append(2), made["b"]), lambda: dict(made)


def nested():
    made = [({1}, collections.deque([1, 2], maxlen=2))]
    return made, lambda: (made[0][0].add(2), made[0][1].append(3), made.append(0)), lambda: list(made)


def tensor():
    made = [torch.ones(2), torch.tensor([float("nan"), 0])]
    return made, lambda: (made[0].mul_(3), made[1].zero_()), lambda: [t.tolist() for t in made]


def grown():
    made = torch.ones(2)
    return made, lambda: made.resize_(5).zero_(), lambda: made.tolist()


def arrays():
    made = [np.ones(2), np.array([[1], None], dtype=object)]
    return made, lambda: (made[0].fill(2), made[1][0].append(3)), lambda: [each.tolist() for each in made]


def bound():
    made = Own()
    call = functools.partial(made.see, 5)
    return [call], call, lambda: (made.count, made.seen)


def generators():
    made = [torch.Generator(), random.Random(1), np.random.default_rng(1)]

    def draw():
        return torch.rand(1, generator=made[0]).item(), made[1].random(), made[2].random()

    return (
        made,
        draw,
        lambda: [str(made[0].get_state().tolist()), made[1].getstate(), made[2].bit_generator.state],
    )


def unregistered():
    made = [nn.BatchNorm2d(3)]
    return (
        made,
        lambda: made[0](torch.ones(1, 3, 2, 2)),
        lambda: {k: v.tolist() for k, v in made[0].state_dict().items()},
    )


@pytest.mark.parametrize(
    "make",
    [own, dictionary, ordered, counter, nested, tensor, grown, arrays, bound, generators, unregistered],
)
def test_what_is_changed_is_put_back(make):
    held, change, read = make()
    before = repr(read())
    snapshot = Snapshot([held])
    change()
    assert repr(read()) != before
    snapshot.put_back()
    assert repr(read()) == before


def test_what_is_elsewhere_and_what_nobody_can_read_is_left_alone():
    class Closed:
        @property
        def __dict__(self):
            raise RuntimeError("closed")

    elsewhere = [1]
    snapshot = Snapshot([{"a": elsewhere, "b": Closed()}], without=[elsewhere])
    elsewhere.append(2)
    snapshot.put_back()
    assert elsewhere == [1, 2]


def test_an_object_that_holds_itself():
    made = [1]
    made.append(made)
    snapshot = Snapshot([made])
    made.pop(0)
    snapshot.put_back()
    assert made[0] == 1 and made[1] is made


class Collector:
    """Hands features from hooks to a forward, as timm's `FeatureHooks` does."""

    def __init__(self, modules):
        self.found = collections.defaultdict(list)
        self.handles = [module.register_forward_hook(self.collect) for module in modules]

    def collect(self, module, args, output):
        self.found[output.device].append(output)

    def taken(self, device):
        return self.found.pop(device)


class Hooked(nn.Module):
    """A network whose features are what hooks have seen."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)
        self.collector = Collector([self.stem, self.body])

    def forward(self, x):
        self.body(self.stem(x))
        low, high = self.collector.taken(x.device)
        return self.head(low + high)


def test_a_forward_that_reads_what_hooks_hand_over():
    torch.manual_seed(0)
    net, x = Hooked().eval(), torch.randn(1, 3, 16, 16)
    with undisturbed(net), torch.no_grad():
        expected = net(x)
    for _ in range(2):
        fast = segfast.optimize(net, x)
        assert "undone" not in str(segfast.report(fast)) and "fused with" in str(segfast.report(fast))
        assert not net.collector.found and not fast.collector.found
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        net = fast
