"""Networks with depthwise sequences, and what the tests of their fusion ask of them."""

import copy

import torch
from torch import nn

import segfast
from tests.fused_conv import draw
from tests.separable_conv2d.test_module import trained

C = 6
ACTIVATION_MODULES = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.LeakyReLU(0.2),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(inplace=True),
    nn.Sigmoid(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
]


def depthwise(**options):
    return nn.Conv2d(C, C, 3, padding=1, groups=C, **options)


class Block(nn.Module):
    """Depthwise, norm, activation, pointwise, norm, each called by name; the names are timm's."""

    def __init__(self, activation=None, channels=C):
        super().__init__()
        self.conv_dw = depthwise(bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.act = activation or nn.ReLU(inplace=True)
        self.drop = nn.Identity()
        self.conv_pw = nn.Conv2d(C, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(self.drop(x)))


class Net(nn.Module):
    """Two blocks with a shortcut around each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block(nn.GELU())])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_dw, self.conv_pw = depthwise(), nn.Conv2d(C, C, 1)

    def forward(self, x):
        return self.conv_pw(self.conv_dw(x))


class Path(nn.Module):
    """A pair whose forward is given."""

    def __init__(self, run):
        super().__init__()
        self.dw, self.bn, self.act, self.pw = depthwise(), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def optimized(model, *args, **options):
    return segfast.optimize(trained(model).eval(), *args, **options)


def reasons(model):
    return {row.name: row.reason for row in segfast.report(model)}


def operations(model, *args):
    return [explanation.operation for explanation in segfast.explain(model, *args)]


def same(model, x):
    """The optimized model's output and gradients are those of the model it was made from."""
    plain = copy.deepcopy(segfast.restore(copy.deepcopy(model)))
    results = []
    for m in (plain, model):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        m.zero_grad(set_to_none=True)
        (y * draw(*y.shape, seed=5)).sum().backward()
        results.append((y, [leaf.grad, *[p.grad for p in m.parameters()]]))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
