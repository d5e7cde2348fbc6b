"""FCN: what every network must do, the paper's crops and sizes, VGG16's weights, plain torch.nn beside it."""

import functools

import pytest
import torch
from torch import nn

from benchmarks.plain_models import plain_model
from segfast.models import FCN, fcn8s, fcn16s, fcn32s, remap_state_dict
from segfast.models.fcn import crop_offsets
from segfast.nn import ConvTranspose2d
from tests.models import peers
from tests.models.tester import ModelTester

PAPER = "Long, Shelhamer, Darrell"
TINY = {"width": 2, "num_classes": 3}


def with_scores(model):
    """Scores begin as zero, which would make any two outputs equal."""
    for name, parameter in model.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter, std=0.3)
    return model


class FCNTester(ModelTester):
    paper = PAPER
    options = TINY
    example = (64, 96)
    ranged = False  # max_pool2d(ceil_mode=True) asks whether its last window begins inside

    def build(self, **overrides):
        return with_scores(super().build(**overrides))


class TestFCN8s(FCNTester):
    name = "fcn8s"
    parameters = 134_489_759


class TestFCN8sUnpadded(FCNTester):
    name = "fcn8s"
    options = {**TINY, "padded": False, "dropout": 0.1}  # noqa: RUF012
    parameters = 134_489_759


class TestFCN16s(FCNTester):
    name = "fcn16s"
    parameters = 134_815_994
    test_compiles_into_one_graph = None  # seconds, and nothing new
    test_exports_with_dynamic_sizes = None


class TestFCN32s(FCNTester):
    name = "fcn32s"
    parameters = 136_152_917
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


@pytest.mark.parametrize(("stride", "offsets"), [(32, [19]), (16, [-5, 27]), (8, [-5, -9, 31])])
def test_crops_are_the_papers(stride, offsets):
    """Of the published voc-fcn32s, -16s and -8s: those of the skips, then that of the image."""
    assert crop_offsets(100, 0, stride) == offsets


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("build", [fcn32s, fcn16s, fcn8s])
def test_every_size(build, padded):
    """Enlarged scores cover skips and image at every remainder of the five poolings."""
    model = build(1, padded=padded, width=1).eval()
    with torch.no_grad():
        for height in range(1, 68):
            scores = model(torch.zeros(1, 3, height, 69 - height))
            assert scores.shape == (1, 1, height, 69 - height) and scores.is_contiguous()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("build", [fcn32s, fcn16s, fcn8s])
def test_scores_stay_where_they_belong(build, padded, monkeypatch):
    """Coarse scores that say where their pixels stand in the image become each pixel's own row."""
    model = build(1, padded=padded, width=1).eval()
    # 32 pixels are pooled into one. The padding of 100, less the pixel that its convolution needs anyhow, is
    # before the image, and 3 of those before what fc6 looks at in the middle.
    first = 15.5 + (3 * 32 - 99 if padded else 0)

    def rows(self, pool):
        n = [side - 6 if padded else side for side in pool.shape[2:]]
        return (first + 32 * torch.arange(n[0])[None, None, :, None]).expand(1, 1, *n)

    monkeypatch.setattr(FCN, "_scores", rows)
    with torch.no_grad():
        scores = model(torch.zeros(1, 3, 201, 197))[0, 0, 48:152, 48:152]
    torch.testing.assert_close(scores, torch.arange(48.0, 152.0)[:, None].expand_as(scores))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 51)])
def test_computes_what_plain_torch_computes(height, width):
    torch.manual_seed(0)
    plain, _ = plain_model("fcn8s_vgg16", small=True)
    model = fcn8s(width=16)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.copy_(theirs)
    images = torch.randn(1, 3, height, width)
    results = []
    for network in (model.eval(), plain.eval()):
        scores = network(images)
        weights = list(network.parameters())
        results.append((scores, torch.autograd.grad(scores.square().mean(), weights)))
    (ours, our_grads), (theirs, their_grads) = results
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    for (name, _), grad, expected in zip(model.named_parameters(), our_grads, their_grads, strict=True):
        assert (grad - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    model = fcn8s(width=16)
    for name, module in model.named_children():
        if isinstance(module, ConvTranspose2d):
            assert module.kernel_size[0] == 2 * module.stride[0] and module.bias is None
            assert torch.equal(module.weight[0, 0], module.weight[20, 20]) and not module.weight[0, 1].any()
            assert module.weight[0, 0].sum().item() == pytest.approx(module.stride[0] ** 2)
            assert module.weight.requires_grad
        elif name.startswith("score"):
            assert not module.weight.any() and not module.bias.any()
    assert not model.eval()(torch.randn(1, 3, 40, 40)).any()
    assert model.conv3_2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


class TestVGG16:
    """torchvision's classifier, its linear layers turned into convolutions."""

    @functools.cached_property
    def classifier(self):
        torch.manual_seed(0)
        return peers.torchvision().models.vgg16(num_classes=21).eval()

    def test_class_scores_are_the_classifiers(self):
        """At 224x224 the pixel in the middle of the coarse map sees what the linear layers see."""
        with torch.device("meta"):
            model = fcn16s(padded=False).eval()
        state = remap_state_dict(self.classifier.state_dict(), model)
        model.load_state_dict(state, assign=True)
        assert state["fc6.weight"].data_ptr() == self.classifier.classifier[0].weight.data_ptr()
        image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, found = self.classifier(image), model.heat_map(image)
        assert found.shape == (1, 21, 7, 7) and expected.std() > 1e-3
        assert (found[:, :, 3, 3] - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_other_classes_are_left(self):
        """ImageNet's thousand classes are not read; scores and enlarging layers stay as they are."""
        with torch.device("meta"):
            state = peers.torchvision().models.vgg16().state_dict()
            model = fcn8s()
        found = remap_state_dict({"module." + key: value for key, value in state.items()}, model)
        theirs = {id(value) for value in state.values()}
        taken = {key for key, value in found.items() if id(value) in theirs}
        # The two that are reshaped, and by that other tensors.
        taken |= {"fc6.weight", "fc7.weight"}
        assert taken == {key for key in model.state_dict() if not key.startswith(("score", "upscore"))}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("classifier.3.bias"), "the checkpoint has nothing for fc7.bias"),
            (
                lambda state: state.update({"features.1.weight": torch.zeros(64)}),
                r"neither FCN's own nor VGG16's: features\.1\.weight",
            ),
            (
                lambda state: state.update({"classifier.0.weight": torch.zeros(8, 9)}),
                r"fc6.weight: the checkpoint has \[8, 9\], the model \[4096, 512, 7, 7\]",
            ),
        ],
    )
    def test_damaged_checkpoints(self, change, message):
        with torch.device("meta"):
            state = dict(peers.torchvision().models.vgg16().state_dict())
            model = fcn8s()
        change(state)
        with pytest.raises(ValueError, match=message):
            remap_state_dict(state, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": -1}, "in_channels must be at least 1, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"stride": 4}, r"stride must be one of \(8, 16, 32\), got 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FCN(**options)
