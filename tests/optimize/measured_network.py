"""A network whose calls `optimize` measures, and what its tests ask of it."""

import torch
from torch import nn

import segfast


class Net(nn.Module):
    """A stem with a norm, a block with a shortcut, an up-convolution and a classifier nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.classifier = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.classifier(self.up(torch.relu(x + self.conv(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.stem[1].running_mean.normal_()
        net.stem[1].running_var.uniform_(0.5, 2)
    return net


def image() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32)


def ran(net: nn.Module, x: torch.Tensor) -> list[str]:
    return [explanation.backend for explanation in segfast.explain(net, x)]
