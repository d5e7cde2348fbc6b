"""SegNet: what every network must do, equality with torch's layers, checkpoints, memory of the indices."""

import pytest
import torch

import segfast
from benchmarks.plain_models import SegNet
from segfast.models import create, remap_state_dict
from tests.models import peers
from tests.models.tester import ModelTester

TINY = {"width_mult": 0.125, "num_classes": 3}


class TestSegNet(ModelTester):
    name = "segnet_vgg16"
    paper = "Badrinarayanan, Kendall, Cipolla"
    options = TINY
    # The convolutions of VGG16 without biases, and as many back; two numbers for each channel's norm.
    parameters = 14_710_464 + 8448 + (14_710_464 - 3 * 64 * 9 + 7424 + 64 * 21 * 9 + 21)
    dynamic = False
    sizes = (*ModelTester.sizes, (1, 1))
    test_exports_with_dynamic_sizes = None  # seconds, and nothing that its poolings' own test has not

    def test_bfloat16_autocast(self):
        """All in all the same: where a rounding chooses another pixel of a window, a value moves to it."""
        model = self.build().eval()
        images, _ = self.batch(model)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
        expected = model(images)
        assert scores.dtype is torch.bfloat16
        assert (scores - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


def small(**options):
    torch.manual_seed(0)
    return peers.randomize_norms(create("segnet_vgg16", **{**TINY, **options})).eval()


@pytest.mark.parametrize("size", [(65, 50), (64, 32), (5, 3)])
def test_scores_are_those_of_torchs_layers(size):
    """Of the twin that the benchmarks compare with."""
    model, plain = small().double(), SegNet(TINY["num_classes"], width=8).double().eval()
    plain.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = plain(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(image), expected)
    torch.testing.assert_close(segfast.optimize(model)(image), expected)


def test_indices_of_two_bits_are_all_that_a_pooling_keeps():
    model, kept = small().train(), []
    image = torch.randn(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(image)
    assert not [t.dtype for t in kept if t.dtype == torch.int64]
    # Kept by the pooling and by its unpooling alike.
    places = {t.data_ptr(): t.numel() for t in kept if t.dtype == torch.uint8}
    windows = [(64 >> i + 1) ** 2 * 2 * model.encoder[i][0][0].out_channels for i in range(5)]
    assert sum(places.values()) == sum(windows) // 4


@pytest.mark.parametrize("in_channels", [3, 8])
def test_the_decoder_mirrors_the_encoder(in_channels):
    model = small(in_channels=in_channels)
    channels = [
        [(layer[0].in_channels, layer[0].out_channels) for layer in stage]
        for stage in (*model.encoder, *model.decoder)
    ]
    mirror = [[pair[::-1] for pair in reversed(stage)] for stage in reversed(channels[:5])]
    assert mirror[-1].pop() == (8, in_channels)
    assert channels[5:] == mirror


def test_torchvisions_classifier():
    """Its convolutions have biases, which go into the norms: the features are the same."""
    vgg = peers.torchvision().models.vgg
    features = peers.randomize_norms(vgg.make_layers(vgg.cfgs["D"], batch_norm=True)).eval()
    for module in features:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.bias)
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    state |= {"classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}
    model = create("segnet_vgg16").eval()
    model.load_state_dict(remap_state_dict(state, model))
    image = torch.randn(1, 3, 32, 32)
    x = image
    for stage in model.encoder:
        x, _ = model.pool(stage(x))
    expected = features(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert remap_state_dict(old, model)["encoder.0.0.1.num_batches_tracked"] == 7
    with pytest.raises(ValueError, match=r"SegNet does not know: features\.2\.weight"):
        remap_state_dict({**state, "features.2.weight": state["features.0.weight"]}, model)
    with pytest.raises(ValueError, match=r"has nothing for encoder\.0\.0\.0\.weight"):
        remap_state_dict({name: v for name, v in state.items() if name != "features.0.weight"}, model)


def test_a_width_below_0_is_an_error():
    with pytest.raises(ValueError, match="width_mult must be positive, got -1"):
        create("segnet_vgg16", width_mult=-1)
