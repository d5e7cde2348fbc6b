"""`segfast.optimize` fuses other people's ASPPs, and only what computes the same."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from segfast.commands._load_model import import_torchvision
from segfast.nn._fused import eager
from segfast.nn._fused.aspp import FusedASPP
from tests.fused_conv import draw
from tests.optimize.separable_networks import reasons, same
from tests.separable_conv2d.test_module import trained

pytestmark = pytest.mark.usefixtures("fused_at_any_size")

C = 6
RATES = (2, 3, 5)


@pytest.fixture
def x():
    return draw(2, C, 9, 8)


def torchvisions():
    import_torchvision()
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return ASPP(C, RATES, 4)


def smps(separable):
    import_torchvision()
    module = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
    return module.ASPP(C, 4, RATES, separable, 0.5)


class ConvModule(nn.Module):
    """mmcv's, as far as mmseg's ASPP uses it."""

    with_explicit_padding = False
    order = ("conv", "norm", "act")

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        )
        self.add_module("bn", nn.BatchNorm2d(out_channels))
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x, activate=True, norm=True):
        return self.activate(self.bn(self.conv(x)))


class ASPPModule(nn.ModuleList):
    def forward(self, x):
        return [module(x) for module in self]


class ASPPHead(nn.Module):
    """mmseg's: the pooled branch first in the concatenation, a projection of 3x3."""

    def __init__(self):
        super().__init__()
        self.conv_seg = nn.Conv2d(4, 3, 1)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(C, 4, 1))
        modules = [ConvModule(C, 4, 1)] + [ConvModule(C, 4, 3, rate, rate) for rate in RATES]
        self.aspp_modules = ASPPModule(modules)
        self.bottleneck = ConvModule(20, 4, 3, padding=1)
        self.transformed = 0

    def _transform_inputs(self, inputs):
        self.transformed += 1
        return inputs[-1]

    def _forward_feature(self, inputs):
        x = self._transform_inputs(inputs)
        pooled = F.interpolate(self.image_pool(x), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.bottleneck(torch.cat([pooled, *self.aspp_modules(x)], dim=1))

    def forward(self, inputs):
        return self.conv_seg(self._forward_feature(inputs))


ASPPHead.__module__ = "mmseg.models.decode_heads.aspp_head"


class Images(nn.Module):
    """The head on the features of one image, as in a model."""

    def __init__(self):
        super().__init__()
        self.head = ASPPHead()

    def forward(self, x):
        return self.head([x])


MAKERS = {
    "torchvision": torchvisions,
    "smp": lambda: smps(False),
    "smp separable": lambda: smps(True),
    "mmseg": Images,
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def aspp(request):
    return trained(nn.Sequential(request.param())).eval()


def is_fused(model, x):
    """True if an ASPP in `model` is computed as a whole."""
    with (
        torch.no_grad(),
        mock.patch.object(FusedASPP, "run", autospec=True, side_effect=FusedASPP.run) as run,
    ):
        model(x)
    return run.called


class TestKnown:
    @pytest.mark.parametrize("shape", [(2, C, 9, 8), (1, C, 7, 9), (2, C, 1, 2), (1, C, 3, 1)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_same_result_without_an_example(self, aspp, shape, dtype):
        model, x = segfast.optimize(aspp).to(dtype), draw(*shape, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(model(x), aspp.to(dtype)(x), atol=1e-5, rtol=1e-5)
        assert is_fused(model, x)

    def test_report_and_restore(self, aspp, x):
        name = next(n for n, m in aspp.named_modules() if type(m).__name__ in ("ASPP", "ASPPHead"))
        assert reasons(aspp)[name] == "not yet: optimize would fuse its layers"
        model = segfast.optimize(segfast.optimize(aspp), x, inplace=True)
        assert reasons(model)[name] == "its layers fused" and name in segfast.report(model).fused
        assert not segfast.report(model).replaced or is_fused(model, x)
        segfast.restore(model)
        assert not is_fused(model, x)

    def test_a_layer_put_in_afterwards(self, aspp, x):
        model = segfast.optimize(aspp)
        norm = next(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
        parent, _, child = norm.rpartition(".")
        for other in (nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4)):
            setattr(model.get_submodule(parent), child, other)
            plain = segfast.restore(copy.deepcopy(model))
            with torch.no_grad():
                torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
            assert is_fused(model, x) is isinstance(other, nn.BatchNorm2d)

    def test_filter_fn(self, aspp, x):
        model = segfast.optimize(aspp, filter_fn=lambda name, m: isinstance(m, nn.Conv2d))
        assert not is_fused(model, x)
        assert "not fused: left out by filter_fn" in reasons(model).values()


class Lookalike(nn.Module):
    """torchvision's children under another name, and a forward that is not always torchvision's."""

    def __init__(self, scale=1.0):
        super().__init__()
        theirs = torchvisions()
        self.convs, self.project, self.scale = theirs.convs, theirs.project, scale

    def forward(self, x):
        return self.project(torch.cat([self.scale * conv(x) for conv in self.convs], 1))


def test_an_unknown_class_needs_an_example(x):
    model = trained(nn.Sequential(Lookalike(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    without = segfast.optimize(model)
    assert reasons(without)["0"] == "not fused: its class is not known; give example_inputs"
    assert not is_fused(without, x)
    with_one = segfast.optimize(model, x)
    assert is_fused(with_one, x) and reasons(with_one)["0"] == "its layers fused"
    assert is_fused(segfast.optimize(with_one), x)
    same(with_one, x)


def test_another_forward_is_undone_and_the_sequences_stay(x):
    model = trained(nn.Sequential(Lookalike(2.0), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    fast = segfast.optimize(model, x)
    assert "not fused: undone: an output changed" in reasons(fast)["0"]
    assert reasons(fast)["1"] == "fused with 2"
    assert not is_fused(fast, x)
    same(fast, x)


def test_other_parts_are_no_aspp(x):
    strided = torchvisions()
    strided.convs[1][0].padding = (1, 1)
    model = segfast.optimize(nn.Sequential(trained(strided).eval()))
    assert "a layer in it is of another kind" in reasons(model)["0"]
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
        model(x)
    other = nn.Module()
    other.convs, other.project = nn.ModuleList([nn.Conv2d(C, 4, 1), nn.Conv2d(C, 4, 3)]), nn.Conv2d(8, 4, 1)
    assert "a layer in it is of another kind" in reasons(segfast.optimize(other))[""]


def test_the_features_are_transformed_once(x):
    model = segfast.optimize(trained(Images()).eval())
    with torch.no_grad():
        model(x)
    assert model.head.transformed == 1


def test_small_images_on_a_cpu_run_layer_by_layer(monkeypatch, x):
    monkeypatch.setattr(eager, "_LEAST_ELEMENTS", 2**15)
    model = segfast.optimize(trained(torchvisions()).eval())
    assert not is_fused(model, x)
    assert is_fused(model, draw(1, C, 75, 75))
