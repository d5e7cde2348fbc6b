"""Encoders: the features of timm's and torchvision's networks from their weights, sizes, checkpoints."""

import copy
import functools

import pytest
import torch

from segfast.models import remap_state_dict
from segfast.models.encoders import (
    MobileNetV2Encoder,
    MobileNetV3LargeEncoder,
    ResNetEncoder,
    VGG16Encoder,
    Xception65Encoder,
)
from segfast.models.encoders._base import strides_and_dilations
from tests.models import peers

ENCODERS = {
    "mobilenetv2_100": MobileNetV2Encoder,
    "resnet50": ResNetEncoder,
    "xception65": Xception65Encoder,
}
TINY = {
    MobileNetV2Encoder: {"width_mult": 0.25},
    ResNetEncoder: {"width_mult": 0.125},
    Xception65Encoder: {"width_mult": 0.125, "middle_blocks": 1},
}


@functools.cache
def timm_network(name, output_stride):
    torch.manual_seed(0)
    return peers.randomize_norms(peers.timm().create_model(name, output_stride=output_stride)).eval()


@functools.cache
def torchvision_network():
    torch.manual_seed(0)
    return peers.randomize_norms(peers.torchvision().models.mobilenet_v2()).eval()


def loaded(encoder, network):
    encoder.load_state_dict(remap_state_dict(network.state_dict(), encoder))
    return encoder.eval()


def image(height=65, width=70, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert expected.std() > 0.05, "nothing to compare"
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_timms(name, output_stride):
    network = timm_network(name, output_stride)
    encoder = loaded(ENCODERS[name](output_stride=output_stride), network)
    assert encoder.channels == tuple(info["num_chs"] for info in network.feature_info)
    assert encoder.reductions == tuple(info["reduction"] for info in network.feature_info)
    with torch.no_grad():
        expected = network.forward_intermediates(image(), intermediates_only=True)
        features = encoder(image())
    assert len(features) == len(expected) == 5
    for feature, theirs, channels, reduction in zip(
        features, expected, encoder.channels, encoder.reductions, strict=True
    ):
        assert_same(feature, theirs)
        assert feature.shape[1:] == (channels, -(-65 // reduction), -(-70 // reduction))


def test_features_are_torchvisions():
    network = torchvision_network()
    encoder = loaded(MobileNetV2Encoder(), network)
    with torch.no_grad():
        features = encoder(image())
        x = image()
        for index, layer in enumerate(network.features[:18]):
            x = layer(x)
            if index in encoder.taps:
                assert_same(features[encoder.taps.index(index)], x)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_torchvisions(training):
    """In eval, where norms are folded, and in training, where they are not and move their statistics."""
    # In float64: over fifty norms of few pixels rounding alone is parts of a hundred.
    network = copy.deepcopy(torchvision_network()).train(training).double()
    encoder = loaded(MobileNetV2Encoder(), network).train(training).double()
    sides = []
    for features, forward in (
        (encoder.features, lambda x: encoder(x)[-1]),
        (network.features[:18], network.features[:18]),
    ):
        pixels = image().double().requires_grad_()
        output = forward(pixels)
        wanted = [pixels, *features.parameters()]
        grads = torch.autograd.grad((output * output.detach().cos()).mean(), wanted)
        sides.append([output.detach(), *grads, features[17].conv[-1].running_var])
    for ours, theirs in zip(*sides, strict=True):
        assert (ours - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12


def test_parameter_counts_are_the_peers():
    """All of theirs but the head: the last 1x1 convolution with its norm, and the classifier."""
    heads = {"mobilenetv2_100": ("conv_head", "bn2", "classifier"), "xception65": ("head",)}
    for name, head in heads.items():
        network = timm_network(name, 32)
        theirs = sum(p.numel() for key, p in network.named_parameters() if not key.startswith(head))
        assert sum(p.numel() for p in ENCODERS[name]().parameters()) == theirs
    theirs = sum(p.numel() for p in torchvision_network().features[:18].parameters())
    assert sum(p.numel() for p in MobileNetV2Encoder().parameters()) == theirs


def test_torchvisions_names_are_ours():
    theirs = [
        key for key in torchvision_network().state_dict() if not key.startswith(("features.18", "class"))
    ]
    assert list(MobileNetV2Encoder().state_dict()) == theirs


def test_timms_widths_are_ours():
    network = peers.randomize_norms(peers.timm().create_model("mobilenetv2_050")).eval()
    encoder = loaded(MobileNetV2Encoder(width_mult=0.5), network)
    with torch.no_grad():
        expected = network.forward_intermediates(image(), intermediates_only=True)
        for feature, theirs in zip(encoder(image()), expected, strict=True):
            assert_same(feature, theirs)


def test_strides_become_dilations():
    strides = [2, 1, 2, 1, 2, 1, 2, 1]
    plan = functools.partial(strides_and_dilations, strides)
    assert [dilation for _, dilation, _ in plan(32)] == [1] * 8
    assert [reached for _, _, reached in plan(32)] == [4, 4, 8, 8, 16, 16, 32, 32]
    assert [dilation for _, dilation, _ in plan(8)] == [1] * 5 + [2, 2, 4]
    assert [stride for stride, _, _ in plan(16)] == [2, 1, 2, 1, 2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16, 32\), got 4"):
        plan(4)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=lambda cls: cls.__name__)
class TestEncoder:
    def build(self, encoder, **options):
        torch.manual_seed(0)
        return encoder(**{**TINY[encoder], **options})

    def test_dilated_features_hold_the_strided_ones(self, encoder):
        """Every second pixel at output stride 16 is a pixel at 32: dilation samples what the strides did."""
        fine = peers.randomize_norms(self.build(encoder, output_stride=16)).eval()
        coarse = self.build(encoder, output_stride=32).eval()
        coarse.load_state_dict(fine.state_dict())
        with torch.no_grad():
            assert_same(fine(image(129, 97))[-1][..., ::2, ::2], coarse(image(129, 97))[-1])

    @pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33), (64, 96)])
    def test_any_size(self, encoder, size):
        model = self.build(encoder, in_channels=2, output_stride=16).eval()
        features = model(image(*size, channels=2))
        for feature, channels, reduction in zip(features, model.channels, model.reductions, strict=True):
            sides = [-(-side // reduction) for side in size]
            assert feature.shape == (2, channels, *sides) and feature.isfinite().all()
        assert model.reductions == (2, 4, 8, 16, 16)

    def test_signal_keeps_its_size_at_the_start(self, encoder):
        features = self.build(encoder, width_mult=1.0).train()(torch.randn(2, 3, 65, 65))
        assert all(0.02 < feature.std() < 50 for feature in features)

    @pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
    def test_reads_its_own_keys(self, encoder, prefix):
        model = self.build(encoder)
        state = model.state_dict()
        checkpoint = {"epoch": 3, "state_dict": {prefix + key: value for key, value in state.items()}}
        found = remap_state_dict(checkpoint, model)
        assert found.keys() == state.keys() and all(found[key] is state[key] for key in state)

    def test_checkpoint_without_counters(self, encoder):
        model = self.build(encoder)
        old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        model.load_state_dict(remap_state_dict(old, model))

    def test_checkpoints_of_other_networks_are_refused(self, encoder):
        model = self.build(encoder)
        state = model.state_dict()
        with pytest.raises(ValueError, match=f"a key that {encoder.__name__} does not know: layer1.0.weight"):
            remap_state_dict({**state, "layer1.0.weight": torch.zeros(1)}, model)
        first = next(iter(state))
        with pytest.raises(ValueError, match=f"the checkpoint has nothing for {first}"):
            remap_state_dict({key: value for key, value in state.items() if key != first}, model)
        wide = self.build(encoder, in_channels=5)
        message = rf"{first}: the checkpoint has \[\d+, 5, (\d), \1\], the model \[\d+, 3, \1, \1\]"
        with pytest.raises(ValueError, match=message):
            remap_state_dict(wide.state_dict(), model)

    def test_bad_options(self, encoder):
        for options, message in (
            ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
            ({"width_mult": 0}, "width_mult must be positive, got 0"),
            ({"output_stride": 4}, "output_stride must be one of"),
        ):
            with pytest.raises(ValueError, match=message):
                self.build(encoder, **options)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (65, 70)])
