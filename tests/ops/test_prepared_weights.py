"""Weights that are kept packed, transformed or cast are made anew when the weight changes."""

import pytest
import torch

import segfast
from segfast.ops import _prepared_weights
from segfast.ops._choice import Choice, choices


class TestWritesThatLeaveNoTrace:
    """Into weights of which something else is kept: packed, transformed or cast."""

    @pytest.fixture
    def net(self, cache):
        net = torch.nn.Sequential(
            segfast.nn.Conv2d(8, 8, 3, padding=1), segfast.nn.ConvTranspose2d(8, 4, 2, stride=2)
        )
        x = torch.randn(1, 8, 12, 10).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), segfast.autotune():
            net.eval()(x)
        for call in list(choices().measured):
            choices().add(call, Choice("onednn", {}))
        return net, x

    def _agrees(self, net, x):
        with torch.no_grad():
            y = net(x)
            with segfast.backend("aten"):
                torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_a_fused_optimizer(self, net, optimizer):
        net, x = net
        steps = optimizer(net.parameters(), lr=0.01, fused=True)
        self._agrees(net, x)
        net(x).square().sum().backward()
        steps.step()
        self._agrees(net, x)

    def test_a_fused_optimizer_in_eval_with_a_norm_behind(self, net):
        """Whose folded filter is another tensor than the weight."""
        net, x = net
        layers = segfast.nn.ConvBNAct(8, 8, 3).eval()
        steps = torch.optim.SGD(layers.parameters(), lr=0.1, fused=True)
        x = torch.randn(1, 8, 40, 40)
        self._agrees(layers, x)
        layers(x).square().sum().backward()
        with torch.no_grad():
            before = layers(x)
        steps.step()
        with torch.no_grad():
            assert not torch.allclose(layers(x), before)
        torch.testing.assert_close(layers(x), layers[2](layers[1](layers[0](x))), rtol=1e-4, atol=1e-4)

    def test_data_written_before_a_change_of_mode(self, net):
        net, x = net
        self._agrees(net, x)
        net[0].weight.data.mul_(2)
        net[1].weight.data.add_(1)
        self._agrees(net.train().eval(), x)


def test_what_a_graph_captures_is_cast_within_it(monkeypatch):
    weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    with torch.no_grad():
        once = _prepared_weights.cast(weight, torch.bfloat16)
        assert _prepared_weights.cast(weight, torch.bfloat16) is once
        monkeypatch.setattr(_prepared_weights, "is_captured", lambda tensors: True)
        captured = _prepared_weights.cast(weight, torch.bfloat16)
    assert captured is not once and torch.equal(captured, once)
