"""DeepLabV3+: what every network must do, equality with plain torch.nn, sizes, batch 1, checkpoints."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.plain_models import plain_model
from segfast.models import (
    create,
    deeplabv3plus_mobilenet_v2,
    deeplabv3plus_xception65,
    remap_state_dict,
)
from segfast.models.deeplabv3plus import ASPP
from segfast.nn._fused.folding import PooledBatchNorm2d
from segfast.ops.segmentation_head import upsample_argmax, upsample_cross_entropy
from tests.models import peers
from tests.models.tester import ModelTester
from tests.segmentation_head.reference import check_labels

SMALL = {
    "deeplabv3plus_mobilenet_v2": {"width_mult": 0.25, "decoder_channels": 16, "num_classes": 3},
    "deeplabv3plus_xception65": {
        "width_mult": 0.125,
        "middle_blocks": 1,
        "decoder_channels": 16,
        "num_classes": 3,
    },
    "deeplabv3plus_resnet50": {"width_mult": 0.125, "decoder_channels": 16, "num_classes": 3},
    "deeplabv3plus_resnet101": {"width_mult": 0.125, "decoder_channels": 16, "num_classes": 3},
}
NAMES = list(SMALL)
PAPER = "Chen, Zhu, Papandreou, Schroff, Adam"
# The rows of the benchmark, and how our network becomes theirs.
TWINS = {
    "deeplabv3plus_mobilenetv2": lambda: deeplabv3plus_mobilenet_v2(separable=False),
    "deeplabv3plus_xception65": deeplabv3plus_xception65,
}


class TestMobileNetV2(ModelTester):
    name = "deeplabv3plus_mobilenet_v2"
    options = SMALL[name]
    paper = PAPER
    parameters = 2_719_813
    dynamic = False  # half a minute, over 35 relu6 of unknown sizes


class TestXception65(ModelTester):
    name = "deeplabv3plus_xception65"
    options = {**SMALL[name], "output_stride": 8}  # noqa: RUF012
    paper = PAPER
    parameters = 41_055_413


class TestResNet50(ModelTester):
    name = "deeplabv3plus_resnet50"
    options = SMALL[name]
    paper = PAPER
    parameters = 26_696_133
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


def test_a_resnets_scores_are_the_decoders_of_its_features():
    """Of stride 4 and 16, with torchvision's encoder."""
    model = create("deeplabv3plus_resnet50", num_classes=3).eval()
    network = peers.randomize_norms(
        peers.torchvision().models.resnet50(replace_stride_with_dilation=[False, False, True])
    ).eval()
    model.load_state_dict(remap_state_dict(network.state_dict(), model))
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images(1)))))
        low = network.layer1(x)
        high = model.aspp(network.layer4(network.layer3(network.layer2(low))))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=False)
        expected = model.head(model.decoder(torch.cat([high, model.low_level(low)], 1)))
        found = model(images(1), upsample=False)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def small(name, **options):
    torch.manual_seed(0)
    return create(name, **{**SMALL[name], **options})


def images(count=2, height=65, width=50, channels=3):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


@functools.cache
def twin(name):
    torch.manual_seed(0)
    network, _ = plain_model(name)
    return network.eval()


@pytest.mark.parametrize("name", TWINS)
def test_equals_plain_torch(name):
    model = TWINS[name]().eval()
    model.load_state_dict(twin(name).state_dict())
    with torch.no_grad():
        for size in ((65, 65), (50, 77)):
            expected, scores = twin(name)(images(1, *size)), model(images(1, *size))
            assert scores.shape == expected.shape and expected.std() > 0.5
            assert (scores - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_training_step_equals_plain_torch():
    name = "deeplabv3plus_mobilenetv2"
    plain = copy.deepcopy(twin(name))
    model = TWINS[name]()
    model.load_state_dict(plain.state_dict())
    grads = []
    # In float64: batch norms over 40 pixels enlarge rounding errors, and there are 60 of them.
    for network in (model.double(), plain.double()):
        network.train()
        network.aspp.dropout.eval()
        loss = F.cross_entropy(network(images().double()), torch.zeros(2, 65, 50, dtype=torch.long))
        names, weights = zip(*network.named_parameters(), strict=True)
        grads.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    ours, theirs = grads
    assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
    for key, grad in theirs.items():
        # A shift that another batch norm takes away again has a gradient of 0.
        assert (ours[key] - grad).abs().max() <= 1e-8 * grad.abs().max() + 1e-13, key


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deeplabv3plus_mobilenet_v2", 5.816),
        ("deeplabv3plus_xception65", 54.711),
        ("deeplabv3plus_resnet50", 40.352),
        ("deeplabv3plus_resnet101", 59.344),
    ],
)
def test_parameter_counts_without_separable_convolutions(name, millions):
    with torch.device("meta"):
        model = create(name, separable=False)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=500)


