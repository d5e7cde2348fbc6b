"""DeepLab v1 and v2: what every network must do, plain torch.nn beside them, scales, the CRF, checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from segfast.models import create, list_models, remap_state_dict
from segfast.models.encoders import VGG16Encoder
from tests.models import peers
from tests.models.tester import ModelTester

V1 = "Chen, Papandreou, Kokkinos, Murphy, Yuille"
TINY = {"width_mult": 0.125, "num_classes": 3}
NAMES = list_models("deeplabv[12]_*")
RATES = {"deeplabv1_vgg16": [12]}


class VGG16Tester(ModelTester):
    lr = 1e-3  # it has no norms
    ranged = False  # max_pool2d(ceil_mode=True) asks whether its last window begins inside

    def build(self, **overrides):
        model = super().build(**overrides)
        for branch in model.branches:
            torch.nn.init.normal_(branch.fc8.weight, std=0.1)  # it begins as almost zero
        return model


class TestDeepLabV1(VGG16Tester):
    name = "deeplabv1_vgg16"
    paper = V1
    options = TINY
    parameters = 20_505_429


class TestDeepLabV1WithCRF(VGG16Tester):
    name = "deeplabv1_vgg16"
    paper = V1
    options = {**TINY, "crf": True}  # noqa: RUF012
    full = {"crf": True}  # noqa: RUF012
    parameters = 20_505_429 + 3 * 21**2

    def build(self, **overrides):
        model = super().build(**overrides)
        with torch.no_grad():  # so that it does not enlarge rounding errors where two classes are as likely
            model.crf.bilateral_weight *= 0.1
            model.crf.spatial_weight *= 0.1
        return model

    test_compiles_into_one_graph = None  # seconds, and nothing new
    test_exports_with_dynamic_sizes = None


class TestDeepLabV2VGG16(VGG16Tester):
    name = "deeplabv2_vgg16"
    paper = "DeepLab: Semantic Image Segmentation"
    options = TINY
    parameters = 37_877_652
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


class TestDeepLabV2ResNet101(ModelTester):
    name = "deeplabv2_resnet101"
    paper = "TPAMI 2018"
    options = TINY
    parameters = 44_048_532

    def build(self, **overrides):
        model = super().build(**overrides)
        for branch in model.branches:
            torch.nn.init.normal_(branch.weight, std=1e-5)  # the features of new norms are large
        return model

    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


def small(name, **options):
    torch.manual_seed(0)
    return peers.randomize_norms(create(name, **{**TINY, **options})).eval()


def images(count=2, height=65, width=50):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def plain_vgg16(state, x, rates):
    """The network from torch's functions: holes where the last two poolings lost their strides."""
    index = 0
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
        hole = 2 if stage == 4 else 1
        for _ in range(convolutions):
            key = f"encoder.features.{index}"
            x = F.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], padding=hole, dilation=hole).relu()
            index += 2
        index += 1
        x = F.max_pool2d(x, 2, ceil_mode=True) if stage < 3 else F.max_pool2d(x, 3, 1, 1)
    scores = []
    for branch, rate in enumerate(rates):
        layers = [(state[f"branches.{branch}.fc{n}.weight"], state[f"branches.{branch}.fc{n}.bias"])
                  for n in (6, 7, 8)]  # fmt: skip
        y = F.conv2d(x, *layers[0], padding=rate, dilation=rate).relu()
        scores.append(F.conv2d(F.conv2d(y, *layers[1]).relu(), *layers[2]))
    return sum(scores)


@pytest.mark.parametrize("name", ["deeplabv1_vgg16", "deeplabv2_vgg16"])
def test_scores_and_gradients_are_plain_torchs(name):
    options = {} if "v1" in name else {"scales": ()}
    model = small(name, **options).double()
    weights = dict(model.named_parameters())
    rates = RATES.get(name, [6, 12, 18, 24])
    expected = plain_vgg16(weights, images().double(), rates)
    found = model(images().double(), upsample=False)
    assert found.shape == (2, 3, 9, 7) and expected.std() > 1e-3
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(scores.square().sum(), list(weights.values())) for scores in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)
    full = F.interpolate(expected, size=(65, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images().double()), full)


def test_scores_on_a_resnet_are_the_sum_of_four_dilated_convolutions():
    model = small("deeplabv2_resnet101", scales=()).double()
    features = model.encoder(images().double())[-1]
    expected = sum(
        F.conv2d(features, branch.weight, branch.bias, padding=rate, dilation=rate)
        for branch, rate in zip(model.branches, (6, 12, 18, 24), strict=True)
    )
    torch.testing.assert_close(model(images().double(), upsample=False), expected)


