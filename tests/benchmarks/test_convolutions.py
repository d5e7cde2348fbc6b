"""Peers of convolutions: cuDNN's fused calls, and networks of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from benchmarks import peers, timing
from benchmarks.cases import find
from benchmarks.fused_models import fused_with_cudnn
from benchmarks.ours import on_auto, ours
from benchmarks.timing import Candidate
from benchmarks.trial import Trial

CPU = torch.device("cpu")


@pytest.fixture
def fused_calls(monkeypatch):
    """ATen's fused calls in plain ATen; how often each was made."""
    calls = {"relu": 0, "add_relu": 0}

    def relu(x, weight, bias, *geometry):
        calls["relu"] += 1
        return F.relu(F.conv2d(x, weight, bias, *geometry))

    def add_relu(x, weight, z, alpha, bias, *geometry):
        calls["add_relu"] += 1
        return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


class _Block(nn.Module):
    """A ResNet block whose residual is convolved too, then what must stay as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shortcut, self.shortcut_norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.grouped, self.seen = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.six, self.six_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 4, 3, stride=2, padding=2, dilation=2)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        y = self.last_norm(self.last(y))
        y += self.shortcut_norm(self.shortcut(x))
        y = F.relu(self.grouped(F.relu(y)))
        z = self.seen(y)
        y = F.relu(z) + z
        y = F.relu6(self.six_norm(self.six(y)))
        return F.relu(self.dilated(y))


def _with_statistics(network):
    """In eval, with norms that are no identities."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def test_a_network_on_fused_calls_is_the_network(fused_calls):
    torch.manual_seed(0)
    network = _with_statistics(_Block())
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(x)
        fused, count = fused_with_cudnn(network, x)
        torch.testing.assert_close(fused(x), expected)
    # Not the grouped one, the one whose result is seen elsewhere, nor the one before relu6.
    assert fused_calls == {"relu": 2, "add_relu": 1} and count == 3
    assert not [node for node in fused.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    torch.testing.assert_close(network(x), expected)  # left as it was


@pytest.mark.parametrize(
    ("name", "relu", "add_relu"), [("unet", 18, 0), ("fcn8s_vgg16", 15, 0), ("deeplabv3_resnet50", 40, 16)]
)
def test_every_sequence_of_the_networks_is_fused(fused_calls, name, relu, add_relu):
    from benchmarks.plain_models import plain_model

    network, channels = plain_model(name, small=True)
    size = 188 if name == "unet" else 65
    x = torch.randn(1, channels, size, size)
    with torch.no_grad():
        expected = network.eval()(x)
        fused, count = fused_with_cudnn(network, x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert fused_calls == {"relu": relu, "add_relu": add_relu} and count == relu + add_relu


@pytest.mark.parametrize("name", ["aspp_n8_33", "aspp_branches_n8_33"])
def test_a_pyramid_on_fused_calls_is_the_pyramid(fused_calls, name):
    trial = Trial(find(name).cpu(), CPU)
    output = trial.bind(peers._fused_pyramid(trial))()
    assert timing.relative_error(trial.sample(output), trial.reference()) < 1e-5
    assert fused_calls["relu"] == (6 if name == "aspp_n8_33" else 4)


@pytest.mark.parametrize("name", ["resnet_layer3_expand", "unet_down1_conv2", "resnet_layer3_d2"])
def test_a_layer_on_fused_calls_is_the_layer(fused_calls, monkeypatch, name):
    trial = Trial(find(name).cpu(), CPU)
    monkeypatch.setattr(trial, "device", torch.device("cuda"))
    found = {peer.name: peer for peer in peers._fused(trial)}
    call = "cudnn_conv_add_relu" if "add" in trial.case.epilogue else "cudnn_conv_relu"
    monkeypatch.setattr(trial, "device", CPU)
    assert timing.relative_error(trial.sample(found[call].run()), trial.reference()) < 1e-5
    assert sum(fused_calls.values()) == 1


def test_auto_is_measured_whichever_backend_is_in_force():
    seen = []
    candidate = Candidate("segfast", lambda: seen.append(segfast.get_backend()), ours=True, note="kept")
    auto = on_auto(candidate)
    assert (auto.name, auto.ours, auto.note) == ("segfast_auto", True, "kept")
    with segfast.backend("aten"):
        auto.run()
        candidate.run()
    assert seen == ["auto", "aten"]


@pytest.mark.parametrize("direction", ["forward", "backward", "train"])
def test_our_pyramid_has_the_cases_weights(direction):
    """In a forward the module's own, with gradients those that are differentiated."""
    trial = Trial(find("aspp_n8_33").tiny().replace(direction=direction), CPU)
    error = timing.relative_error(trial.sample(next(ours(trial)).run()), trial.reference())
    assert error < 1e-5
