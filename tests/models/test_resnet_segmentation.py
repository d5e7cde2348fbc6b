"""torchvision's FCN, DeepLabV3 and LR-ASPP: what every network must do, and torchvision's beside them."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from benchmarks.plain_models import plain_model
from segfast.models import LRASPP, DeepLabV3, FCNResNet, create, model_name, remap_state_dict
from segfast.models.encoders.resnet import Bottleneck, ResNetEncoder
from tests.models import peers
from tests.models.tester import ModelTester

CLASSES = {"fcn": FCNResNet, "deeplabv3": DeepLabV3, "lraspp": LRASPP}
MOBILE = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
NAMES = [f"{network}_resnet{depth}" for network in ("fcn", "deeplabv3") for depth in (50, 101)]
TINY = {"width_mult": 0.125, "num_classes": 3}


class TestFCNResNet50(ModelTester):
    name = "fcn_resnet50"
    paper = "Long, Shelhamer, Darrell"
    options = TINY
    parameters = 32_957_013
    test_compiles_into_one_graph = None  # seconds, and nothing new
    test_exports_with_dynamic_sizes = None


class TestDeepLabV3ResNet50(ModelTester):
    name = "deeplabv3_resnet50"
    paper = "Chen, Papandreou, Schroff, Adam"
    options = {**TINY, "aux_loss": True}  # noqa: RUF012
    full = {"aux_loss": True}  # noqa: RUF012
    parameters = 42_004_074
    scores = {"out", "aux"}  # noqa: RUF012
    dynamic = False


class TestDeepLabV3MobileNetV3Large(ModelTester):
    name = "deeplabv3_mobilenet_v3_large"
    paper = "Chen, Papandreou, Schroff, Adam"
    options = {"width_mult": 0.25, "num_classes": 3, "aux_loss": True}  # noqa: RUF012
    full = {"aux_loss": True}  # noqa: RUF012
    parameters = 11_029_328
    scores = {"out", "aux"}  # noqa: RUF012
    test_compiles_into_one_graph = None


class TestLRASPPMobileNetV3Large(ModelTester):
    name = "lraspp_mobilenet_v3_large"
    paper = 'Howard et al., "Searching for MobileNetV3"'
    options = {"width_mult": 0.25, "num_classes": 3}  # noqa: RUF012
    parameters = 3_221_538
    dynamic = False


def segmentation():
    peers.torchvision()
    from torchvision.models import segmentation

    return segmentation


def theirs(name, **options):
    return getattr(segmentation(), name)(weights=None, weights_backbone=None, **options)


def with_aux(name, aux_loss=True):
    """The option, of a network that has it."""
    return {} if name.startswith("lraspp") else {"aux_loss": aux_loss}


@functools.cache
def torchvision_network(name, output_stride=8):
    """With an auxiliary head; torchvision itself builds ResNets only of output stride 8."""
    torch.manual_seed(0)
    network = theirs(name, **with_aux(name))
    if output_stride == 16:
        from torchvision.models import resnet
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        coarse = resnet.resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
        network.backbone = IntermediateLayerGetter(coarse, {"layer4": "out", "layer3": "aux"})
        if name == "deeplabv3_resnet50":
            network.classifier = DeepLabHead(2048, 21, (6, 12, 18))
    return peers.randomize_norms(network).eval()


def ours(name, output_stride=8):
    options = {} if name in MOBILE else {"output_stride": output_stride}
    network = create(name, **with_aux(name), **options)
    network.load_state_dict(torchvision_network(name, output_stride).state_dict())
    return network.eval()


def images(count=1, height=65, width=65):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [(name, stride) for name in ("fcn_resnet50", "deeplabv3_resnet50") for stride in (8, 16)]
    + [(name, 8) for name in MOBILE],
)
def test_results_are_torchvisions(name, output_stride):
    network, model = torchvision_network(name, output_stride), ours(name, output_stride)
    with torch.no_grad():
        expected, found = network(images()), model(images())
    assert list(found) == list(expected) == ["out", "aux"][: 1 + bool(with_aux(name))]
    for key, scores in expected.items():
        assert scores.std() > 0.05 and found[key].shape == scores.shape
        assert (found[key] - scores).abs().max() < 1e-4 * scores.abs().max()


@pytest.mark.parametrize("aux_loss", [False, True])
@pytest.mark.parametrize("name", NAMES + MOBILE)
def test_structure_is_torchvisions(name, aux_loss):
    """Names and shapes of all that is saved; stride, padding and dilation of every convolution."""
    options = with_aux(name, aux_loss)
    with torch.device("meta"):
        network, model = theirs(name, **options), create(name, **options)
    sides = []
    for side in (network, model):
        shapes = {key: value.shape for key, value in side.state_dict().items()}
        convs = {
            key: (conv.stride, conv.padding, conv.dilation)
            for key, conv in side.named_modules()
            if isinstance(conv, nn.Conv2d)
        }
        sides.append((shapes, convs))
    assert sides[0] == sides[1]
    assert type(model) is CLASSES[name.split("_")[0]] and model_name(model) == name


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_a_training_step_is_torchvisions(name):
    network, model = copy.deepcopy(torchvision_network(name)).double(), ours(name).double()
    sides = []
    for side in (network, model):
        side.train()
        for module in side.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        scores = side(images(2, 17, 24).double())
        targets = torch.zeros(2, 17, 24, dtype=torch.long)
        loss = sum(F.cross_entropy(value, targets) for value in scores.values())
        names, weights = zip(*side.named_parameters(), strict=True)
        sides.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    for key, grad in sides[0].items():
        # A shift that another batch norm takes away again has a gradient of 0.
        assert (sides[1][key] - grad).abs().max() <= 1e-7 * grad.abs().max() + 1e-11, key
    statistics = [
        {key: value for key, value in side.state_dict().items() if "running_" in key}
        for side in (network, model)
    ]
    torch.testing.assert_close(*statistics)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("in_channels", "stride"), [(32, 1), (16, 2)])
def test_gradients_of_a_bottleneck_are_torchvisions(in_channels, stride, training):
    """In eval, where norms are folded and differentiated with the convolutions, and in training."""
    peers.torchvision()
    from torchvision.models import resnet

    torch.manual_seed(0)
    block = peers.randomize_norms(Bottleneck(in_channels, 8, stride, 2)).double().train(training)
    downsample = None if block.downsample is None else nn.Sequential(*copy.deepcopy(block.downsample))
    theirs = resnet.Bottleneck(in_channels, 8, stride, downsample, dilation=2).double().train(training)
    theirs.load_state_dict(block.state_dict())
    input = torch.randn(2, in_channels, 9, 10, dtype=torch.float64, requires_grad=True)
    sides = []
    for side in (block, theirs):
        output = side(input)
        grads = torch.autograd.grad((output * output.detach().cos()).sum(), [input, *side.parameters()])
        sides.append([output.detach(), *grads, side.bn2.running_var])
    assert [name for name, _ in block.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for found, expected in zip(*sides, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("in_channels", "stride"), [(32, 1), (16, 2)])
def test_a_bottleneck_in_eval_is_an_operator_for_each_convolution(in_channels, stride, monkeypatch):
    torch.manual_seed(0)
    block = peers.randomize_norms(Bottleneck(in_channels, 8, stride, 2)).eval()
    input = torch.randn(2, in_channels, 40, 40)
    x = F.relu(block.bn1(block.conv1(input)))
    x = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(x)))))
    expected = F.relu(x + (input if block.downsample is None else block.downsample(input)))
    calls, convolve = [], segfast.functional.conv2d

    def conv2d(*args, **kwargs):
        calls.append((args[1].shape[2], kwargs["residual"] is not None, kwargs["activation"]))
        return convolve(*args, **kwargs)

    monkeypatch.setattr(segfast.functional, "conv2d", conv2d)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("a norm of its own"))
    with torch.no_grad():
        torch.testing.assert_close(block(input), expected, rtol=1e-4, atol=1e-5)
    shortcut = [] if stride == 1 else [(1, False, None)]
    assert calls == [*shortcut, (1, False, "relu"), (3, False, "relu"), (1, True, "relu")]


@pytest.mark.parametrize("hooked", ["bn2", "conv3", "downsample"])
def test_hooks_on_layers_are_called(hooked):
    torch.manual_seed(0)
    block = peers.randomize_norms(Bottleneck(16, 8, 2)).eval()
    input, seen = torch.randn(2, 16, 40, 40), []
    with torch.no_grad():
        expected = block(input)
        getattr(block, hooked).register_forward_hook(lambda *_: seen.append(hooked))
        torch.testing.assert_close(block(input), expected, rtol=1e-4, atol=1e-5)
    assert seen == [hooked]


def test_training_with_one_image():
    """Where torchvision's raises: the pooled features of one image have no variance."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(torchvision_network("deeplabv3_resnet50")).train()(images())
    model = peers.randomize_norms(create("deeplabv3_resnet50", **TINY, dropout=0.0)).train()
    norm = model.classifier[0].convs[-1][2]
    before = norm.running_mean.clone()
    model(images())["out"].square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.classifier[0].convs[-1][1].weight.grad.abs().sum() > 0
    assert torch.equal(norm.running_mean, before)


