"""`segfast.optimize` fuses dense and transposed convolutions with the norm and activation after them."""

import copy

import pytest
import torch
from torch import nn

import segfast
from segfast.nn import Conv2d, ConvTranspose2d
from segfast.nn._fused.folding import folded_filter
from tests.fused_conv import draw
from tests.optimize.separable_networks import (
    ACTIVATION_MODULES,
    Block,
    depthwise,
    operations,
    optimized,
    reasons,
    same,
)
from tests.separable_conv2d.test_module import trained

pytestmark = pytest.mark.usefixtures("fused_at_any_size")

C = 6
CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(C, 4, 1, bias=False),
    "3x3": lambda: nn.Conv2d(C, 4, 3, padding=1),
    "stride and groups": lambda: nn.Conv2d(C, 4, (3, 5), stride=2, padding=(0, 2), groups=2),
    "dilated": lambda: nn.Conv2d(C, 4, 3, padding=4, dilation=4),
    "same": lambda: nn.Conv2d(C, 4, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(C, 4, 3, padding=2, padding_mode="reflect"),
    "ours": lambda: Conv2d(C, 4, 3),
}
TRANSPOSED = {
    "2x2": lambda: nn.ConvTranspose2d(C, 4, 2, stride=2),
    "groups": lambda: nn.ConvTranspose2d(C, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
    "a group a channel": lambda: nn.ConvTranspose2d(C, 2 * C, 4, stride=2, padding=1, groups=C, bias=False),
    "dilated": lambda: nn.ConvTranspose2d(C, 4, 3, stride=(1, 2), dilation=(2, 1)),
    "ours": lambda: ConvTranspose2d(C, 4, 3),
}
ALL = {**CONVOLUTIONS, **{f"transposed {name}": make for name, make in TRANSPOSED.items()}}


@pytest.fixture
def x():
    return draw(2, C, 8, 9)


def block(conv, *after):
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), *after)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("after", [(), (nn.ReLU(inplace=True),)], ids=["norm", "norm, relu"])
def test_one_operator_in_eval(make, after, x):
    model = optimized(block(make(), *after))
    operation = "conv_transpose2d" if model[0].transposed else "conv2d"
    assert operations(model, x) == [operation]
    same(model, x)
    with torch.no_grad():
        plain = segfast.restore(copy.deepcopy(model))
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    same(model.train(), x)


@pytest.mark.parametrize("make", TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_filter_with_its_norm_in_it(make):
    model = trained(block(make().double())).double().eval()
    conv, norm = model
    x = draw(2, C, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        weight, bias = folded_filter(conv, norm)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias)
        torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("activation", ACTIVATION_MODULES, ids=str)
@pytest.mark.parametrize("make", [CONVOLUTIONS["3x3"], TRANSPOSED["groups"]], ids=["conv", "transposed"])
def test_every_activation(activation, make, x):
    model = optimized(block(make(), copy.deepcopy(activation)))
    assert len(operations(model, x)) == 1
    same(model, 3 * x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_a_norm_in_train_too(training, x):
    model = optimized(nn.Sequential(nn.Conv2d(C, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.SiLU()), x)
    model.train(training)
    assert segfast.report(model).fused == ["0", "2"]
    assert operations(model, x) == ["conv2d", "conv_transpose2d"]
    same(model, x)


class Decoder(nn.Module):
    """Layers by name, called in a forward of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.act1 = nn.Conv2d(C, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.up, self.bn2 = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)
        self.block = Block(channels=C)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.up(self.act1(self.bn1(self.conv(self.block(x)))))
        return self.out(torch.relu(self.bn2(y)))


def test_someones_forward(x):
    model = optimized(Decoder(), x)
    assert reasons(model) == {
        "conv": "fused with bn1, act1",
        "up": "replaced; fused with bn2",
        "block.conv_dw": "replaced; fused with bn1, act, conv_pw, bn2",
    }
    report = segfast.report(model)
    assert report.replaced == ["up", "block.conv_dw"]
    assert report.fused == ["conv", "up", "block.conv_dw"]
    assert "2 of 3 layers replaced. 3 fused with others." in str(report)
    assert operations(model, x) == ["separable_conv2d", "conv2d", "conv_transpose2d"]
    same(model, x)
    same(model.train(), x)


def test_filter_fn_is_asked(x):
    asked = []

    def only_transposed(name, layer):
        asked.append(name)
        return isinstance(layer, nn.ConvTranspose2d)

    model = optimized(Decoder(), x, filter_fn=only_transposed)
    assert sorted(asked) == ["block.conv_dw", "block.conv_pw", "conv", "out", "up"]
    assert segfast.report(model).fused == ["up"]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(C, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)],
        [nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)],
        [Conv2d(C, 4, 3, activation="relu"), nn.ReLU()],
        [type("Own", (nn.Conv2d,), {})(C, 4, 3), nn.ReLU()],
        [nn.Conv2d(C, 4, 3), nn.Dropout(), nn.ReLU()],
        [nn.Conv2d(C, 4, 3)],
    ],
    ids=lambda layers: ", ".join(type(m).__name__ for m in layers),
)
def test_what_is_not_a_sequence_is_left_alone(layers, x):
    model = optimized(nn.Sequential(*copy.deepcopy(layers)), x)
    assert segfast.report(model).fused == []
    same(model, x)


def test_a_shared_norm_keeps_layers_apart(x):
    norm = nn.BatchNorm2d(C)
    model = optimized(nn.Sequential(nn.Conv2d(C, C, 1), norm, nn.Conv2d(C, C, 1), norm), x)
    assert segfast.report(model).fused == []
    same(model, x)


def test_a_broken_sequence_is_an_error(x):
    model = optimized(Decoder(), x)
    model.bn1 = nn.BatchNorm2d(4).eval()
    with pytest.raises(RuntimeError, match="bn1 did not follow conv"):
        model(x)


@pytest.mark.interpreter
def test_fused_alone_gets_the_kernels_layout(monkeypatch, x):
    monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
    with segfast.backend("triton"):
        model = optimized(block(nn.Conv2d(C, 4, 3)), x)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    same(model, x)
    assert segfast.restore(model)[0].weight.is_contiguous()


class TestSmallImages:
    """On a CPU, where putting the operator together takes longer than the passes it saves."""

    @pytest.fixture(autouse=True)
    def fused_at_any_size(self):
        """Not here."""

    @pytest.mark.parametrize(("size", "fused"), [(90, False), (91, True)])
    def test_the_output_has_to_be_large(self, size, fused):
        model = optimized(block(nn.Conv2d(4, 16, 1), nn.ReLU()))
        x = draw(1, 4, size, size)
        assert operations(model, x) == ["conv2d"] * fused
        same(model, x)

    def test_the_output_of_a_stride_is_small(self):
        model = optimized(block(nn.Conv2d(16, 16, 1, stride=2), nn.ReLU()))
        assert operations(model, draw(1, 16, 91, 91)) == []
        assert operations(model, draw(1, 16, 182, 182)) == ["conv2d"]


def test_a_depthwise_layer_left_out_stays_by_itself(x):
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(C), nn.Conv2d(C, 4, 1), nn.ReLU())
    model = optimized(model, filter_fn=lambda name, layer: name != "0")
    assert segfast.report(model).fused == ["2"]
    same(model, x)