@pytest.mark.parametrize("output_stride", [16, 32])
def test_features_of_mobilenet_v3_are_torchvisions(output_stride, size):
    """Strides of torchvision's classifier, and dilation of its segmentation networks; any size."""
    peers.torchvision()
    from torchvision.models import mobilenetv3

    torch.manual_seed(0)
    settings, last = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_large", dilated=output_stride == 16)
    network = peers.randomize_norms(mobilenetv3.MobileNetV3(settings, last)).eval()
    encoder = loaded(MobileNetV3LargeEncoder(output_stride=output_stride), network)
    with torch.no_grad():
        features, x = encoder(image(*size)), image(*size)
        expected = []
        for index, layer in enumerate(network.features):
            x = layer(x)
            if index in (1, 2, 4, 7, 16):
                expected.append(x)
    for feature, theirs, channels, reduction in zip(
        features, expected, encoder.channels, encoder.reductions, strict=True
    ):
        assert_same(feature, theirs)
        assert feature.shape == (2, channels, *(-(-side // reduction) for side in size))


@pytest.mark.parametrize(
    ("encoder", "known", "given"), [(MobileNetV3LargeEncoder, "16 or 32", 8), (VGG16Encoder, "8 or 16", 32)]
)
def test_bad_output_strides(encoder, known, given):
    with pytest.raises(ValueError, match=f"output_stride must be {known}, got {given}"):
        encoder(output_stride=given)


def test_bad_depth():
    with pytest.raises(ValueError, match=r"depth must be one of \(50, 101\), got 18"):
        ResNetEncoder(depth=18)


def test_bad_middle_blocks():
    with pytest.raises(ValueError, match="middle_blocks must not be negative, got -1"):
        Xception65Encoder(middle_blocks=-1)


def test_a_timm_network_of_another_depth_is_refused():
    deep = peers.timm().create_model("mobilenetv2_110d")
    with pytest.raises(ValueError, match="MobileNetV2Encoder"):
        remap_state_dict(deep.state_dict(), MobileNetV2Encoder(width_mult=1.1))


def test_training_batches_of_one():
    """Norms inside an encoder need more than one pixel, or more than one image."""
    encoder = MobileNetV2Encoder(width_mult=0.25).train()
    assert encoder(torch.randn(1, 3, 33, 33))[-1].shape[2:] == (2, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        encoder(torch.randn(1, 3, 32, 32))