@pytest.mark.parametrize("name", NAMES)
def test_output_stride(name):
    for output_stride, rates in ((16, (6, 12, 18)), (8, (12, 24, 36))):
        model = small(name, output_stride=output_stride).eval()
        assert model.encoder.reductions[-1] == output_stride
        assert [branch.conv_dw.dilation for branch in model.aspp.branches[1:]] == [(r, r) for r in rates]
        assert [branch.conv_dw.padding for branch in model.aspp.branches[1:]] == [(r, r) for r in rates]
        seen = []
        model.aspp.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.shape[2:])
        )
        model(images())
        assert seen == [(-(-65 // output_stride), -(-50 // output_stride))]
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16\), got 32"):
        small(name, output_stride=32)


@pytest.mark.parametrize("name", NAMES)
def test_low_resolution_scores(name):
    """One bilinear interpolation makes the full-size scores of what `upsample=False` returns."""
    model = small(name).eval()
    with torch.no_grad():
        low, full = model(images(), upsample=False), model(images())
    assert low.shape == (2, 3, 17, 13)
    expected = F.interpolate(low, size=(65, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, expected, rtol=0, atol=0)


def test_low_resolution_scores_go_into_the_fused_head():
    model = small("deeplabv3plus_mobilenet_v2").eval()
    targets = torch.randint(3, (2, 65, 50), generator=torch.Generator().manual_seed(2))
    low, full = model(images(), upsample=False), model(images())
    check_labels(upsample_argmax(low, size=(65, 50)), full)
    losses = upsample_cross_entropy(low, targets, size=(65, 50)), F.cross_entropy(full, targets)
    torch.testing.assert_close(*losses)
    weight = model.aspp.project[0].weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


@pytest.mark.parametrize("name", NAMES)
def test_training_with_one_image(name):
    """All norms but the pooled features' see several pixels; that one falls back on what it has gathered."""
    model = peers.randomize_norms(small(name, dropout=0.0)).train()
    norm = model.aspp.pool[1]
    before = norm.running_mean.clone()
    F.cross_entropy(model(images(1)), torch.zeros(1, 65, 50, dtype=torch.long)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.aspp.pool[0].weight.grad.abs().sum() > 0
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 7
    model(images(2))
    assert not torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 8


def test_pooled_norm():
    pooled, plain = PooledBatchNorm2d(4), nn.BatchNorm2d(4)
    peers.randomize_norms(pooled)
    plain.load_state_dict(pooled.state_dict())
    one, three = torch.randn(1, 4, 1, 1), torch.randn(3, 4, 1, 1)
    assert torch.equal(pooled(one), plain.eval()(one))
    assert torch.equal(pooled(three), plain.train()(three))
    assert torch.equal(pooled.running_var, plain.running_var)
    assert torch.equal(pooled.eval()(three), plain.eval()(three))


def test_every_branch_of_the_aspp_is_heard():
    torch.manual_seed(0)
    aspp = ASPP(8, 4, (1, 2, 3), separable=True, dropout=0.0).eval()
    input = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        expected = aspp(input)
        for part in range(5):
            silenced = ASPP(8, 4, (1, 2, 3), separable=True, dropout=0.0).eval()
            silenced.load_state_dict(aspp.state_dict())
            silenced.project[0].weight[:, 4 * part : 4 * part + 4] = 0
            assert (silenced(input) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("separable", [False, True])
def test_the_aspp_in_eval_enlarges_nothing(separable, batch, monkeypatch):
    """Few operators, and the layers' result."""
    torch.manual_seed(0)
    aspp = peers.randomize_norms(ASPP(48, 8, (1, 2, 3), separable=separable, dropout=0.0)).eval()
    input = torch.randn(batch, 48, 30, 31)
    expected = aspp(input).detach()  # with gradients the layers run one after the other
    hooks = []
    aspp.project.register_forward_hook(lambda *_: hooks.append("project"))
    with torch.no_grad():
        torch.testing.assert_close(aspp(input), expected, rtol=1e-4, atol=1e-5)
        assert hooks == ["project"]
        aspp.project._forward_hooks.clear()
        monkeypatch.setattr(torch, "empty_like", lambda *_: pytest.fail("the pooled branch was enlarged"))
        torch.testing.assert_close(aspp(input), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_eval():
    model = small("deeplabv3plus_mobilenet_v2", dropout=0.5)
    assert model.aspp.dropout.p == 0.5
    assert torch.equal(model.eval()(images()), model(images()))


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "network"),
        [
            ("deeplabv3plus_mobilenet_v2", lambda: peers.timm().create_model("mobilenetv2_100")),
            ("deeplabv3plus_mobilenet_v2", lambda: peers.torchvision().models.mobilenet_v2()),
            ("deeplabv3plus_xception65", lambda: peers.timm().create_model("xception65")),
        ],
        ids=["timm mobilenetv2_100", "torchvision mobilenet_v2", "timm xception65"],
    )
    def test_published_classifiers(self, name, network):
        """Their weights arrive in the encoder; the decoder stays as it was."""
        model, classifier = create(name), peers.randomize_norms(network()).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(remap_state_dict(classifier.state_dict(), model))
        for key, value in model.state_dict().items():
            assert key.startswith("encoder.") or torch.equal(value, before[key]), key
        with torch.no_grad():
            encoder = type(model.encoder)().eval()  # at the classifier's output stride, 32
            encoder.load_state_dict(model.encoder.state_dict())
            features = encoder(images())[-1]
            if hasattr(classifier, "forward_intermediates"):
                expected = classifier.forward_intermediates(images(), intermediates_only=True)[-1]
            else:
                expected = classifier.features[:18](images())
        assert (features - expected).abs().max() < 1e-4 * expected.abs().max()

    @pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
    def test_encoder_alone(self, prefix):
        model, other = (small("deeplabv3plus_mobilenet_v2") for _ in range(2))
        peers.randomize_norms(other)
        state = {prefix + key: value for key, value in other.encoder.state_dict().items()}
        found = remap_state_dict(state, model)
        model.load_state_dict(found)
        for key, value in other.encoder.state_dict().items():
            assert torch.equal(found[f"encoder.{key}"], value)

    def test_of_a_network_with_another_decoder(self):
        model, dense = (small("deeplabv3plus_mobilenet_v2", separable=s) for s in (True, False))
        with pytest.raises(ValueError, match=r"another network with an encoder: it has aspp\.branches"):
            remap_state_dict(dense.state_dict(), model)
        # What the message says to do.
        model.encoder.load_state_dict(remap_state_dict(dense.state_dict(), model.encoder))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["num_classes", "decoder_channels", "in_channels"])
def test_bad_options(name, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        small(name, **{option: 0})