def test_low_resolution_scores():
    model = create("deeplabv3_resnet50", **TINY, aux_loss=True).eval()
    with torch.no_grad():
        low, full = model(images(), upsample=False), model(images())
    for key, scores in low.items():
        assert scores.shape == (1, 3, 9, 9)
        expected = F.interpolate(scores, size=(65, 65), mode="bilinear", align_corners=False)
        torch.testing.assert_close(full[key], expected, rtol=0, atol=0)


class TestCheckpoints:
    def build(self, name="fcn_resnet50", **options):
        torch.manual_seed(0)
        return create(name, **TINY, **options)

    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize(("theirs", "own"), [(True, True), (True, False), (False, True)])
    def test_with_and_without_the_auxiliary_head(self, theirs, own, prefix):
        source, model = self.build(aux_loss=theirs), self.build(aux_loss=own)
        state = source.state_dict()
        found = remap_state_dict({prefix + key: value for key, value in state.items()} | {"epoch": 3}, model)
        model.load_state_dict(found)
        for key in found:
            assert key not in state or found[key] is state[key]

    @pytest.mark.parametrize("name", ["deeplabv3_resnet50", *MOBILE])
    def test_published_classifiers(self, name):
        """Their weights arrive in the backbone, the heads stay as they are."""
        backbone = name.partition("_")[2]
        classifier = peers.randomize_norms(getattr(peers.torchvision().models, backbone)())
        with torch.device("meta"):
            model = create(name)
        found = remap_state_dict(classifier.state_dict(), model)
        for key, value in classifier.state_dict().items():
            if not key.startswith(("fc.", "classifier.")):
                key = key.removeprefix("features.")
                assert found[f"backbone.{key}"].data_ptr() == value.data_ptr()
        assert {key for key, value in found.items() if value.is_meta} == {
            key for key in model.state_dict() if not key.startswith("backbone.")
        }

    def test_of_another_network(self):
        with pytest.raises(ValueError, match=r"another network: it has classifier\.0\.bias"):
            state = self.build().state_dict() | {"classifier.0.bias": torch.zeros(1)}
            remap_state_dict(state, self.build())
        with pytest.raises(
            ValueError, match=r"a key that ResNetEncoder does not know: layer1\.0\.conv4\.weight"
        ):
            state = ResNetEncoder(width_mult=0.125).state_dict()
            remap_state_dict(state | {"layer1.0.conv4.weight": torch.zeros(1)}, self.build())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"weights": "DEFAULT"}, "nothing is downloaded.*got \\['DEFAULT'\\]"),
    ],
)
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet101", *MOBILE])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_bad_output_stride(name):
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16\), got 32"):
        create(name, output_stride=32)


