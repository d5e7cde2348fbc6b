"""The packages our encoders are compared with, where they are installed, and weights to compare them on."""

import importlib.util

import pytest
import torch
from torch import nn

from segfast.commands._load_model import import_torchvision


def torchvision():
    """The module; skips the test where there is none."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision (the extra 'test')")
    return import_torchvision()


def timm():
    """The module; skips the test where there is none. It imports torchvision."""
    torchvision()
    return pytest.importorskip("timm", reason="needs timm (the extra 'test')")


@torch.no_grad()
def randomize_norms(network: nn.Module) -> nn.Module:
    """Statistics and affine weights for every batch norm that are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(7)
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(std=0.2, generator=generator)
    return network
