"""`segfast.optimize(model, train=True)`: training keeps less for the backward pass, and no result changes."""

import copy

import pytest
import torch
from torch import nn

import segfast
from segfast.commands._load_model import import_torchvision
from segfast.commands._memory import bytes_held
from segfast.nn._fused import training
from tests.fused_conv import draw
from tests.separable_conv2d.test_module import results

pytestmark = pytest.mark.usefixtures("fused_at_any_size")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The norms computed as one with what follows them."""
    made = []
    begun = training._begun
    monkeypatch.setattr(training, "_begun", lambda norm: made.append(norm) or begun(norm))
    return made


class Network(nn.Module):
    """Its forward calls the layers one by one; what reads the first norm depends on the mode."""

    def __init__(self, drops=False):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()
        self.drops = drops

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        if self.drops and self.training:
            x = x * 0.5
        return self.act2(self.bn2(self.conv2(self.act(x))))


def residual_blocks():
    import_torchvision()
    from torchvision.models.resnet import BasicBlock, Bottleneck

    return nn.Sequential(BasicBlock(8, 8), Bottleneck(8, 2), BasicBlock(8, 8))


def separable():
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU(),
    )  # fmt: skip


MODELS = {
    "residual blocks": (residual_blocks, False, 7),
    "depthwise and pointwise": (separable, False, 2),
    "layers called one by one": (Network, True, 2),
    "layers that follow in eval alone": (lambda: Network(drops=True), True, 1),
}


@pytest.mark.parametrize(("make", "example", "norms"), MODELS.values(), ids=MODELS)
def test_outputs_gradients_and_statistics_are_the_layers(make, example, norms, calls):
    torch.manual_seed(0)
    layers, x = make().eval(), draw(2, 8, 6, 7)
    model = segfast.optimize(layers, x if example else None, train=True)
    model, layers, x = copy.deepcopy(model).double().train(), layers.double().train(), x.double()
    for _ in range(2):
        ours, theirs = (results(m, x, list(m.parameters())) for m in (model, layers))
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(model.state_dict(), layers.state_dict(), atol=1e-11, rtol=1e-11)
    assert len(calls) == 2 * norms


@pytest.mark.parametrize("make", [residual_blocks, separable])
def test_less_is_kept(make):
    layers, x = make(), draw(2, 8, 32, 32)
    model = segfast.optimize(layers, train=True)
    ours, theirs = (bytes_held(lambda m=m: m(x).sum())[0][-1] for m in (model, layers))
    assert ours <= 0.75 * theirs


@pytest.mark.parametrize("make", [residual_blocks, separable])
def test_only_where_it_is_asked_for(make, calls):
    x = draw(2, 8, 6, 7)
    segfast.optimize(make())(x)
    segfast.restore(segfast.optimize(make(), train=True))(x)
    assert not calls