@pytest.mark.parametrize("conv", ["conv1", "conv2", "downsample"])
def test_a_replaced_convolution_is_called(conv):
    """A subclass with a forward of its own, or anything put around a layer, is not fused away."""

    class Standardized(torch.nn.Conv2d):
        def forward(self, input):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return self._conv_forward(input, weight, self.bias)

    block = ResNetEncoder(width_mult=0.125).eval().layer1[0]
    holder, name = (block, conv) if conv != "downsample" else (block.downsample, "0")
    old = getattr(holder, name)
    new = Standardized(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
    )
    new.weight = old.weight
    x = torch.randn(1, 8, 64, 64)
    with torch.no_grad():
        before = block(x)
        setattr(holder, name, new)
        found = block(x)
        for layer in (block.bn1, block.bn2, block.bn3):
            layer.register_forward_hook(lambda *_: None)  # one by one
        torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, before, atol=1e-2)
        setattr(holder, name, torch.nn.Sequential(new))
        torch.testing.assert_close(block(x), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_the_plain_twins_are_torchvisions(name):
    """The benchmarks compare with them where there is no torchvision."""
    plain, _ = plain_model(name)
    state = torchvision_network(name).state_dict()
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("aux")})
    with torch.no_grad():
        expected = torchvision_network(name)(images())["out"]
        torch.testing.assert_close(plain.eval()(images()), expected, rtol=1e-5, atol=1e-5)