@pytest.mark.parametrize("name", ["deeplabv2_vgg16", "deeplabv2_resnet101"])
def test_the_largest_scores_of_all_sizes(name):
    """In eval; training sees the image alone."""
    model, alone = small(name).double(), small(name, scales=()).double()
    data = images().double()
    assert model.scales == (0.5, 0.75)
    scores = [alone(data, upsample=False)]
    for size in ((33, 25), (49, 38)):
        copy = F.interpolate(data, size=size, mode="bilinear", align_corners=False)
        copy = alone(copy, upsample=False)
        scores.append(F.interpolate(copy, size=(9, 7), mode="bilinear", align_corners=False))
    expected = torch.stack(scores).amax(0)
    torch.testing.assert_close(model(data, upsample=False), expected)
    assert all((expected == one).any() for one in scores)
    seen = []
    model.encoder.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[2:]))
    model(data)
    model.train()(data)
    assert seen == [(65, 50), (33, 25), (49, 38), (65, 50)]


@pytest.mark.parametrize("name", NAMES)
def test_the_crf_refines_the_scores(name):
    """It sees the image's colors as 0 to 255, and all learn together, its parameters and the network's."""
    bare, model = small(name), small(name, crf=True, color_scale=57.0)
    with torch.no_grad():
        std = bare(images()).std()
        for branch in bare.branches:
            scores = getattr(branch, "fc8", branch)
            scores.weight /= std
            scores.bias /= std
    model.load_state_dict(remap_state_dict(bare.state_dict(), model))
    with torch.no_grad():
        expected = model.crf(bare(images()), 57 * images())
        torch.testing.assert_close(model(images()), expected)
        assert (expected.softmax(1) - bare(images()).softmax(1)).abs().max() > 1e-3
    F.cross_entropy(model.train()(images()), torch.ones(2, 65, 50, dtype=torch.long)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, key
    with pytest.raises(ValueError, match="upsample must be True with a CRF"):
        model(images(), upsample=False)
    # And a network that was trained with it is read without.
    assert remap_state_dict(model.state_dict(), bare).keys() == bare.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_published_classifiers(name):
    """Their weights arrive in the encoder; of VGG16's linear layers every branch gets a part."""
    with torch.device("meta"):
        model = create(name)
    torch.manual_seed(0)
    classifier = getattr(peers.torchvision().models, name.rpartition("_")[2])()
    found = remap_state_dict(classifier.state_dict(), model)
    kept = {key for key, value in found.items() if value.is_meta}
    if "resnet" in name:
        assert kept == {key for key in found if key.startswith("branches.")}
        return
    assert kept == {key for key in found if ".fc8." in key}
    fc6, fc7 = classifier.classifier[0], classifier.classifier[3]
    for branch in range(len(model.branches)):
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        weight, bias = (found[f"branches.{branch}.fc6.{kind}"] for kind in ("weight", "bias"))
        assert weight[5, 7, 1, 2] == fc6.weight[20, 7 * 49 + 3 * 7 + 6] and bias[5] == fc6.bias[20]
        assert found[f"branches.{branch}.fc7.weight"][5, 9, 0, 0] == fc7.weight[20, 36]


def test_features_are_those_of_torchvisions_vgg16():
    network = peers.torchvision().models.vgg16().eval()
    encoder = VGG16Encoder()
    encoder.load_state_dict(remap_state_dict(network.state_dict(), encoder))
    with torch.no_grad():
        features = encoder(images(height=64, width=48))
        for feature, end in zip(features, (4, 9, 16, 23, 30), strict=True):
            expected = network.features[:end](images(height=64, width=48))
            assert feature.shape == expected.shape and expected.std() > 0
            assert (feature - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("output_stride", [8, 16])
def test_vgg16_takes_any_size(output_stride):
    encoder = VGG16Encoder(2, output_stride, 0.125)
    for size in ((1, 1), (2, 5), (33, 31)):
        features = encoder(torch.randn(1, 2, *size))
        for feature, channels, reduction in zip(features, encoder.channels, encoder.reductions, strict=True):
            assert feature.shape == (1, channels, *(-(-side // reduction) for side in size))
    assert encoder.reductions == (1, 2, 4, 8, output_stride)


@pytest.mark.parametrize("name", NAMES)
def test_of_another_network(name):
    model = small(name)
    with pytest.raises(ValueError, match=r"another network: it has branches\.9\.weight"):
        remap_state_dict(model.state_dict() | {"branches.9.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"the checkpoint has a key that .*Encoder does not know"):
        remap_state_dict(peers.torchvision().models.mobilenet_v2().state_dict(), model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deeplabv2_vgg16", {"scales": (0.5, 0)}, r"scales must be positive, got \[0\.5, 0\]"),
        ("deeplabv1_vgg16", {"color_scale": 0}, "color_scale must be positive, got 0"),
        ("deeplabv1_vgg16", {"width_mult": 0}, "width_mult must be positive, got 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)
